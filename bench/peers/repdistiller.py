"""Attention transfer as RepDistiller computes it: one map after the other, in eager operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def attention_map(features: Tensor) -> Tensor:
    """`[B, N]`: channel mean of the squares, of unit L2 norm."""
    return F.normalize(features.pow(2).mean(1).view(features.shape[0], -1))


def attention_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Sum over the taps of the mean squared difference of the attention maps."""
    losses = [(attention_map(s) - attention_map(t)).pow(2).mean() for s, t in zip(student, teacher, strict=True)]
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss
    return total
