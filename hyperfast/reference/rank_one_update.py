"""Steps of SGD and Adam on a matrix whose gradient is an outer product."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def outer(left: Tensor, right: Tensor, offsets: Tensor | None) -> Tensor:
    """The gradient `[P, H]` itself: left[p] right[s(p), :], with offsets[s(p)] <= p < offsets[s(p) + 1]."""
    if offsets is None:
        return left[:, None] * right
    segment = torch.bucketize(torch.arange(len(left), device=left.device), offsets[1:], right=True)
    return left[:, None] * right[segment]


def sgd_rank_one(
    weight: Tensor,
    momentum_buffer: Sequence[Tensor],
    left: Tensor,
    right: Tensor,
    offsets: Tensor | None,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    """`torch.optim.SGD`'s step, in place; the buffer is left out without momentum."""
    gradient = outer(left, right, offsets)
    if weight_decay:
        gradient.add_(weight, alpha=weight_decay)
    for buffer in momentum_buffer:
        buffer.mul_(momentum).add_(gradient, alpha=1 - dampening)
        gradient = gradient.add_(buffer, alpha=momentum) if nesterov else buffer
    weight.sub_(gradient, alpha=lr)


def adam_rank_one(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    left: Tensor,
    right: Tensor,
    offsets: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    step: int,
) -> None:
    """`torch.optim.Adam`'s step number `step`, from 1 on, in place; `decoupled` makes it AdamW's."""
    gradient = outer(left, right, offsets)
    if decoupled:
        weight.mul_(1 - lr * weight_decay)
    elif weight_decay:
        gradient.add_(weight, alpha=weight_decay)
    exp_avg.mul_(beta1).add_(gradient, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = exp_avg_sq.sqrt() / math.sqrt(1 - beta2**step) + eps
    weight.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))
