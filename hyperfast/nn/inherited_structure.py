"""Which layers of a network are inherited ones, and how to build the same network again without its teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hyperfast.nn.inherited import GateInput, InheritedConv2d, InheritedLinear

_GEOMETRY = ("stride", "padding", "dilation", "padding_mode")


def like(layer: Any, rank: int, heads: int, gate_input: GateInput) -> InheritedConv2d | InheritedLinear:
    """An inherited layer of the shape, device and dtype of `layer`, freshly initialised."""
    bias = layer.bias is not None
    new: InheritedConv2d | InheritedLinear
    if isinstance(layer, nn.Conv2d):
        geometry: Any = {name: getattr(layer, name) for name in _GEOMETRY}
        size: Any = layer.kernel_size
        channels = layer.in_channels, layer.out_channels
        new = InheritedConv2d(*channels, size, rank, heads, bias=bias, gate_input=gate_input, **geometry)
    else:
        new = InheritedLinear(layer.in_features, layer.out_features, rank, heads, bias, gate_input)
    return new.to(layer.weight.device, layer.weight.dtype)


def inherited_layers(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What `build_inherited` needs of each inherited layer, by its dotted path; JSON."""
    return {
        name: {"rank": layer.rank, "heads": layer.heads, "gate_input": layer.gate_input}
        for name, layer in model.named_modules()
        if isinstance(layer, InheritedConv2d | InheritedLinear)
    }


def build_inherited(model: nn.Module, layers: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Put inherited layers in the place of layers of an ordinary network; in place.

    Args:
        model: of the architecture that was inherited from; its weights do not matter.
        layers: `inherited_layers` of the network that is to be built; with `"folded": True` as `fold` leaves it, two
            plain layers.

    Returns:
        `model`, with layers whose weights are to be loaded.

    Raises:
        ValueError: `model` has no such convolution or linear layer.
    """
    found = dict(model.named_modules())
    for name, values in layers.items():
        layer = found.get(name)
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            kind = "no such layer" if layer is None else f"a {type(layer).__name__} there"
            raise ValueError(f"{name!r} is to be inherited, but this {type(model).__name__} has {kind}")
        new = like(layer, values["rank"], values["heads"], values["gate_input"]).train(layer.training)
        replace_module(model, name, new.fold() if values.get("folded") else new)
    return model


def check_gates(model: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Raise a ValueError where the gates in `tensors` have another width than those of the network.

    Args:
        model: an inherited network.
        tensors: that are to be loaded, by their names in it.
        origin: of the tensors, for the message.
    """
    for name, layer in model.named_modules():
        gate = tensors.get(f"{name}.gate.weight")
        if not isinstance(layer, InheritedConv2d | InheritedLinear) or gate is None:
            continue
        if gate.shape != layer.gate.weight.shape:
            heads, width = layer.gate.weight.shape
            raise ValueError(
                f"{origin}: the gate of layer {name!r} is {list(gate.shape)}; rank {layer.rank}, {heads} heads and "
                f"gate_input={layer.gate_input!r} make it [{heads}, {width}]. The weights are of a network with other "
                "ranks, heads or gates"
            )


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` at a dotted path."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
