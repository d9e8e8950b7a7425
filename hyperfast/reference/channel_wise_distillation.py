"""Channel-wise distillation (arXiv 2011.13256) between pairs of feature maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hyperfast.reference.reduction import accumulator, laid_out_as


def factor(features: Tensor, temperature: float) -> float:
    """What the sum of the channels' divergences is multiplied by: T^2 / (B C)."""
    return temperature**2 / max(features.shape[0] * features.shape[1], 1)


def _divergences(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(p_t || p_s) `[B, C]`; never the logarithm of a softmax, which may be 0."""
    log_s, log_t = ((x.flatten(2) / temperature).log_softmax(-1) for x in (student, teacher.detach()))
    return (log_t.exp() * (log_t - log_s)).sum(-1)


def channel_wise_distillation(student: Sequence[Tensor], teacher: Sequence[Tensor], temperature: float) -> Tensor:
    """Losses `[L]` of all taps: T^2 times the mean over samples and channels of KL(p_t || p_s)."""
    pairs = zip(student, teacher, strict=True)
    return torch.stack([_divergences(s, t, temperature).sum() * factor(s, temperature) for s, t in pairs])


def channel_wise_distillation_forward(
    student: Sequence[Tensor], teacher: Sequence[Tensor], temperature: float, expected_grad: Tensor | None = None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Losses `[L]`, no measures; with `expected_grad` `[L]` also the gradients for just that."""
    dtype = accumulator(student)
    losses = channel_wise_distillation([s.to(dtype) for s in student], [t.to(dtype) for t in teacher], temperature)
    gradients: list[Tensor] = []
    if expected_grad is not None:
        gradients = channel_wise_distillation_backward(expected_grad, student, teacher, temperature)
    return losses, losses.new_empty(0), gradients


def channel_wise_distillation_backward(
    grad: Tensor, student: Sequence[Tensor], teacher: Sequence[Tensor], temperature: float
) -> list[Tensor]:
    """dL/dF_s = grad_l T / (B C) (p_s - p_t), one tensor per tap."""
    gradients = []
    for g, s, t in zip(grad, student, teacher, strict=True):
        p_s, p_t = ((x.to(grad.dtype).flatten(2) / temperature).softmax(-1) for x in (s, t))
        gradient = (p_s - p_t) * (g * factor(s, temperature) / temperature)
        gradients.append(laid_out_as(gradient, s))
    return gradients
