"""Flow of the solution procedure (FSP; Yim et al., CVPR 2017): how the maps of one tap lead to those of another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EPS = 1e-12
"""A teacher's matrix of a smaller norm cannot be divided by it: the sample then has no loss."""
REDUCTIONS = ("mean", "sum")


def flow_matrix(first: Tensor, second: Tensor) -> Tensor:
    """G = F1 F2^T / N `[B, C1, C2]` of maps `[B, C1, *spatial]` and `[B, C2, *spatial]` with N positions."""
    first, second = (f.to(torch.promote_types(torch.float32, f.dtype)).flatten(2) for f in (first, second))
    return torch.bmm(first, second.transpose(1, 2)) / first.shape[2]


def flow_statistics(maps: Sequence[Tensor], pairs: Sequence[int]) -> list[Tensor]:
    """G of every pair of maps; `pairs` is flat: first, second, first, second, ..."""
    return [flow_matrix(maps[i], maps[j]) for i, j in _pairs(pairs)]


def flow_of_solution(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    statistics: Sequence[Tensor],
    pairs: Sequence[int],
    reduction: str,
    normalize: bool,
) -> Tensor:
    """Losses `[P]` of all pairs of maps. `statistics` are the teacher's G, in place of its maps.

    The mean over B, C1 and C2 of (G_s - G_t)^2, or (`sum`) the mean over B of the sum of a sample; `normalize`: of
    every sample by ||G_t||_F^2.
    """
    losses = []
    targets = _teacher(teacher, statistics, pairs)
    for own, target in zip(flow_statistics(student, pairs), targets, strict=True):
        losses.append((_scales(target, reduction, normalize) * (own - target).square().sum((1, 2))).sum())
    return torch.stack(losses)


def flow_of_solution_forward(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    statistics: Sequence[Tensor],
    pairs: Sequence[int],
    reduction: str,
    normalize: bool,
    expected_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Losses `[P]` and, for the backward pass, G_s - G_t of every pair, flat, and the factors `[P, B]` of its squares.

    With `expected_grad` `[P]` the gradients that the backward pass will return if it gets just that, and no
    differences.
    """
    losses, differences, scales = [], [], []
    targets = _teacher(teacher, statistics, pairs)
    for own, target in zip(flow_statistics(student, pairs), targets, strict=True):
        difference = own - target
        scales.append(_scales(target, reduction, normalize))
        losses.append((scales[-1] * difference.square().sum((1, 2))).sum())
        differences.append(difference.flatten())
    flat, factors = torch.cat(differences), torch.stack(scales)
    if expected_grad is None:
        return torch.stack(losses), flat, factors, []
    gradients = flow_of_solution_backward(expected_grad, student, flat, factors, pairs)
    return torch.stack(losses), flat[:0], factors, gradients


def flow_of_solution_backward(
    grad: Tensor, student: Sequence[Tensor], differences: Tensor, scales: Tensor, pairs: Sequence[int]
) -> list[Tensor]:
    """dF1 = R F2 / N and dF2 = R^T F1 / N with R = 2 grad_p scale_b (G_s - G_t), added up over the pairs of a map."""
    wide = [s.to(torch.promote_types(torch.float32, s.dtype)).flatten(2) for s in student]
    gradients = [torch.zeros_like(s) for s in wide]
    start = 0
    for g, scale, (i, j) in zip(grad, scales, _pairs(pairs), strict=True):
        first, second = wide[i], wide[j]
        batch, rows, columns = first.shape[0], first.shape[1], second.shape[1]
        difference = differences[start : start + batch * rows * columns].view(batch, rows, columns)
        start += difference.numel()
        r = (2 * g / first.shape[2] * scale)[:, None, None] * difference
        gradients[i] = gradients[i] + torch.bmm(r, second)
        gradients[j] = gradients[j] + torch.bmm(r.transpose(1, 2), first)
    return [torch.empty_like(s).copy_(d.view(s.shape)) for d, s in zip(gradients, student, strict=True)]


def _scales(target: Tensor, reduction: str, normalize: bool) -> Tensor:
    """The factor `[B]` of every sample's sum of squares."""
    batch, rows, columns = target.shape
    count = max(batch, 1) * (rows * columns if reduction == "mean" else 1)
    scales = target.new_full((batch,), 1 / count)
    if not normalize:
        return scales
    squared = target.square().sum((1, 2))
    return torch.where(squared <= EPS**2, 0, scales / squared)


def _teacher(teacher: Sequence[Tensor], statistics: Sequence[Tensor], pairs: Sequence[int]) -> list[Tensor]:
    if statistics:
        return [g.detach() for g in statistics]
    return flow_statistics([t.detach() for t in teacher], pairs)


def _pairs(flat: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(flat[::2], flat[1::2], strict=True))
