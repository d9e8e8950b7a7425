"""Attention transfer (arXiv 1612.03928) between pairs of feature maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MODES = ("code", "paper", "zoo")


def attention_map(features: Tensor, p: int, mode: str, eps: float) -> Tensor:
    """Unit attention map `[B, N]` of `features` `[B, C, *spatial]`: |F|^p over the channels, L2-normalised.

    `code` takes the channel mean and divides by max(norm, eps); `paper` takes the sum; `zoo` takes the sum and
    divides by norm + eps.
    """
    power = features.abs().pow(p).flatten(2)
    energy = power.mean(1) if mode == "code" else power.sum(1)
    # The norm of an all-zero map has no gradient; taken as zero, so that a dead layer stays finite.
    squared = energy.square().sum(-1, keepdim=True)
    alive = squared > 0
    norm = torch.where(alive, squared, 1).sqrt() * alive
    return energy / (norm + eps if mode == "zoo" else norm.clamp_min(eps))


def attention_transfer_tap(student: Tensor, teacher: Tensor, p: int, mode: str, eps: float) -> Tensor:
    """Loss of one pair of maps: `code`, `zoo` mean((u - v)^2); `paper` mean over the batch of ||u - v||."""
    difference = attention_map(student, p, mode, eps) - attention_map(teacher.detach(), p, mode, eps)
    if mode != "paper":
        return difference.square().sum() / max(difference.numel(), 1)  # an empty batch has no loss
    squared = difference.square().sum(-1)
    apart = squared > 0
    return (torch.where(apart, squared, 1).sqrt() * apart).sum() / max(len(squared), 1)


def attention_transfer(
    student: Sequence[Tensor], teacher: Sequence[Tensor], p: int, mode: str, eps: float
) -> Tensor:
    """Losses `[L]` of all taps."""
    return torch.stack(
        [attention_transfer_tap(s, t, p, mode, eps) for s, t in zip(student, teacher, strict=True)]
    )


def attention_transfer_forward(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    p: int,
    mode: str,
    eps: float,
    expected_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Losses `[L]` and, for the backward pass, dL/dQ of every position of every tap, flat `[sum(B * N)]`.

    With `expected_grad` `[L]` also the gradients that the backward pass will return if it gets just that.

    With w = dL/du and n = ||Q||: dL/dQ = (w - u (u . w)) / n (`code`, `paper`) or
    (w - Q (Q . w) / (n (n + eps))) / (n + eps) (`zoo`); times p / C (`code`) or p, so that
    dL/dF = coefficient |F|^(p-1) sign(F).
    """
    dtype = torch.promote_types(torch.float32, student[0].dtype)
    losses, coefficients = [], []
    for s, t in zip(student, teacher, strict=True):
        s, t = s.to(dtype), t.to(dtype)
        losses.append(attention_transfer_tap(s, t, p, mode, eps))
        coefficients.append(_coefficients(s, t, p, mode, eps).flatten())
    gradients: list[Tensor] = []
    if expected_grad is not None:
        gradients = attention_transfer_backward(expected_grad, student, torch.cat(coefficients), p)
    return torch.stack(losses), torch.cat(coefficients), gradients


def _coefficients(student: Tensor, teacher: Tensor, p: int, mode: str, eps: float) -> Tensor:
    power = student.abs().pow(p).flatten(2)
    energy = power.mean(1) if mode == "code" else power.sum(1)
    # As in attention_map: equal maps must cancel to the last bit, `paper` has no gradient where u = v.
    norm = energy.square().sum(-1, keepdim=True).sqrt()
    divisor = norm + eps if mode == "zoo" else norm.clamp_min(eps)
    u = energy / divisor
    difference = u - attention_map(teacher, p, mode, eps)
    if mode == "paper":
        distance = difference.norm(dim=-1, keepdim=True)
        w = torch.where(distance > 0, difference / (distance * len(student)), 0)
    else:
        w = 2 * difference / max(difference.numel(), 1)
    along = (u * w).sum(-1, keepdim=True)
    if mode == "zoo":
        along = along * divisor / norm
    gradient = torch.where(norm > (0 if mode == "zoo" else eps), (w - u * along) / divisor, 0)
    return gradient * (p / student.shape[1] if mode == "code" else p)


def attention_transfer_backward(
    grad: Tensor, student: Sequence[Tensor], coefficients: Tensor, p: int
) -> list[Tensor]:
    """dL/dF = grad_l * coefficient[b, n] * |F|^(p-1) sign(F), one tensor per tap."""
    sizes = [s.shape[0] * s.shape[2:].numel() for s in student]
    gradients = []
    for g, s, flat in zip(grad, student, coefficients.split(sizes), strict=True):
        scale = (g * flat).view(s.shape[0], 1, *s.shape[2:])
        gradients.append((scale * s.to(scale.dtype).abs().pow(p - 1) * s.sign()).to(s.dtype))
    return gradients
