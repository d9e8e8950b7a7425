"""Hidden channels in an order in which neighbours are alike: smoothness that costs no bits."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hyperfast import functional
from hyperfast.surgery.channels import Group, Use, channel_groups


@dataclass(frozen=True, eq=False)
class RelabelledGroup:
    """Channels that were given a new order.

    Attributes:
        order: int64 `[C]`, the former channel at each place.
        writers: the layers whose outputs they are.
        tensors: names of everything that was reordered with them.
    """

    order: Tensor
    writers: tuple[str, ...]
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class KeptGroup:
    """Channels that had to stay as they were.

    Attributes:
        writers: the layers whose outputs they are.
        reason: what stands in the way.
    """

    writers: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Relabelling:
    """What `relabel` did; `str()` gives one line per group.

    Attributes:
        groups: what was reordered.
        kept: what was not, and why.
    """

    groups: tuple[RelabelledGroup, ...]
    kept: tuple[KeptGroup, ...]

    def __str__(self) -> str:
        lines = [f"{len(g.order)} channels of {', '.join(g.writers)}: relabelled" for g in self.groups]
        return "\n".join([*lines, *(f"channels of {', '.join(k.writers)}: kept, {k.reason}" for k in self.kept)])


def relabel(module: nn.Module) -> tuple[nn.Module, Relabelling]:
    """A copy of `module` that computes the same function, with its hidden channels in a smoother order.

    The filters that write a channel, their biases, the norms and depthwise convolutions in between, and the layers
    that read it are reordered together, so that a predictor of weights meets similar neighbours without a stored
    permutation. Channels that are added to each other (residual streams) are reordered as one.

    The order is a greedy chain from channel 0; similarity is the sum, over all weights that the channels run through,
    of the cosine of their slices.

    Args:
        module: a module that `torch.fx` can trace.

    Returns:
        The copy, whose outputs agree to rounding, and what was done. Parameters keep their names and shapes. Random
        dropout masks fall on other channels.

    Raises:
        ValueError: the module cannot be traced; a weight is NaN or infinite.

    Notes:
        Channels are followed through what `channel_groups` lists. Concatenation, reshaping, indexing, attention and
        grouped convolutions are barriers, whose channels are kept. Nothing is run: a BatchNorm1d behind a linear
        layer is taken to normalise the layer's features, as it does on `[B, C]`.
    """
    groups = [group for group in channel_groups(module) if _writers(group)]
    free = [group for group in groups if not _reason(group)]
    result = copy.deepcopy(module)
    tensors = {**dict(result.named_parameters(remove_duplicate=False)), **dict(result.named_buffers())}
    for group in free:
        for use in group.uses:
            if not tensors[use.tensor].isfinite().all():
                raise ValueError(f"{use.tensor} has NaN or infinite entries, which no order can place")
    orders = functional.greedy_chain([_slices(group, tensors) for group in free])
    with torch.no_grad():
        for group, order in zip(free, orders, strict=True):
            for use in group.uses:
                tensor = tensors[use.tensor]
                tensor.copy_(_by_channel(tensor, use, group).index_select(use.dim, order).reshape(tensor.shape))
    return result, Relabelling(
        tuple(
            RelabelledGroup(order, _writers(group), tuple(dict.fromkeys(use.tensor for use in group.uses)))
            for group, order in zip(free, orders, strict=True)
        ),
        tuple(KeptGroup(_writers(group), reason) for group in groups if (reason := _reason(group))),
    )


def _writers(group: Group) -> tuple[str, ...]:
    return tuple(dict.fromkeys(use.tensor.rpartition(".")[0] for use in group.uses if use.writes))


def _reason(group: Group) -> str:
    if group.barriers:
        return group.barriers[0]
    return "" if any(not use.writes for use in group.uses) else "nothing reads them"


def _by_channel(tensor: Tensor, use: Use, group: Group) -> Tensor:
    grouped: Tensor = tensor.unflatten(use.dim, (group.channels, use.spread))
    return grouped


def _slices(group: Group, tensors: dict[str, Tensor]) -> Tensor:
    """`[C, D]`: what belongs to each channel of each weight, as unit vectors one after the other."""
    weights = [use for use in group.uses if tensors[use.tensor].ndim > 1]
    slices = [_by_channel(tensors[use.tensor], use, group).movedim(use.dim, 0).flatten(1) for use in weights]
    return torch.cat([nn.functional.normalize(s.detach().double(), dim=1, eps=1e-300) for s in slices], 1)
