"""One step of Ranger: RAdam with centralised gradients, decoupled weight decay and Lookahead."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ranger_update(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    slow: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    k: int,
    alpha: float,
    centralize: bool,
) -> None:
    """Change parameters and state in place. The arithmetic has the state's dtype, the scalars are float64."""
    for p, g, m, v, s, step in zip(parameters, gradients, exp_avg, exp_avg_sq, slow, steps, strict=True):
        step += 1
        g = g.to(m.dtype)
        if centralize and g.ndim >= 2 and g.numel():
            g = g - g.mean(tuple(range(1, g.ndim)), keepdim=True)
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        t = step.double()
        rectification, rectified = _rectification(t, beta2)
        rate = lr / (1 - beta1**t)
        fast = p.to(m.dtype) * (1 - lr * weight_decay)
        fast = fast - torch.where(rectified, rate * rectification * (m / (v.sqrt() + eps)), rate * m)
        meet = t % k == 0
        s.copy_(torch.where(meet, s + alpha * (fast - s), s))
        p.copy_(torch.where(meet, s, fast))


def _rectification(t: Tensor, beta2: float) -> tuple[Tensor, Tensor]:
    """RAdam's r sqrt(1 - beta2^t), and whether the variance is known well enough (rho > 5) to divide by it."""
    power = beta2**t
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * t * power / (1 - power)
    rectified = rho > 5
    rho = torch.where(rectified, rho, 6)  # any number at which the root exists
    ratio = (rho - 4) * (rho - 2) / rho * (rho_inf / ((rho_inf - 4) * (rho_inf - 2))) if rho_inf > 5 else rho
    return ((1 - power) * ratio).sqrt(), rectified
