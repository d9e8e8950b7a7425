"""Schedules as pure functions of the position in training: a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


def cosine_with_warmup(step: int, total: int, warmup: int = 0, final: float = 0.0) -> float:
    r"""Factor of the learning rate at a step.

    It rises linearly over the first `warmup` steps, `(step + 1) / (warmup + 1)`, then falls along half a cosine from
    1 to `final`, :math:`f + (1 - f)(1 + \cos(\pi s)) / 2`.

    Args:
        step: steps already made, 0 for the first one.
        total: steps of the whole run.
        warmup: steps of the linear rise.
        final: factor that would be reached at step `total`.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    share = (step - warmup) / max(1, total - warmup)
    return final + (1 - final) * (1 + math.cos(math.pi * min(share, 1.0))) / 2


def steps_with_warmup(step: int, total: int, warmup: int, shares: Sequence[float]) -> float:
    """Factor of the learning rate at a step: after the linear rise of `cosine_with_warmup` 1, and a tenth of that after
    each of `shares` of the whole run.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    factor: float = 0.1 ** sum(step >= share * total for share in shares)
    return factor


@dataclass(frozen=True)
class TapWeights:
    r"""The share lambda_l of each tap in a distillation loss; the shares of all taps sum to 1.

    `"uniform"`: :math:`\lambda_l = 1 / L`. `"travelling"`: a Gaussian that moves from the first tap to the last one,

    .. math::
        \lambda_l(t) \propto \lambda_{min} + (1 - \lambda_{min}) \exp(-(l - c(t))^2 / (2 \sigma^2)), \quad
        c(t) = t (L - 1)

    with t from 0 at the first step to 1 at the last one.

    Attributes:
        schedule: `"uniform"` or `"travelling"`.
        sigma: width of the Gaussian in taps.
        minimum: lambda_min in [0, 1], what a tap far from the centre keeps, before the shares are normalised.

    Source: the travelling Gaussian is reconstructed from a description of layer-wise distillation into hypernetworks
    (parameters sigma and lambda_min, over the layer index); its exact published form is not known.
    """

    schedule: Literal["uniform", "travelling"] = "uniform"
    sigma: float = 1.0
    minimum: float = 0.1

    def __post_init__(self) -> None:
        if self.schedule not in ("uniform", "travelling"):
            raise ValueError(f"tap weight schedule is {self.schedule!r}; choose 'uniform' or 'travelling'")
        if not self.sigma > 0:
            raise ValueError(f"sigma is {self.sigma}; it must be above 0")
        if not 0 <= self.minimum <= 1:
            raise ValueError(f"minimum is {self.minimum}; it must be in [0, 1]")

    def __call__(self, taps: int, progress: float, device: torch.device | None = None) -> Tensor:
        """float32 `[taps]` that sum to 1, at `progress` in [0, 1]; computed on `device` without waiting for it."""
        if self.schedule == "uniform":
            return torch.full((taps,), 1 / taps, device=device)
        distance = torch.arange(taps, dtype=torch.float32, device=device) - progress * (taps - 1)
        weights = self.minimum + (1 - self.minimum) * torch.exp(-(distance**2) / (2 * self.sigma**2))
        return weights / weights.sum()
