"""Distance between samples scaled to norm 1: factor transfer (arXiv 1802.04977), NeRN's feature maps (2212.13554)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hyperfast.reference.reduction import accumulator, divisor, laid_out_as


def _norm(rows: Tensor) -> Tensor:
    """L2 norms `[B, 1]`; that of a zero row has no gradient, taken as zero."""
    squared = rows.square().sum(1, keepdim=True)
    alive = squared > 0
    return torch.where(alive, squared, 1).sqrt() * alive


def unit_distance_tap(student: Tensor, teacher: Tensor, p: int, eps: float, added: bool, reduction: str) -> Tensor:
    """Sum of |u - v|^p over the elements or the batch; u and v are the samples by their norms.

    `added`: by norm + eps. Otherwise a sample of which either norm is at most eps is left out.
    """
    s, t = student.flatten(1), teacher.detach().flatten(1)
    norm_s, norm_t = _norm(s), _norm(t)
    if added:
        difference = s / (norm_s + eps) - t / (norm_t + eps)
    else:
        dead = (norm_s <= eps) | (norm_t <= eps)
        difference = torch.where(dead, 0, s / torch.where(dead, 1, norm_s) - t / torch.where(dead, 1, norm_t))
    return (difference.abs() if p == 1 else difference.square()).sum() / divisor(student, reduction)


def unit_distance(
    student: Sequence[Tensor], teacher: Sequence[Tensor], p: int, eps: float, added: bool, reduction: str
) -> Tensor:
    """Losses `[L]` of all taps."""
    return torch.stack(
        [unit_distance_tap(s, t, p, eps, added, reduction) for s, t in zip(student, teacher, strict=True)]
    )


def unit_distance_forward(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    p: int,
    eps: float,
    added: bool,
    reduction: str,
    expected_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Losses `[L]`, no measures; with `expected_grad` `[L]` also the gradients for just that."""
    dtype = accumulator(student)
    losses = unit_distance([s.to(dtype) for s in student], [t.to(dtype) for t in teacher], p, eps, added, reduction)
    gradients: list[Tensor] = []
    if expected_grad is not None:
        gradients = unit_distance_backward(expected_grad, student, teacher, p, eps, added, reduction)
    return losses, losses.new_empty(0), gradients


def unit_distance_backward(
    grad: Tensor,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    p: int,
    eps: float,
    added: bool,
    reduction: str,
) -> list[Tensor]:
    """With d the divisor of u and w = dL/du: dL/dF_s = (w - u (u . w) d / ||F_s||) / d, one tensor per tap."""
    gradients = []
    for g, student_map, teacher_map in zip(grad, student, teacher, strict=True):
        s, t = student_map.flatten(1).to(grad.dtype), teacher_map.flatten(1).to(grad.dtype)
        norm_s, norm_t = _norm(s), _norm(t)
        dead = torch.zeros_like(norm_s, dtype=torch.bool) if added else (norm_s <= eps) | (norm_t <= eps)
        by_s = torch.where(dead, 1, norm_s + eps if added else norm_s)
        by_t = torch.where(dead, 1, norm_t + eps if added else norm_t)
        u = s / by_s
        difference = u - t / by_t
        w = (difference.sign() if p == 1 else 2 * difference) * g / divisor(student_map, reduction)
        along = (u * w).sum(1, keepdim=True) * torch.where(norm_s > 0, by_s / torch.where(norm_s > 0, norm_s, 1), 1)
        gradient = torch.where(dead, 0, (w - u * along) / by_s)
        gradients.append(laid_out_as(gradient, student_map))
    return gradients
