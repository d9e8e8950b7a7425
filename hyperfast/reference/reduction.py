"""How a sum over the elements of a map is taken, how it becomes a loss, and how its gradient lies in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

REDUCTIONS = ("mean", "batch")


def divisor(features: Tensor, reduction: str) -> int:
    """What the sum over `features` is divided by: its elements (`mean`) or its samples (`batch`), at least 1."""
    return max(features.numel() if reduction == "mean" else len(features), 1)


def accumulator(maps: Sequence[Tensor]) -> torch.dtype:
    """The dtype of the sums over `maps`: float64 as soon as one of them is, else float32."""
    return torch.float64 if any(features.dtype == torch.float64 for features in maps) else torch.float32


def laid_out_as(gradient: Tensor, features: Tensor) -> Tensor:
    """`gradient`, which may be flattened, as `torch.empty_like(features)` lies: shape, dtype and strides."""
    return torch.empty_like(features).copy_(gradient.view(features.shape))
