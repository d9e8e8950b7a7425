"""HyperLight from its package (`pip install hyperlight==0.0.5`), loaded with given parameters."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn


def prepare() -> None:
    """Import the package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import hyperlight  # noqa: F401


def hypernet(
    shapes: Mapping[str, tuple[int, ...]],
    trunk_weights: Sequence[Tensor],
    trunk_biases: Sequence[Tensor],
    head: Tensor,
    theta0: Tensor,
) -> Any:
    """HyperLight's own `HyperNet` with one input `h` of width 1. The tensors are shared with it, not copied."""
    import hyperlight

    net = hyperlight.HyperNet(
        input_shapes={"h": (1,)},
        output_shapes={name: tuple(shape) for name, shape in shapes.items()},
        hidden_sizes=[weight.shape[0] for weight in trunk_weights],
    )
    layers = [layer for layer in net.backbone if isinstance(layer, nn.Linear)]
    values = [*zip(trunk_weights, trunk_biases, strict=True), (head, theta0)]
    for layer, (weight, bias) in zip(layers, values, strict=True):
        layer.weight.data, layer.bias.data = weight.detach(), bias.detach()
    return net


def parameters(net: Any) -> dict[str, Tensor]:
    """Its parameters by our names: head, theta0, weight0, bias0, ..."""
    *hidden, output = [layer for layer in net.backbone if isinstance(layer, nn.Linear)]
    named = {"head": output.weight, "theta0": output.bias}
    for level, layer in enumerate(hidden):
        named |= {f"weight{level}": layer.weight, f"bias{level}": layer.bias}
    return named


def hypernetize(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Any:
    """Replace, in place, the parameters of all modules of `kinds` by slots for generated tensors."""
    import hyperlight

    found = hyperlight.find_modules_of_type(model, list(kinds))
    return hyperlight.hypernetize(model, modules=list(found.values()))
