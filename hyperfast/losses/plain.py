"""What the losses that run as torch operations share: their arithmetic, and how they read maps, tokens and rows."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from hyperfast.losses.base import FeatureLoss

_EPS = 1e-12  # rows of a smaller norm count as zero


class PlainFeatureLoss(FeatureLoss):
    """A `FeatureLoss` that is a formula over one tap at a time, computed by torch's own operations.

    The formula sees the maps in float32 (float64 for float64), also under autocast.
    """

    @abstractmethod
    def of_pair(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The unweighted loss of one tap, a scalar, of maps that are float32 or float64."""

    def per_tap(self, student: Sequence[Tensor], teacher: Sequence[Tensor], expected_grad: Tensor) -> Tensor:
        """Losses `[L]` of all taps."""
        losses = []
        for s, t in zip(student, teacher, strict=True):
            dtype = torch.promote_types(torch.float32, s.dtype)
            with torch.autocast(s.device.type, enabled=False):
                losses.append(self.of_pair(s.to(dtype), t.to(dtype)))
        return torch.stack(losses)


def as_map(features: Tensor) -> Tensor:
    """Tokens `[B, N, D]` as the map `[B, D, h, w]` of a square image, h = w; maps `[B, C, H, W]` as they are.

    N is h w, or h w + 1 where a class token comes first, which is left out.

    Raises:
        ValueError: neither of the two; a number of tokens that no square image has.
    """
    if features.ndim == 4:
        return features
    if features.ndim != 3:
        raise ValueError(f"a map is {list(features.shape)}; expected [B, C, H, W], or tokens [B, N, D]")
    batch, count, width = features.shape
    classes = class_tokens(count)
    side = math.isqrt(count - classes)
    return features[:, classes:].transpose(1, 2).reshape(batch, width, side, side)


def class_tokens(count: int) -> int:
    """How many of so many tokens are no patches of a square image: 0, or the class token in front, 1.

    Raises:
        ValueError: no square image has so many.
    """
    for classes in (0, 1):
        side = math.isqrt(max(count - classes, 0))
        if side and side * side == count - classes:
            return classes
    raise ValueError(
        f"a map has {count} tokens; expected those of a square image, h * h, or h * h + 1 with a class token in front"
    )


def as_vectors(features: Tensor) -> Tensor:
    """`[B, D]`: the mean over the positions of a map `[B, D, H, W]`, or over all tokens `[B, N, D]`.

    A class token is one of them. Vectors stay as they are.
    """
    if features.ndim == 2:
        return features
    return features.mean(1) if features.ndim == 3 else features.flatten(2).mean(2)


def unit_rows(x: Tensor) -> Tensor:
    """The last axis divided by its norm; a row of a norm up to 1e-12 becomes zeros without a gradient."""
    squared = x.square().sum(-1, keepdim=True)
    dead = squared.sqrt().detach() <= _EPS
    # The norm of a zero row has no gradient; the row stays zero instead.
    return torch.where(dead, 0, x / torch.where(dead, 1, squared).sqrt())


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosines `[..., N, M]` between the rows of `[..., N, D]` and `[..., M, D]`; 0 for a row of zeros."""
    return unit_rows(a) @ unit_rows(b).mT
