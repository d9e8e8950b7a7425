"""Compressions that were stopped, killed or broken, and those that start from what was made before."""

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
from tiny_compression import settings, toy
from torch import nn

from hyperfast.recipes import Artifact, CompressConfig, GuideConfig, checkpoint, compress, continuation
from hyperfast.recipes.compress_run import Run

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
import tiny_compression, tiny_task
from hyperfast.recipes import compress

folder, kill_at = Path(sys.argv[2]), int(sys.argv[3])
config = tiny_compression.settings(
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
        process = {"capture_output": True, "text": True, "timeout": 240, "env": tiny_task.environment()}
        return subprocess.run(command, check=False, **process)

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
