"""The optimiser, its parameter groups, and its state as named tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from hyperfast.nn import Hypernetwork
from hyperfast.optim import cannot_factor, factor_head
from hyperfast.recipes.config import TrainConfig

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def build_optimizer(modules: nn.Module, config: TrainConfig, rates: Mapping[str, float] | None = None) -> Optimizer:
    """SGD or AdamW over every parameter of `modules` that is trained.

    Each group carries `base_lr`, which the schedule multiplies. Heads of hypernetworks are updated from the factors of
    their gradients where that is wanted and can be done.

    Args:
        modules: what is trained.
        config: settings.
        rates: learning rates by parameter name, where they are known from a checkpoint (`base_lrs`).

    Raises:
        ValueError: there is nothing to train.
    """
    parameters = trainable(modules)
    if not parameters:
        raise ValueError(
            "no parameter of the model wants a gradient: there is nothing to train. "
            "Were all of them frozen with requires_grad_(False)?"
        )
    if rates is None:
        rates = _base_lrs(modules, config)
    undecayed = set() if config.decay_norm_and_bias else set(_norm_and_bias(modules))
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decay = 0.0 if parameter in undecayed else config.weight_decay
        groups.setdefault((rates[name], decay), []).append(parameter)
    options = [{"params": p, "base_lr": lr, "weight_decay": decay} for (lr, decay), p in groups.items()]
    # Fused: one pass over weights, gradients and state, instead of one per arithmetic operation.
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters.values())
    optimizer: Optimizer
    if config.optimizer == "adamw":
        optimizer = AdamW(options, lr=config.lr, fused=fused)
    else:
        optimizer = SGD(options, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused)
    for module in modules.modules() if config.factored_head else ():
        if isinstance(module, Hypernetwork) and cannot_factor(module, optimizer) is None:
            factor_head(module, optimizer)
    return optimizer


def trainable(modules: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that want a gradient or are updated without one of their own, by name; shared ones by their first."""
    factored = {
        module.head.weight
        for module in modules.modules()
        if isinstance(module, Hypernetwork) and module.head_gradient_is_factored
    }
    return {
        name: parameter
        for name, parameter in modules.named_parameters()
        if parameter.requires_grad or parameter in factored
    }


def check_all_trained(optimizer: Optimizer, modules: nn.Module) -> None:
    """Raise a RuntimeError unless the optimizer has every parameter of `modules` that is trained."""
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, parameter in trainable(modules).items() if parameter not in held]
    if missing:
        raise RuntimeError(
            f"{len(missing)} parameters are not in the optimizer and would never be trained, such as {missing[0]!r}: "
            "whatever an objective trains is to be among its modules from the start"
        )


def set_lr(optimizer: Optimizer, factor: float) -> None:
    """Set the learning rate of each group to `factor` times its `base_lr`."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["base_lr"]


def base_lrs(optimizer: Optimizer, modules: nn.Module) -> dict[str, float]:
    """The `base_lr` of every parameter by name: a hypernetwork's depends on the weights it started from."""
    names = {parameter: name for name, parameter in trainable(modules).items()}
    return {names[p]: group["base_lr"] for group in optimizer.param_groups for p in group["params"]}


def optimizer_state(optimizer: Optimizer, modules: nn.Module) -> dict[str, Tensor]:
    """The optimiser's state as tensors called `<parameter>/<state>`."""
    return {
        f"{name}/{key}": value
        for name, parameter in trainable(modules).items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def restore_optimizer_state(optimizer: Optimizer, modules: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Continue from `optimizer_state`; tensors get the device and memory layout of their parameter.

    Raises:
        ValueError: the state is of a parameter that is not here.
    """
    parameters = trainable(modules)
    optimizer.state.clear()
    for full_name, value in state.items():
        name, _, key = full_name.rpartition("/")
        if name not in parameters:
            raise ValueError(f"the checkpoint has optimizer state of {name!r}, which is no trainable parameter here")
        parameter = parameters[name]
        if value.shape == parameter.shape and key != "step":
            restored = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        else:
            # AdamW counts its steps on the device only if it is fused there; Ranger always does.
            restored = value.to(parameter.device if optimizer.defaults.get("fused", True) else "cpu", copy=True)
        optimizer.state[parameter][key] = restored.detach()


def _base_lrs(modules: nn.Module, config: TrainConfig) -> dict[str, float]:
    """`config.lr` for every parameter, but for hypernetworks what their step factors make of it."""
    kind = "adam" if config.optimizer == "adamw" else "sgd"
    slow: dict[nn.Parameter, float] = {}
    for module in modules.modules() if config.step_factors else ():
        if isinstance(module, Hypernetwork):
            for group in module.parameter_groups(config.lr, optimizer=kind):
                slow.update(dict.fromkeys(group["params"], group["lr"]))
    return {name: slow.get(parameter, config.lr) for name, parameter in trainable(modules).items()}


def _norm_and_bias(modules: nn.Module) -> Iterator[nn.Parameter]:
    for module in modules.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, _NORMS) or name.endswith("bias"):
                yield parameter
