"""Reconstruction against NeRN's own numbers, rounds, guidance, resuming, and every error."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_task
import torch
from helpers import golden
from torch import Tensor, nn

from hyperfast.nn import load_nern, nern_state_dict
from hyperfast.recipes import Artifact, CompressConfig, GuideConfig, checkpoint, compress, continuation
from hyperfast.recipes.compress_config import CompressConfig as Config
from hyperfast.recipes.compress_run import Run
from hyperfast.recipes.guided import Guidance
from hyperfast.recipes.reconstruction import Reconstruction, Targets, new_predictor
from hyperfast.surgery import cover

NERN = golden("nern")


def settings(**changes: Any) -> Config:
    small: dict[str, Any] = {
        "hidden": 12,
        "levels": 6,
        "steps": 12,
        "batch_rows": 20,
        "permutation": "identity",
        "device": "cpu",
        "log_every": 4,
    }
    return CompressConfig(**{**small, **changes})


def toy(**changes: Any) -> Reconstruction:
    """The three layers of golden group B, and NeRN's predictor of them at a constant learning rate."""
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 6, 3, bias=False), nn.Conv2d(6, 8, 1, bias=False)
    )
    state = {f"{i}.weight": NERN[f"B_target{i}"] for i in range(3)}
    network.load_state_dict(state)
    config = settings(hidden=16, levels=40, min_lr=5e-3, rmse="full", **{"sampling": "all", **changes})
    coverage = cover(network, policy="nern")
    predictor = new_predictor(coverage, config, seed=0)
    load_nern(predictor, {n.removeprefix("B_init."): v for n, v in NERN.items() if n.startswith("B_init.")})
    return Reconstruction(predictor, Targets.of(state, coverage, config), config, seed=0)


def named_parameters(training: Reconstruction) -> dict[str, nn.Parameter]:
    return dict(zip(nern_state_dict(training.predictor), training.predictor.parameters(), strict=True))


def test_twelve_steps_are_nerns() -> None:
    training = toy()
    for made in range(1, 13):
        training.step()
        expected = NERN["B_loss_before_each_step"][made - 1].item()
        torch.testing.assert_close(training.loss.item(), expected, rtol=1e-6, atol=0)
        if made in (1, 6, 12):
            for name, parameter in named_parameters(training).items():
                torch.testing.assert_close(parameter.detach(), NERN[f"B_after{made}.{name}"], rtol=0, atol=1e-6)


def test_the_gradient_through_a_batch_with_repetitions_is_nerns() -> None:
    training = toy(sampling="random_weighted")
    loss = training.gradient(NERN["B2_sampled_rows"])
    torch.testing.assert_close(loss.item(), NERN["B2_loss"].item(), rtol=1e-6, atol=0)
    for name, parameter in named_parameters(training).items():
        torch.testing.assert_close(parameter.grad, NERN[f"B2_grad.{name}"], rtol=0, atol=1e-6)


def test_the_running_error_follows_uniform_batches_only() -> None:
    training = toy(sampling="random_weighted")
    training.config = settings(rmse="running")
    exact = training.targets.rmse(training.predictor)
    torch.testing.assert_close(training.gradient(torch.arange(20), unbiased=False), exact)
    every = training.gradient(torch.arange(120), unbiased=True)  # each row once: the estimate is exact
    torch.testing.assert_close(every, exact)
    error = training.predictor.squared_error(training.targets.rows, training.targets.mask, torch.arange(20)).detach()
    expected = (0.9 * exact**2 + 0.1 * error * 120 / (20 * training.targets.elements)).sqrt()
    torch.testing.assert_close(training.gradient(torch.arange(20), unbiased=True), expected)


def smooth_network() -> nn.Module:
    """Kernels that a small predictor can learn: waves over filters and channels."""
    network = nn.Sequential(nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 3))
    with torch.no_grad():
        for layer, module in enumerate(m for m in network if isinstance(m, nn.Conv2d)):
            out, into = module.weight.shape[:2]
            f, c, k = torch.meshgrid(torch.arange(out), torch.arange(into), torch.arange(9), indexing="ij")
            wave = torch.sin(0.5 * f + 0.3 * c + layer) * torch.cos(0.7 * k + 0.2 * f)
            module.weight.copy_(0.1 * wave.reshape(module.weight.shape))
    return network


def test_running_and_full_come_to_the_same_error() -> None:
    errors = {}
    for rmse in ("running", "full"):
        found = [
            compress(
                smooth_network(), settings(hidden=64, levels=20, steps=600, batch_rows=64, rmse=rmse, seed=seed)
            ).rmse
            for seed in range(2)
        ]
        errors[rmse] = sum(found) / len(found)
    assert errors["full"] < 0.1 * 0.05  # of the kernels' standard deviation: it learns
    assert errors["running"] == pytest.approx(errors["full"], rel=0.2)


def test_a_result_is_the_networks_kernels_and_everything_else_is_untouched() -> None:
    network = tiny_task.network()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    result = compress(network, settings(permutation="in-filter"), tiny_task.splits(), metadata={"model": "tiny"})
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in result.artifact.kept.items())
    state = result.artifact.state_dict()
    assert state.keys() == before.keys()
    covered = [state[name] - before[name] for name in ("layer1.0.weight", "layer2.0.weight")]
    assert result.rmse == pytest.approx(float(torch.cat([c.flatten() for c in covered]).square().mean().sqrt()))
    assert set(result.original) == set(result.reconstruction) == set(result.mcnemar) == {"val", "test"}
    assert result.artifact.metadata["model"] == "tiny"
    assert result.steps == 12 and [record.round for record in result.history] == [1]


def test_no_data_and_no_network_is_touched_by_a_reconstruction() -> None:
    class Untouchable(nn.Sequential):
        def forward(self, *_: object) -> Tensor:
            raise AssertionError("the network was run")

    result = compress(Untouchable(nn.Conv2d(3, 4, 3)), settings())
    assert result.original == {} and result.history[0].accuracy is None


def test_relabelled_networks_need_no_permutation() -> None:
    network = tiny_task.network()
    result = compress(network, settings(permutation="relabel"), tiny_task.splits())
    before = compress(network, settings(), tiny_task.splits())
    assert result.artifact.permutation.bits == 0
    assert result.original == before.original
    assert not torch.equal(result.artifact.kept["layer1.0.bias"], before.artifact.kept["layer1.0.bias"])


def test_rounds_go_on_while_they_improve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accuracies are given here: what is tested is who is kept."""
    from hyperfast.recipes.compress import _Compression

    given = iter([0.3, 0.5, 0.6, 0.7, 0.6, 0.55, 0.7])
    order: list[str] = []

    def accuracy(self: _Compression, state: object) -> float:
        order.append("target" if state is self.state else "predicted")
        return next(given)

    monkeypatch.setattr(_Compression, "_accuracy", accuracy)
    # Round 1: trials 0.3 and 0.5, target 0.6. Round 2: trials 0.7 and 0.6, target 0.55. Round 3: stops at rounds=2.
    result = compress(tiny_task.network(), settings(rounds=2, seeds=2, seed=7), tiny_task.splits())
    assert [(r.round, r.seed, r.accuracy, r.kept) for r in result.history] == [(1, 8, 0.5, True), (2, 9, 0.7, True)]
    assert order[2] == "target" and result.steps == 4 * 12
    first, second = result.history
    assert second.rmse != second.rmse_to_original and first.rmse == pytest.approx(first.rmse_to_original)
    assert result.rmse == pytest.approx(second.rmse_to_original)


def test_a_round_that_does_not_improve_is_the_last_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from hyperfast.recipes.compress import _Compression

    given = iter([0.5, 0.9, 0.5, 0.5])
    monkeypatch.setattr(_Compression, "_accuracy", lambda self, state: next(given))
    result = compress(tiny_task.network(), settings(rounds=5), tiny_task.splits())
    assert [record.kept for record in result.history] == [True, False]
    assert result.rmse == pytest.approx(result.history[0].rmse)


def test_selection_by_error_keeps_the_lowest() -> None:
    result = compress(tiny_task.network(), settings(seeds=3, steps=6, select="rmse"))
    alone = [compress(tiny_task.network(), settings(steps=6, seed=seed)).rmse for seed in range(3)]
    assert result.rmse == pytest.approx(min(alone), rel=1e-6)


GUIDES: dict[str, dict[str, Any]] = {
    "all kernels": {"steps": 6, "batch_size": 16},
    "some kernels": {"steps": 6, "batch_size": 16, "batch_rows": 10},
    "adam, noise": {"steps": 6, "batch_size": 8, "noise": True, "image": (3, 8, 8), "optimizer": "adam"},
    "joint": {"method": "joint", "steps": 6, "batch_size": 16, "warmup": 2},
}


@pytest.mark.parametrize("name", GUIDES)
def test_guidance_resumes_with_the_same_bits(name: str, tmp_path: Path) -> None:
    config = settings(guide=GuideConfig(**GUIDES[name]), checkpoint_every=4)
    data = None if GUIDES[name].get("noise") else tiny_task.splits()
    stop_at = 4 if name == "joint" else 17

    class Stopped(Exception):
        pass

    calls = 0

    def stop(_made: int) -> None:
        nonlocal calls
        calls += 1
        if calls == stop_at + 1:
            raise Stopped

    with pytest.raises(Stopped):
        compress(tiny_task.network(), config, data, folder=tmp_path / "stopped", on_step=stop)
    resumed = compress(tiny_task.network(), config, data, folder=tmp_path / "stopped", resume=True)
    whole = compress(tiny_task.network(), config, data, folder=tmp_path / "whole")
    expected = whole.artifact.predictor.state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in resumed.artifact.predictor.state_dict().items())
    assert whole.steps == resumed.steps == (6 if name == "joint" else 18)
    again = compress(tiny_task.network(), config, data, folder=tmp_path / "whole", resume=True)
    assert again.rmse == whole.rmse and again.steps == whole.steps


@pytest.mark.parametrize("more", [{"guide": GuideConfig(steps=3, batch_size=16)}, {"rounds": 2, "select": "rmse"}])
def test_what_was_made_before_goes_on_as_if_never_stopped(more: dict[str, Any], tmp_path: Path) -> None:
    config = settings(permutation="in-filter", select="rmse")
    first = compress(tiny_task.network(), config, tiny_task.splits())
    first.artifact.save(tmp_path / "first.hf")
    start = Artifact.load(tmp_path / "first.hf")
    later = compress(
        tiny_task.network(),
        continuation(start, CompressConfig(device="cpu", log_every=4, **{"select": "rmse", **more})),
        tiny_task.splits(),
        start=start,
        folder=tmp_path / "run",
    )
    at_once = compress(
        tiny_task.network(), settings(permutation="in-filter", **{"select": "rmse", **more}), tiny_task.splits()
    )
    expected = at_once.artifact.predictor.state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in later.artifact.predictor.state_dict().items())
    assert torch.equal(later.artifact.permutation.orders, at_once.artifact.permutation.orders)
    assert [(r.seed, r.rmse) for r in later.history] == [(r.seed, r.rmse) for r in at_once.history]
    assert later.steps == at_once.steps - first.steps
    with pytest.raises(ValueError, match="under other settings: start was"):
        compress(
            tiny_task.network(),
            continuation(start, CompressConfig(device="cpu", **{"select": "rmse", **more})),
            tiny_task.splits(),
            folder=tmp_path / "run",
            resume=True,
        )


def test_starts_that_do_not_fit() -> None:
    network, data, guide = tiny_task.network(), tiny_task.splits(), GuideConfig(steps=2, batch_size=16)
    start = compress(network, settings()).artifact

    def go_on(network: nn.Module = network, start: Artifact = start, **changes: Any) -> None:
        compress(network, settings(**{"guide": guide, **changes}), data, start=start)

    with pytest.raises(ValueError, match=r"start does not fit: hidden is 12 in start and 14 in config.*continuation"):
        go_on(hidden=14)
    with pytest.raises(ValueError, match="permutation is 'identity' in start and 'in-filter' in config"):
        go_on(permutation="in-filter")
    with pytest.raises(ValueError, match="the weights that they cover differ"):
        go_on(exclude=("layer2.0.weight",))
    with pytest.raises(ValueError, match=r"made from another network: its .* has other values"):
        go_on(network=tiny_task.network(seed=1))
    with pytest.raises(ValueError, match="joint training begins with a fresh predictor"):
        go_on(guide=GuideConfig(method="joint", steps=2))
    with pytest.raises(ValueError, match="start has 1 rounds and rounds is 1: there is nothing left to do"):
        go_on(guide=None)
    with pytest.raises(ValueError, match="hidden is 14, but start was made with 12; leave it out"):
        continuation(start, CompressConfig(hidden=14))
    start = Artifact(start.predictor, start.coverage, start.permutation, start.kept, {})
    with pytest.raises(ValueError, match="start does not say what it was made with"):
        continuation(start, CompressConfig())


def guidance(guide: GuideConfig, network: nn.Module, teacher: nn.Module, **changes: Any) -> Guidance:
    config = settings(**changes)
    coverage = cover(network, policy="nern")
    targets = Targets.of(network.state_dict(), coverage, config)
    predictor = new_predictor(coverage, config, seed=3)
    return Guidance(predictor, targets, network.eval(), teacher, tiny_task.splits(), guide.resolved(config), config)


def test_guidance_differentiates_the_answers_of_the_reconstructed_network() -> None:
    """Against one backward through everything, written out; a batch has a row twice."""
    network, teacher = tiny_task.network(), tiny_task.network(seed=9)
    guide = GuideConfig(steps=4, batch_size=16, batch_rows=10)
    training = guidance(guide, network, teacher, permutation="cross-filter")
    rows = torch.tensor([0, 3, 3, 50, 80])
    training.sampler = lambda: rows  # type: ignore[assignment]
    images = training.inputs.batch(0)
    start = {n: p.detach().clone() for n, p in training.predictor.named_parameters()}
    training.step()
    got = {n: p.grad for n, p in training.predictor.named_parameters()}

    training.predictor.load_state_dict(start)
    predicted = training.predictor()
    multiplicity = torch.bincount(rows, minlength=len(predicted))[:, None]
    through = predicted.detach() + multiplicity * (predicted - predicted.detach())
    weights = training.targets.coverage.scatter(training.targets.permutation.invert(through))
    q = torch.func.functional_call(network, weights, (images,)).softmax(1)
    p = teacher.eval()(images).detach().softmax(1)
    loss = 0.01 * (p * (p.log() - (q + 1e-4).log())).sum() / len(images)
    torch.testing.assert_close(training.terms["loss"], loss.detach(), rtol=1e-4, atol=1e-7)
    expected = torch.autograd.grad(loss, list(training.predictor.parameters()))
    for (name, value), right in zip(got.items(), expected, strict=True):
        assert value is not None
        torch.testing.assert_close(value, right, rtol=1e-3, atol=1e-7, msg=name)


def test_joint_training_warms_up_with_reconstruction_alone() -> None:
    network = tiny_task.network()
    guide = GuideConfig(method="joint", steps=4, batch_size=16, warmup=1, beta=0.5, alpha=0.25)
    training = guidance(guide, network, network)
    training.step()
    assert set(training.read()) == {"loss", "reconstruction"}
    rmse = float(training.targets.rmse(training.predictor))
    training.step()
    terms = training.read()
    assert terms["reconstruction"] == pytest.approx(rmse, rel=1e-5)
    assert terms["loss"] == pytest.approx(terms["reconstruction"] + 0.25 * terms["kd"] + 0.5 * terms["fmd"], rel=1e-5)
    assert terms["kd"] > 0 and terms["fmd"] > 0


def test_guidance_brings_the_answers_nearer_to_the_teachers() -> None:
    network = tiny_task.network()
    with torch.no_grad():
        network.head[1].weight.mul_(20)  # type: ignore[operator,union-attr]
    guide = GuideConfig(steps=60, batch_size=80, lr=1e-2, alpha=1.0, optimizer="adam")
    training = guidance(guide, network, network, hidden=24)
    seen = []
    for _ in range(60):
        training.step()
        seen.append(training.read()["loss"])
    assert sum(seen[-5:]) < 0.7 * sum(seen[:5])


@pytest.mark.parametrize("sampling", ["random_weighted", "uniform", "epoch", "all", "layer", "random_layer"])
def test_every_sampling_goes_on_where_it_was(sampling: str) -> None:
    training = toy(sampling=sampling, batch_rows=50)
    for _ in range(4):
        training.step()
    state = {name: tensor.clone() for name, tensor in training.state().items()}
    restored = toy(sampling=sampling, batch_rows=50, seed=5)
    restored.restore(state)
    for _ in range(5):
        training.step()
        restored.step()
    expected = training.state()
    assert [name for name, tensor in restored.state().items() if not torch.equal(tensor, expected[name])] == []


PROGRAM = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[1].split(os.pathsep)
import tiny_task, test_compress
from hyperfast.recipes import compress

folder, kill_at = Path(sys.argv[2]), int(sys.argv[3])
config = test_compress.settings(
    rounds=2, seeds=2, steps=10, checkpoint_every=4, select="rmse", permutation="in-filter"
)
made = 0

def kill(step):
    global made
    made += 1
    if made == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)

compress(tiny_task.network(), config, folder=folder / "killed", resume=not kill_at, on_step=kill)
compress(tiny_task.network(), config, folder=folder / "whole")
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_run_killed_in_its_second_round_ends_with_the_same_bits(tmp_path: Path) -> None:
    def run(kill_at: int) -> subprocess.CompletedProcess[str]:
        paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
        command = [sys.executable, "-c", PROGRAM, paths, str(tmp_path), str(kill_at)]
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
        return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)

    killed = run(37)  # the second seed of the second round, after its first checkpoint
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpoint.load(tmp_path / "killed" / "checkpoint.safetensors").metadata["training"] == "round 2, seed 3"
    done = run(0)
    assert done.returncode == 0, done.stderr
    resumed, whole = (checkpoint.load(tmp_path / run / "checkpoint.safetensors") for run in ("killed", "whole"))
    assert resumed.tensors.keys() == whole.tensors.keys() and "kept/accepted/layers.0.weight" in whole.tensors
    assert [name for name in whole.tensors if not torch.equal(whole.tensors[name], resumed.tensors[name])] == []
    lines = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("killed", "whole")
    ]
    for line in (*lines[0], *lines[1]):
        line.pop("ms_per_step", None)
    assert lines[0] == lines[1]


def test_ctrl_c_writes_a_checkpoint(tmp_path: Path) -> None:
    def press(made: int) -> None:
        if made == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match=r"stopped after step 5; resume from .*checkpoint\.safetensors"):
        compress(tiny_task.network(), settings(), folder=tmp_path, on_step=press)
    assert checkpoint.load(tmp_path / "checkpoint.safetensors").metadata["steps"] == 5


def test_a_loss_that_is_not_finite_names_step_and_checkpoint(tmp_path: Path) -> None:
    training = toy(sampling="random_weighted")
    run = Run(tmp_path, {}, log_every=2, checkpoint_every=2)
    training.total, step = 8, training.step

    def break_in_the_fifth() -> None:
        if training.made == 4:
            with torch.no_grad():
                next(training.predictor.parameters()).fill_(float("nan"))
        step()

    training.step = break_in_the_fifth  # type: ignore[method-assign]
    with run.open(), pytest.raises(FloatingPointError) as caught:
        run.drive(training, "round 1")
    assert "round 1: the loss or the weights are not finite any more after step 6" in str(caught.value)
    assert f"The last good checkpoint is {tmp_path / 'checkpoint.safetensors'}" in str(caught.value)
    assert int(checkpoint.load(tmp_path / "checkpoint.safetensors").tensors["training/made"]) == 4
    with Run(None, {}).open(), pytest.raises(FloatingPointError, match="Nothing was saved"):
        Run(None, {}, log_every=1).drive(training, "round 1")
    broken = Run(tmp_path / "new", {}, log_every=1)
    with broken.open(), pytest.raises(FloatingPointError, match="There is no checkpoint at .*new"):
        training.made = 5
        broken.drive(training, "round 1")


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, write = 0, checkpoint.save_file

    def full(tensors: Any, file: Path, metadata: Any = None) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            return write(tensors, file, metadata)
        file.write_bytes(b"half a")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match=r"could not save .*No space left.*What was there before is unchanged"):
        compress(tiny_task.network(), settings(checkpoint_every=4), folder=tmp_path)
    monkeypatch.undo()
    assert int(checkpoint.load(tmp_path / "checkpoint.safetensors").tensors["training/made"]) == 4
    assert compress(tiny_task.network(), settings(), folder=tmp_path, resume=True).steps == 12


def test_what_cannot_be_resumed(tmp_path: Path) -> None:
    compress(tiny_task.network(), settings(), folder=tmp_path)
    with pytest.raises(FileExistsError, match=r"is of another run: resume it \(resume=True\), or use another folder"):
        compress(tiny_task.network(), settings(), folder=tmp_path)
    with pytest.raises(ValueError, match="under other settings: hidden was 12 and is now 13"):
        compress(tiny_task.network(), settings(hidden=13), folder=tmp_path, resume=True)
    with pytest.raises(ValueError, match="under other settings: network was"):
        compress(tiny_task.network(seed=1), settings(), folder=tmp_path, resume=True)
    once, twice = (settings(guide=GuideConfig(noise=True, image=(3, 8, 8), steps=steps)) for steps in (1, 2))
    compress(tiny_task.network(), once, folder=tmp_path / "guided")
    with pytest.raises(ValueError, match=r"under other settings: guide\.steps was 1 and is now 2\. Resume"):
        compress(tiny_task.network(), twice, folder=tmp_path / "guided", resume=True)
    with pytest.raises(ValueError, match="resume needs a folder"):
        compress(tiny_task.network(), settings(), resume=True)
    checkpoint.save(tmp_path / "other" / "checkpoint.safetensors", {"w": torch.ones(1)}, {"kind": "training"})
    with pytest.raises(ValueError, match="is not of a compression; it cannot be resumed as one"):
        compress(tiny_task.network(), settings(), folder=tmp_path / "other", resume=True)


def with_weight(value: float, where: Any) -> nn.Module:
    network = tiny_task.network()
    with torch.no_grad():
        network.layer1[0].weight[where] = value  # type: ignore[union-attr]
    return network


def test_weights_that_cannot_be_compressed() -> None:
    with pytest.raises(ValueError, match=r"layer1\.0\.weight has 9 of 216 entries that are NaN or infinite"):
        compress(with_weight(float("nan"), (1, 2)), settings())
    broken = tiny_task.network()
    broken.layer1[1].running_var[0] = float("inf")  # type: ignore[index,union-attr]
    with pytest.raises(ValueError, match=r"layer1\.1\.running_var has 1 of 8 entries that are NaN or infinite"):
        compress(broken, settings())
    for kind in ("in-filter", "cross-filter"):
        with pytest.raises(ValueError, match=r"filter 1, channel 2 of layer1\.0\.weight is all zero"):
            compress(with_weight(0.0, (1, 2)), settings(permutation=kind))
        assert compress(with_weight(0.0, (1, 2)), settings(permutation=kind, zero="last")).rmse > 0


def test_an_output_smaller_than_the_kernels() -> None:
    with pytest.raises(
        ValueError, match=r"kernel is 2, but the kernels of Network have sides from 3 on.*give kernel=3"
    ):
        compress(tiny_task.network(), settings(kernel=2))
    assert compress(tiny_task.network(), settings(kernel=2, cover="all")).artifact.coverage.kernel == 2
    with pytest.raises(ValueError, match="does not fit into 2x2 outputs"):
        compress(tiny_task.network(), settings(kernel=2, include=("layer1.0.weight",)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": 0}, "hidden is 0; expected at least 1"),
        ({"batch_rows": 0}, "batch_rows is 0; expected at least 1"),
        ({"kernel": 0}, "kernel is 0; expected at least 1"),
        ({"steps": 0}, "steps is 0; expected at least 1"),
        ({"layers": 1}, "layers is 1; expected at least 2"),
        ({"lr": 0.0}, "lr is 0.0; expected above 0"),
        ({"min_lr": 1.0}, r"min_lr is 1.0; expected in \[0, 0.005\]"),
        ({"permutation": "sorted"}, "permutation is 'sorted'; choose one of 'identity', 'in-filter'"),
        ({"cover": "some"}, "cover is 'some'; choose one of 'nern', 'all'"),
        ({"select": "train"}, "select is 'train'; choose one of None, 'val'"),
        ({"rmse": "none"}, "rmse is 'none'; choose one of 'running', 'full'"),
        ({"sampling": "layer"}, "rmse is 'running', but sampling='layer'.*use rmse='full'"),
        ({"uniform": 0.0}, "rmse is 'running', but .*uniform=0.0 draws no batch"),
        ({"rounds": 2, "guide": GuideConfig("joint")}, "method='joint' has no reconstruction of its own to repeat"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "nern"}, "method is 'nern'; choose one of 'kd', 'joint'"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; choose one of 'ranger', 'adam'"),
        ({"amp": "fp16"}, "amp is 'fp16'; choose one of 'none', 'bf16'"),
        ({"batch_rows": 0}, "batch_rows is 0; expected at least 1, or None"),
        ({"alpha": 0.0}, "alpha is 0.0; expected above 0"),
        ({"lr": -1.0}, "lr is -1.0; expected above 0"),
        ({"warmup": -1}, "warmup is -1; expected at least 0"),
        ({"batch_size": 0}, "batch_size is 0; expected at least 1"),
        ({"image": (3, 0, 8)}, r"image is \(3, 0, 8\); expected three positive numbers"),
        ({"epochs": 1, "steps": 2}, "epochs is 1 and steps is 2; give one of them"),
    ],
)
def test_guidance_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GuideConfig(**changes)


def test_guidance_that_does_not_fit() -> None:
    network = tiny_task.network()
    with pytest.raises(ValueError, match="phase 2 shows images to the networks, but there is no data"):
        compress(network, settings(guide=GuideConfig()))
    with pytest.raises(ValueError, match="noise has no epochs; give steps"):
        compress(network, settings(guide=GuideConfig(noise=True, image=(3, 8, 8))))
    other = tiny_task.network(classes=5)
    with pytest.raises(ValueError, match="the teacher gives 5 logits and the network 4"):
        compress(network, settings(guide=GuideConfig()), tiny_task.splits(), other)
    with pytest.raises(ValueError, match="a teacher is given, but there is no second phase"):
        compress(network, settings(), tiny_task.splits(), other)
    for select in ("val", "test"):
        with pytest.raises(ValueError, match=f"select is '{select}', but there are no such images"):
            compress(network, settings(select=select))
