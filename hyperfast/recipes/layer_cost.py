"""What each layer of a network and its inherited layer cost on this machine: operations and time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hyperfast.nn import InheritedConv2d, InheritedLinear
from hyperfast.nn.cost import median_ms
from hyperfast.surgery.modes import eval_mode

WHOLE = "whole network"


@dataclass(frozen=True)
class LayerCost:
    """A layer before and after.

    Attributes:
        name: dotted path; `WHOLE` for the network.
        flops: operations per image before, two for a multiplication and an addition; of the network: those of all
            convolution and linear layers.
        inherited_flops: the same after; equal where the layer was left.
        ms: median milliseconds of a forward pass of the batch before.
        inherited_ms: the same after; equal where the layer was left, which is not measured twice.
    """

    name: str
    flops: int
    inherited_flops: int
    ms: float
    inherited_ms: float


@torch.no_grad()
def layer_costs(
    before: nn.Module, after: nn.Module, images: Tensor, names: Sequence[str], repeats: int = 5
) -> tuple[LayerCost, ...]:
    """Measure layers one by one, on inputs of the shapes that they have in the network, and the whole networks.

    Args:
        before: the network that was inherited from.
        after: what was made of it.
        images: a batch, on the device of both; networks are timed in eval mode, one call first that does not count.
        names: of the layers; those that the network does not call are left out.
        repeats: calls of each, of whose times the median is taken.

    Returns:
        The layers in the order of `names`, and the network last.
    """
    with eval_mode(before, after):
        inputs = _inputs(before, names, images)
        rows = []
        for name, x in inputs.items():
            old, new = before.get_submodule(name), after.get_submodule(name)
            flops, ms = _flops(old, x), median_ms(partial(old, x), x.device, repeats)
            if not isinstance(new, InheritedConv2d | InheritedLinear):
                rows.append(LayerCost(name, flops, flops, ms, ms))
                continue
            inherited_ms = median_ms(partial(new, x), x.device, repeats)
            rows.append(LayerCost(name, flops, _flops(new, x), ms, inherited_ms))
        times = [median_ms(partial(model, images), images.device, repeats) for model in (before, after)]
    total = LayerCost(WHOLE, sum(row.flops for row in rows), sum(row.inherited_flops for row in rows), *times)
    return (*rows, total)


def _inputs(model: nn.Module, names: Sequence[str], images: Tensor) -> dict[str, Tensor]:
    """Something in the shape of what each layer sees the first time: the values take no time."""
    shapes: dict[str, torch.Size] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            shapes.setdefault(name, args[0].shape)

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return {name: images.new_ones(shapes[name]) for name in names if name in shapes}


def _flops(layer: nn.Module, x: Tensor) -> int:
    """Per image."""
    places = _places(layer, x)
    if not isinstance(layer, InheritedConv2d | InheritedLinear):
        weight: Tensor = layer.weight  # type: ignore[assignment]
        return 2 * weight.numel() * places
    experts, gate = 2 * layer.experts.numel(), 2 * layer.gate.weight.numel()
    down = _flops(layer.down, x)
    if isinstance(layer, InheritedLinear):
        return down + places * (gate + experts)
    mixing = experts if layer.heads > 1 else 0
    return down + gate + mixing + 2 * layer.outputs * layer.rank * places


def _places(layer: nn.Module, x: Tensor) -> int:
    """Positions of a convolution's output, or rows of a linear layer, per image."""
    if isinstance(layer, nn.Linear | InheritedLinear):
        return x.shape[:-1].numel() // len(x)
    output: Tensor = layer(x)
    return output.shape[2:].numel()
