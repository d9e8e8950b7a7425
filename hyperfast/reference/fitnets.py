"""FitNets' hint loss (arXiv 1412.6550) between pairs of feature maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hyperfast.reference.reduction import accumulator, divisor

NORMALIZATIONS = ("none", "teacher")


def factor(features: Tensor, reduction: str) -> float:
    """What the sum of squares is multiplied by: 1 / elements (`mean`) or 1 / 2 B (`batch`)."""
    return (1.0 if reduction == "mean" else 0.5) / divisor(features, reduction)


def _scale(teacher: Tensor, normalize: bool) -> Tensor:
    """1 / variance of the map; 0 where that is constant, and 1 where nothing is normalised."""
    if not normalize:
        return teacher.new_ones(())
    # The first element is exactly the mean of a constant map.
    deviation = teacher - teacher.flatten()[:1].sum()
    variance = (deviation - deviation.sum() / max(deviation.numel(), 1)).square().sum() / max(teacher.numel(), 1)
    return torch.where(variance == 0, 0, 1 / variance)


def fitnets(
    student: Sequence[Tensor], teacher: Sequence[Tensor], normalize: bool, reduction: str
) -> tuple[Tensor, Tensor]:
    """Losses `[L]` of all taps and the factors `[L]`, 1 / variance of the teacher's maps, that they have in them."""
    losses, scales = [], []
    for s, t in zip(student, teacher, strict=True):
        scales.append(_scale(t.detach(), normalize))
        losses.append((s - t.detach()).square().sum() * factor(s, reduction) * scales[-1])
    return torch.stack(losses), torch.stack(scales)


def fitnets_forward(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    normalize: bool,
    reduction: str,
    expected_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Losses and factors `[L]`; with `expected_grad` `[L]` also the gradients for just that."""
    dtype = accumulator(student)
    losses, scales = fitnets([s.to(dtype) for s in student], [t.to(dtype) for t in teacher], normalize, reduction)
    gradients: list[Tensor] = []
    if expected_grad is not None:
        gradients = fitnets_backward(expected_grad * scales, student, teacher, normalize, reduction)
    return losses, scales, gradients


def fitnets_backward(
    grad: Tensor, student: Sequence[Tensor], teacher: Sequence[Tensor], normalize: bool, reduction: str
) -> list[Tensor]:
    """dL/dF_s = 2 grad_l (F_s - F_t) / (elements or 2 B), one tensor per tap. The factors are in `grad` already."""
    return [
        (2 * g * factor(s, reduction) * (s.to(grad.dtype) - t.to(grad.dtype))).to(s.dtype)
        for g, s, t in zip(grad, student, teacher, strict=True)
    ]
