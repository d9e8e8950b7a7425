from __future__ import annotations

import pytest
import tiny_task
import torch
from torch import nn

from hyperfast.nn import Hypernetwork, hypernetize
from hyperfast.recipes.optim import (
    base_lrs,
    build_optimizer,
    check_all_trained,
    optimizer_state,
    restore_optimizer_state,
    set_lr,
    trainable,
)


def named_groups(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, dict[str, float]]:
    names = {parameter: name for name, parameter in module.named_parameters()}
    return {names[p]: group for group in optimizer.param_groups for p in group["params"]}


def test_norms_and_biases_are_not_decayed() -> None:
    model = tiny_task.network()
    groups = named_groups(build_optimizer(model, tiny_task.config()), model)
    decayed = {name for name, group in groups.items() if group["weight_decay"]}
    assert groups.keys() == dict(model.named_parameters()).keys()
    assert decayed == {"layer1.0.weight", "layer2.0.weight", "head.1.weight"}
    everything = build_optimizer(model, tiny_task.config(decay_norm_and_bias=True))
    assert [group["weight_decay"] for group in everything.param_groups] == [5e-4]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_hypernetwork_steps_as_far_as_an_ordinary_network(optimizer: str) -> None:
    model = nn.ModuleDict({"model": hypernetize(tiny_task.network())})
    hypernetwork = model["model"]
    assert isinstance(hypernetwork, Hypernetwork)
    settings = tiny_task.config(optimizer=optimizer)
    rates = base_lrs(build_optimizer(model, settings), model)
    factor = hypernetwork.step_factors().sgd if optimizer == "sgd" else hypernetwork.step_factors().adam
    assert factor > 1.5
    assert rates["model.theta0"] == rates["model.head.weight"] == pytest.approx(settings.lr / factor)
    assert rates["model.trunk.0.weight"] == rates["model.primary.layer1.1.weight"] == settings.lr
    plain = base_lrs(build_optimizer(model, tiny_task.config(step_factors=False)), model)
    assert set(plain.values()) == {settings.lr}


def test_the_schedule_multiplies_every_groups_own_rate() -> None:
    model = hypernetize(tiny_task.network())
    optimizer = build_optimizer(model, tiny_task.config())
    set_lr(optimizer, 0.5)
    assert all(group["lr"] == 0.5 * group["base_lr"] for group in optimizer.param_groups)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_state_comes_back_by_name(optimizer: str) -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for index, parameter in enumerate(model.parameters()):
            parameter.grad = torch.full_like(parameter, 0.1 * (index + 1))
        optimizer.step()

    first, second = tiny_task.network(), tiny_task.network(seed=3)
    settings = tiny_task.config(optimizer=optimizer)
    one, two = build_optimizer(first, settings), build_optimizer(second, settings)
    step(first, one)
    second.load_state_dict(first.state_dict())
    state = optimizer_state(one, first)
    assert {name.rsplit("/", 1)[0] for name in state} == trainable(first).keys()
    restore_optimizer_state(two, second, state)
    step(first, one)
    step(second, two)
    for mine, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, other)
    with pytest.raises(ValueError, match="optimizer state of 'nothing', which is no trainable parameter"):
        restore_optimizer_state(two, second, {"nothing/momentum_buffer": torch.ones(1)})


def test_nothing_to_train() -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        build_optimizer(nn.ReLU(), tiny_task.config())


def test_a_parameter_that_came_too_late_is_named() -> None:
    model = tiny_task.network()
    optimizer = build_optimizer(model, tiny_task.config())
    check_all_trained(optimizer, model)
    model.late = nn.Linear(2, 2)
    model.layer1.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"2 parameters are not in the optimizer .* such as 'late.weight'"):
        check_all_trained(optimizer, model)
