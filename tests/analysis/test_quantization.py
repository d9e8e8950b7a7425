"""Networks with integer weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hyperfast.analysis import quantized_accuracy, quantized_weights, size_in_bytes
from hyperfast.functional import dequantize, quantize


def _network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))


def test_weights_are_rounded_and_the_rest_is_not() -> None:
    network = _network()
    found = quantized_weights(network)
    assert list(found) == ["0.weight", "3.weight"]
    for name, weight in found.items():
        original = network.get_parameter(name).detach()
        assert torch.equal(weight, dequantize(*quantize(original)))
        assert not torch.equal(weight, original)
    assert list(quantized_weights(network, ["3.weight"])) == ["3.weight"]


def test_bytes_by_hand() -> None:
    network = _network()
    weights, others = (108, 80), 4 * (4 + 5 + 4 * 4) + 8  # biases, norm, and its int64 count
    assert size_in_bytes(network) == 4 * sum(weights) + others
    assert size_in_bytes(network, bits=8) == sum(weights) + 4 * (4 + 5) + others
    assert size_in_bytes(network, bits=8, axis=None) == sum(weights) + 4 * 2 + others
    assert size_in_bytes(network, bits=3) == math.ceil(108 * 3 / 8) + 80 * 3 // 8 + 4 * (4 + 5) + others
    assert size_in_bytes(network, ["3.weight"], bits=8) == 4 * 108 + 80 + 4 * 5 + others
    assert size_in_bytes(network.state_dict()) == size_in_bytes(network)


def test_a_shared_weight_is_counted_once() -> None:
    first, second = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
    second.weight = first.weight
    assert size_in_bytes(nn.Sequential(first, second)) == 4 * 36


def test_accuracy_is_that_of_a_copy() -> None:
    network = _network()
    before = network[0].weight.detach().clone()

    def evaluate(module: nn.Module) -> float:
        assert not module.training
        assert torch.equal(module[0].weight, quantized_weights(network, bits=2)["0.weight"])
        assert torch.equal(module[3].bias, network[3].bias)
        return 0.25

    assert quantized_accuracy(network, evaluate, bits=2) == 0.25
    assert torch.equal(network[0].weight, before)


def test_no_integers_for_what_is_not_finite() -> None:
    with pytest.raises(ValueError, match="w has values that are not finite and cannot be quantised"):
        quantized_weights({"w": torch.tensor([[1.0, math.inf]])})
