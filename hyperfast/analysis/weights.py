"""The weights of a network, by name: what every analysis of them starts from."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

Weights: TypeAlias = "nn.Module | Mapping[str, Tensor]"

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def parameters(weights: Weights, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """The floating point parameters of a module or of a state dict, without gradients.

    Args:
        weights: of a state dict, the running statistics of norms are left out, as a module's buffers are.
        names: those to take; default all.

    Raises:
        ValueError: a name that is not there.
    """
    if isinstance(weights, nn.Module):
        found = {name: p.detach() for name, p in weights.named_parameters() if p.is_floating_point()}
    else:
        found = {
            name: tensor.detach()
            for name, tensor in weights.items()
            if tensor.is_floating_point() and name.rpartition(".")[2] not in _STATISTICS
        }
    return found if names is None else _chosen(found, names)


def matrices(weights: Weights, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """As `parameters`; default those of two or more dimensions: neither biases nor norms.

    Raises:
        ValueError: a name that is not there, a tensor of fewer dimensions, or nothing at all.
    """
    found = parameters(weights, names)
    if names is None:
        found = {name: tensor for name, tensor in found.items() if tensor.ndim >= 2}
    for name, tensor in found.items():
        if tensor.ndim < 2:
            raise ValueError(f"{name} is {list(tensor.shape)}; expected a weight of two or more dimensions")
    if not found:
        raise ValueError("there is no weight of two or more dimensions to look at")
    return found


def pairs(
    first: Weights, second: Weights, names: Sequence[str] | None = None, *, vectors: bool = False
) -> dict[str, tuple[Tensor, Tensor]]:
    """The weights of two networks side by side, as `matrices` (`vectors`: as `parameters`) selects those of the first.

    Raises:
        ValueError: the second has no tensor of a name, or one of another shape.
    """
    mine = (parameters if vectors else matrices)(first, names)
    theirs = parameters(second, list(mine))
    for name, tensor in mine.items():
        if theirs[name].shape != tensor.shape:
            raise ValueError(
                f"{name} is {list(tensor.shape)} in one network and {list(theirs[name].shape)} in the other; "
                "compare networks of one architecture"
            )
    return {name: (tensor, theirs[name].to(tensor.device)) for name, tensor in mine.items()}


def changed(first: Weights, others: Sequence[Weights]) -> list[str]:
    """Names of the `matrices` of the first that differ in any of the others; all of them where none does."""
    differing = {
        name for other in others for name, (a, b) in pairs(first, other).items() if not torch.equal(a, b.to(a.dtype))
    }
    names = list(matrices(first))
    return [name for name in names if name in differing] or names


class Workpiece:
    """A copy of a network whose weights may be exchanged; the network itself is never touched.

    Args:
        module: what is copied.

    Attributes:
        module: the copy, in eval mode.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = copy.deepcopy(module).eval()
        self._parameters = dict(self.module.named_parameters())

    @torch.no_grad()
    def put(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """Copy `weights` into the module by name, and return it."""
        for name, tensor in weights.items():
            self._parameters[name].copy_(tensor)
        return self.module


def _chosen(found: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    missing = [name for name in names if name not in found]
    if missing:
        listing = ", ".join(list(found)[:20]) + (", ..." if len(found) > 20 else "")
        raise ValueError(f"there is no parameter {missing[0]!r}; there are {listing or 'none'}")
    return {name: found[name] for name in names}
