"""Losses between feature maps as RepDistiller computes them: one map after the other, in eager operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
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


def similarity_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Sum over the taps of the mean squared difference of the Gram matrices with rows of unit norm."""
    losses = [
        (_unit_gram(t) - _unit_gram(s)).square().sum() / len(s) ** 2 for s, t in zip(student, teacher, strict=True)
    ]
    return torch.stack(losses).sum()


def _unit_gram(features: Tensor) -> Tensor:
    rows = features.view(len(features), -1)
    return F.normalize(rows @ rows.t())


def relational_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Sum over the taps of 25 times the Huber loss of distances and 50 times that of angles."""
    losses = []
    for s, t in zip(student, teacher, strict=True):
        rows, rows_t = s.view(len(s), -1), t.view(len(t), -1)
        with torch.no_grad():
            distances_t, angles_t = distances(rows_t), _angles(rows_t)
        of_distances = F.smooth_l1_loss(distances(rows), distances_t)
        losses.append(25 * of_distances + 50 * F.smooth_l1_loss(_angles(rows), angles_t))
    return torch.stack(losses).sum()


def distances(rows: Tensor) -> Tensor:
    """Distances of all pairs of samples, divided by the mean of the positive ones: those between different samples."""
    squares = rows.square().sum(1)
    found = (squares[:, None] + squares[None, :] - 2 * rows @ rows.t()).clamp(min=1e-12).sqrt()
    found = found * (1 - torch.eye(len(rows), dtype=rows.dtype, device=rows.device))
    return found / (found.sum() / (len(rows) * (len(rows) - 1)))


def _angles(rows: Tensor) -> Tensor:
    """Cosines at all vertices, from all differences of two samples: a tensor of B x B x D."""
    arms = F.normalize(rows[None] - rows[:, None], dim=2)
    return torch.bmm(arms, arms.transpose(1, 2))


def flow_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Sum over pairs of taps of the mean squared difference of their matrices, by a broadcast product."""

    def matrix(maps: Sequence[Tensor], i: int, j: int) -> Tensor:
        first, second = maps[i].flatten(2).unsqueeze(1), maps[j].flatten(2).unsqueeze(2)
        return (first * second).mean(-1)

    return torch.stack([(matrix(student, *p) - matrix(teacher, *p)).square().mean() for p in pairs]).sum()
