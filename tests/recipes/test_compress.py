"""Reconstruction against NeRN's own numbers, rounds, and what cannot be compressed."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_task
import torch
from tiny_compression import NERN, settings, toy
from torch import Tensor, nn

from hyperfast.nn import nern_state_dict
from hyperfast.recipes import GuideConfig, compress
from hyperfast.recipes.reconstruction import Reconstruction


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
