"""What is said about gates and heads."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hyperfast.nn import InheritedConv2d, InheritedLinear, gate_diagnostics


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = InheritedConv2d(3, 4, 3, rank=2, heads=2)
        self.single = InheritedConv2d(4, 4, 1, rank=2, heads=1)
        self.fc = InheritedLinear(4, 5, rank=2, heads=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(self.single(self.conv(x)).mean((2, 3)))
        return logits


def batches() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(size, 3, 6, 6) for size in (4, 7)]


@torch.no_grad()
def test_uniform_gates_and_equal_heads() -> None:
    model = Net()
    for layer in (model.conv, model.fc):
        nn.init.zeros_(layer.gate.weight)
        nn.init.zeros_(layer.gate.bias)
        layer.experts.copy_(layer.experts[:1].expand_as(layer.experts).clone())
    rows = gate_diagnostics(model.train(), batches())
    assert model.training and [row.name for row in rows] == ["conv", "fc"]
    for row in rows:
        assert (row.entropy, row.usage, row.similarity) == pytest.approx((1, 1, 1))


@torch.no_grad()
def test_gates_that_decide_and_heads_that_differ() -> None:
    model = Net()
    nn.init.zeros_(model.conv.gate.weight)
    model.conv.gate.bias.copy_(torch.tensor([100.0, 0.0]))
    model.conv.experts.copy_(torch.stack([torch.ones(4, 2), -torch.ones(4, 2)]))
    conv, fc = gate_diagnostics(model, batches())
    assert (conv.entropy, conv.usage, conv.similarity) == pytest.approx((0, 0, -1), abs=1e-6)
    seen = torch.cat([model.single(model.conv(batch)).mean((2, 3)) for batch in batches()])
    gates = model.fc.gate(model.fc.down(seen)).softmax(1)
    assert fc.entropy == pytest.approx(float(-(gates * gates.log()).sum(1).mean()) / math.log(3), rel=1e-5)
    mean = gates.mean(0)
    assert fc.usage == pytest.approx(float(-(mean * mean.log()).sum()) / math.log(3), rel=1e-5)
    heads = nn.functional.normalize(model.fc.experts.flatten(1), dim=1)
    pairs = [float(heads[i] @ heads[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert fc.similarity == pytest.approx(sum(pairs) / 3, rel=1e-5)


def test_no_batch() -> None:
    with pytest.raises(ValueError, match="batches is empty; give at least one"):
        gate_diagnostics(Net(), [])
