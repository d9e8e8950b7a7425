"""Run one model under several sets of weights, each on its own group of samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map


def apply_groups(
    model: nn.Module, weights: dict[str, Tensor], groups: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Outputs of `model` for all samples, group g of them run under `weights[name][g]`.

    Args:
        model: whose parameters the weights replace.
        weights: by name, each `[B, ...]`; a shared parameter under all of its names.
        groups: B.
        args: positional arguments; the tensors among them with as many rows as the first are cut into groups.
        kwargs: go to every group whole.

    Returns:
        What the model returns, tensors `[N, ...]` in the order of the samples; a tensor that the model reduces to a
        scalar comes back as `[B]`, one per group.

    Raises:
        ValueError: no tensor to cut, or N not a multiple of B.
    """
    tensors = [arg for arg in args if isinstance(arg, Tensor) and arg.ndim > 0]
    if not tensors:
        raise ValueError(
            f"{groups} conditions are applied to groups of samples, but there is no positional tensor argument to cut "
            "into groups; pass the model's input as the first positional argument"
        )
    samples = tensors[0].shape[0]
    if samples % groups:
        raise ValueError(
            f"{samples} samples cannot be cut into {groups} equal groups, one per condition; give a number of "
            f"conditions that divides {samples}"
        )
    cut = [isinstance(arg, Tensor) and arg.ndim > 0 and arg.shape[0] == samples for arg in args]
    parts = tuple(
        arg.reshape(groups, samples // groups, *arg.shape[1:]) if is_cut else arg
        for arg, is_cut in zip(args, cut, strict=True)
    )
    if _must_run_in_turn(model):
        return _in_turn(model, weights, groups, parts, cut, kwargs)

    def run(own: dict[str, Tensor], *inputs: Any) -> Any:
        return functional_call(model, own, inputs, kwargs, tie_weights=False)

    in_dims = (0, *(0 if is_cut else None for is_cut in cut))
    outputs = torch.func.vmap(run, in_dims=in_dims, randomness="different")(weights, *parts)
    return tree_map(lambda x: x.flatten(0, 1) if x.ndim > 1 else x, outputs)


def _in_turn(
    model: nn.Module,
    weights: dict[str, Tensor],
    groups: int,
    parts: tuple[Any, ...],
    cut: list[bool],
    kwargs: dict[str, Any],
) -> Any:
    outputs = []
    rows = {name: weight.unbind() for name, weight in weights.items()}
    for group in range(groups):
        own = {name: row[group] for name, row in rows.items()}
        inputs = tuple(part[group] if is_cut else part for part, is_cut in zip(parts, cut, strict=True))
        outputs.append(functional_call(model, own, inputs, kwargs, tie_weights=False))
    return tree_map(_join, *outputs)


def _join(*tensors: Any) -> Any:
    if not isinstance(tensors[0], Tensor):
        return tensors[0]
    return torch.cat(tensors) if tensors[0].ndim else torch.stack(tensors)


def _must_run_in_turn(model: nn.Module) -> bool:
    """Running statistics are updated in place, which vmap cannot do; a hook would be handed vmap's own tensors."""
    return any(
        module._forward_hooks
        or module._forward_pre_hooks
        or (
            isinstance(module, nn.modules.batchnorm._NormBase)
            and module.training
            and module.track_running_stats
            and module.running_mean is not None
        )
        for module in model.modules()
    )
