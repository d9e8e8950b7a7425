"""Singular values and frequencies of weights, against hand-computed ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hyperfast import models
from hyperfast.analysis.spectra import (
    low_pass,
    low_pass_sweep,
    modulate_singular_values,
    round_score,
    s_ratio,
    s_ratios,
    singular_value_sweep,
    sweep,
)


def test_s_ratio_of_a_diagonal() -> None:
    assert s_ratio(torch.diag(torch.tensor([1.0, 4.0, 2.0, 3.0]))) == pytest.approx((16 + 9) / 30)
    # Five values: the first two are the half.
    assert s_ratio(torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0, 2.0]))) == pytest.approx(5 / 8)


def test_s_ratio_of_a_convolution_is_that_of_its_matrix() -> None:
    weight = torch.randn(6, 2, 3, 3)
    values = torch.linalg.svdvals(weight.double().view(6, 18)).square()
    assert s_ratio(weight) == pytest.approx(float(values[:3].sum() / values.sum()), rel=1e-12)


def test_s_ratio_without_a_half_and_without_energy() -> None:
    assert s_ratio(torch.randn(1, 5)) == 0
    assert math.isnan(s_ratio(torch.zeros(4, 4)))


def test_s_ratios_of_a_module_and_of_its_state_dict() -> None:
    network = models.create("resnet8", in_channels=1)
    of_module = s_ratios(network)
    assert of_module == s_ratios(network.state_dict())
    assert next(iter(of_module)) == "conv1.weight" and not any("bn" in name for name in of_module)
    assert list(s_ratios(network, ["conv1.weight"])) == ["conv1.weight"]


def test_messages_of_s_ratio() -> None:
    with pytest.raises(ValueError, match=r"weight is \[3\]; expected two or more dimensions"):
        s_ratio(torch.zeros(3))
    with pytest.raises(ValueError, match="bad: the weight has values that are not finite"):
        s_ratios({"bad": torch.full((2, 2), math.nan)})
    with pytest.raises(ValueError, match="there is no parameter 'b'; there are a"):
        s_ratios({"a": torch.eye(2)}, ["b"])
    with pytest.raises(ValueError, match="bias is .2.; expected a weight of two or more dimensions"):
        s_ratios({"bias": torch.ones(2)}, ["bias"])
    with pytest.raises(ValueError, match="there is no weight of two or more dimensions"):
        s_ratios(nn.BatchNorm1d(3))


def test_round_score_is_the_mean_over_the_last_half() -> None:
    names = "abcde"
    original = dict.fromkeys(names, 0.5)
    reconstructed = dict(zip(names, [9.0, 9.0, 9.0, 0.6, 0.8], strict=True))
    assert round_score(original, reconstructed) == pytest.approx(0.2)
    even = round_score(dict.fromkeys("abcd", 0.5), dict(zip("abcd", [9.0, 9.0, 0.6, 0.8], strict=True)))
    assert even == pytest.approx(2 / 4 * (0.1 + 0.3))
    with pytest.raises(ValueError, match="there are 5 and 1 layers; expected the same names, at least two"):
        round_score(original, {"a": 0.5})


def test_modulation_scales_the_last_values_only() -> None:
    weight = torch.randn(6, 2, 3, 3)
    before = torch.linalg.svdvals(weight.double().flatten(1))
    after = torch.linalg.svdvals(modulate_singular_values(weight, last=2, factor=0.25).double().flatten(1))
    expected = torch.cat([before[:4], (0.25 * before[4:]).sort(descending=True).values])
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(modulate_singular_values(weight, last=6, factor=1), weight)
    assert s_ratio(modulate_singular_values(weight, last=2, factor=0)) > s_ratio(weight)
    with pytest.raises(ValueError, match=r"last is 15; a weight \[6, 2, 3, 3\] has 6 singular values"):
        modulate_singular_values(weight, factor=0.5)


@pytest.mark.parametrize("axes", ["flat", "spatial"])
@pytest.mark.parametrize("index", ["signed", "unsigned"])
def test_low_pass_without_a_limit_is_the_identity(index: str, axes: str) -> None:
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    for cutoff in (math.inf, 1e6):
        torch.testing.assert_close(low_pass(weight, cutoff, index=index, axes=axes), weight)


@pytest.mark.parametrize("axes", ["flat", "spatial"])
@pytest.mark.parametrize("index", ["signed", "unsigned"])
def test_low_pass_with_no_room_leaves_the_mean(index: str, axes: str) -> None:
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    mean = weight.mean((2, 3), keepdim=True).expand_as(weight)
    torch.testing.assert_close(low_pass(weight, 1e-3, index=index, axes=axes), mean)


def test_low_pass_damps_each_frequency_as_the_formula_says() -> None:
    n, cutoff = 9, 2.5
    places = torch.arange(n, dtype=torch.float64)
    for f in range(n):
        wave = torch.cos(2 * math.pi * f * places / n).view(1, 1, 3, 3)
        h = [math.exp(-0.5 * (k / cutoff) ** 2) for k in (f, min(f, n - f), (n - f) % n)]
        torch.testing.assert_close(low_pass(wave, cutoff), h[1] * wave)
        # What is dropped is imaginary; what stays of a wave is the mean of its two frequencies.
        torch.testing.assert_close(low_pass(wave, cutoff, index="unsigned"), (h[0] + h[2]) / 2 * wave)


def test_spatial_low_pass_counts_both_directions() -> None:
    y, x = torch.meshgrid(torch.arange(5.0).double(), torch.arange(3.0).double(), indexing="ij")
    wave = torch.cos(2 * math.pi * (2 * y / 5 + x / 3)).view(1, 1, 5, 3)
    expected = math.exp(-0.5 * (2**2 + 1**2) / 1.5**2) * wave
    torch.testing.assert_close(low_pass(wave, 1.5, axes="spatial"), expected)


def test_low_pass_is_real_and_keeps_dtype() -> None:
    smooth = low_pass(torch.randn(2, 2, 3, 3, dtype=torch.bfloat16), 2.0)
    assert smooth.dtype == torch.bfloat16 and smooth.shape == (2, 2, 3, 3)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 2), {}, r"weight is \[2, 2\]; expected that of a convolution"),
        ((2, 2, 3), {"cutoff": 0.0}, "cutoff is 0.0; expected a positive"),
        ((2, 2, 3), {"index": "both"}, "index is 'both'; choose one of 'signed', 'unsigned'"),
        ((2, 2, 3), {"axes": "both"}, "axes is 'both'; choose one of 'flat', 'spatial'"),
    ],
)
def test_messages_of_low_pass(shape: tuple[int, ...], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        low_pass(torch.zeros(shape), **{"cutoff": 1.0, **options})


def test_sweep_changes_one_block_of_a_copy() -> None:
    network = models.create("resnet8", in_channels=1)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    seen: list[set[str]] = []

    def evaluate(module: nn.Module) -> float:
        assert not module.training
        state = module.state_dict()
        seen.append({name for name in before if not torch.equal(state[name], before[name])})
        return float(len(seen))

    def double(weight: torch.Tensor, value: float) -> torch.Tensor:
        return value * weight

    found = sweep(network, "layer1.0", [2.0, 1.0], double, evaluate)
    assert found == [(2.0, 1.0), (1.0, 2.0)]
    assert seen == [{"layer1.0.conv1.weight", "layer1.0.conv2.weight"}, set()]
    assert network.training and all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    with pytest.raises(ValueError, match="block 'layer9' has no convolution"):
        sweep(network, "layer9", [1.0], double, evaluate)


def test_the_two_sweeps_use_their_modulation() -> None:
    network = nn.Sequential(nn.Conv2d(4, 6, 3))
    weight = network[0].weight.detach().clone()
    seen: list[torch.Tensor] = []

    def evaluate(module: nn.Module) -> float:
        seen.append(module[0].weight.detach().clone())
        return 0.0

    low_pass_sweep(network, "", [1.5], evaluate, index="unsigned", axes="spatial")
    singular_value_sweep(network, "", [0.5], evaluate, last=3)
    assert torch.equal(seen[0], low_pass(weight, 1.5, index="unsigned", axes="spatial"))
    assert torch.equal(seen[1], modulate_singular_values(weight, last=3, factor=0.5))
