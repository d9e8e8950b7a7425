"""Gram matrices of the samples of a batch: what similarity preserving and the relational losses see of a map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gram(features: Tensor, centred: bool) -> Tensor:
    """G = X X^T `[B, B]` of the samples X `[B, D]`, flattened from `[B, ...]`.

    `centred`: less their mean first, and summed in float64, since relations are differences of the elements of G.
    """
    rows = flatten(features, centred)
    if not centred:
        return rows @ rows.t()
    wide = rows.double()
    return (wide @ wide.t()).to(rows.dtype)


def flatten(features: Tensor, centred: bool) -> Tensor:
    """The samples `[B, D]` in at least float32; `centred`: less their mean."""
    rows = features.to(torch.promote_types(torch.float32, features.dtype)).flatten(1)
    return rows - rows.mean(0, keepdim=True) if centred else rows


def gram_backward(grad: Tensor, student: Sequence[Tensor], coefficients: Tensor, centred: bool) -> list[Tensor]:
    """dX = grad_l (M + M^T) X of every tap, M = `coefficients[l]` = dL/dG.

    Centring has no part of its own in the derivative: where X is centred, so is M + M^T, whose rows sum to 0.
    """
    gradients = []
    for g, m, s in zip(grad, coefficients, student, strict=True):
        rows = flatten(s, centred)
        product = (g * (m + m.t())).to(rows.dtype) @ rows
        gradients.append(torch.empty_like(s).copy_(product.view(s.shape)))
    return gradients
