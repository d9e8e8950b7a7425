"""Activation boundary (arXiv 1811.03233) between pairs of feature maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hyperfast.reference.reduction import accumulator, divisor


def pack_signs(features: Tensor) -> Tensor:
    """Where `[B, *shape]` is positive: uint8 `[B, ceil(M / 8)]`, element 8 i + k of a sample in bit k of byte i."""
    active = features.flatten(1) > 0
    active = torch.nn.functional.pad(active, (0, -active.shape[1] % 8)).unflatten(1, (-1, 8))
    bits = torch.tensor([1 << k for k in range(8)], dtype=torch.uint8, device=features.device)
    packed: Tensor = (active * bits).sum(-1, dtype=torch.uint8)
    return packed


def is_active(student: Tensor, teacher: Tensor) -> Tensor:
    """Where the teacher's map is positive, in the shape of the student's; the teacher's may be packed."""
    if teacher.dtype != torch.uint8:
        return teacher > 0
    bits = torch.arange(8, dtype=torch.uint8, device=teacher.device)
    active = (teacher.unsqueeze(-1) >> bits & 1).flatten(1).bool()
    return active[:, : student[:1].numel()].reshape(student.shape)


def _hinge(student: Tensor, teacher: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """max(0, m - t F_s) and t."""
    sign = torch.where(is_active(student, teacher), 1, -1).to(student.dtype)
    return (margin - sign * student).clamp_min(0), sign


def activation_boundary(
    student: Sequence[Tensor], teacher: Sequence[Tensor], margin: float, reduction: str
) -> tuple[Tensor, Tensor]:
    """Losses `[L]` of all taps, sum max(0, m - t F_s)^2 over the elements or the batch, and the shares of mismatches.

    t is 1 where the teacher's map is positive, else -1; an element mismatches where the student's is not so too.
    """
    losses, mismatches = [], []
    for s, t in zip(student, teacher, strict=True):
        hinge, sign = _hinge(s, t, margin)
        losses.append(hinge.square().sum() / divisor(s, reduction))
        mismatches.append(((s > 0) != (sign > 0)).sum().to(s.dtype) / max(s.numel(), 1))
    return torch.stack(losses), torch.stack(mismatches)


def activation_boundary_forward(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    margin: float,
    reduction: str,
    expected_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Losses and mismatches `[L]`; with `expected_grad` `[L]` also the gradients for just that."""
    dtype = accumulator(student)
    losses, mismatches = activation_boundary([s.to(dtype) for s in student], teacher, margin, reduction)
    gradients: list[Tensor] = []
    if expected_grad is not None:
        gradients = activation_boundary_backward(expected_grad, student, teacher, margin, reduction)
    return losses, mismatches, gradients


def activation_boundary_backward(
    grad: Tensor, student: Sequence[Tensor], teacher: Sequence[Tensor], margin: float, reduction: str
) -> list[Tensor]:
    """dL/dF_s = -2 t max(0, m - t F_s) grad_l / (elements or batch), one tensor per tap."""
    gradients = []
    for g, s, t in zip(grad, student, teacher, strict=True):
        hinge, sign = _hinge(s.to(grad.dtype), t, margin)
        gradients.append((-2 * g / divisor(s, reduction) * sign * hinge).to(s.dtype))
    return gradients
