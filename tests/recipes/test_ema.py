from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hyperfast.recipes.ema import AveragedWeights


def test_the_average_follows_the_formula_with_its_warm_up() -> None:
    model = nn.Linear(2, 2, bias=False)
    average = AveragedWeights(model, 0.3)
    expected = model.weight.detach().clone()
    for count in range(6):
        with torch.no_grad():
            model.weight.add_(1.0)
        average.update(model)
        decay = min(0.3, (1 + count) / (10 + count))
        expected = decay * expected + (1 - decay) * model.weight.detach()
        assert torch.allclose(average.module.weight, expected)


def test_running_statistics_are_averaged_and_counters_copied() -> None:
    model = nn.BatchNorm1d(2)
    average = AveragedWeights(model, 0.5)
    for _ in range(3):
        model(torch.randn(8, 2) + 3)
        average.update(model)
    assert average.module.num_batches_tracked == 3
    assert not torch.equal(average.module.running_mean, model.running_mean)


def test_a_restored_average_continues_alike() -> None:
    model = nn.Linear(3, 3)
    average = AveragedWeights(model, 0.9)
    for _ in range(3):
        with torch.no_grad():
            model.weight.mul_(1.1)
        average.update(model)
    restored = AveragedWeights(copy.deepcopy(model), 0.9)
    restored.load_state_dict(average.state_dict())
    for each in (average, restored):
        each.update(model)
    assert torch.equal(average.module.weight, restored.module.weight)


def test_decay_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"ema decay is 1\.0; it must be in \[0, 1\)"):
        AveragedWeights(nn.Linear(1, 1), 1.0)
