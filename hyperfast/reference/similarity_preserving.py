"""Similarity preserving (arXiv 1907.09682): which samples of a batch are alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hyperfast.reference.gram import gram

EPS = 1e-12
"""Rows of a Gram matrix of a smaller norm count as zero: dead samples."""


def similarity_matrix(features: Tensor) -> Tensor:
    """U `[B, B]`: the Gram matrix of the samples with every row divided by its norm."""
    return _unit_rows(gram(features, centred=False))[0]


def similarity_statistics(features: Sequence[Tensor]) -> Tensor:
    """U `[L, B, B]` of every map."""
    return torch.stack([similarity_matrix(f) for f in features])


def similarity_preserving(
    student: Sequence[Tensor], teacher: Sequence[Tensor], statistics: Tensor | None = None
) -> Tensor:
    """Losses `[L]` of all taps: ||U_s - U_t||_F^2 / B^2. `statistics` are the teacher's U, in place of its maps."""
    losses = []
    for s, v in zip(student, _teacher(teacher, statistics), strict=True):
        difference = similarity_matrix(s) - v
        losses.append(difference.square().sum() / max(difference.numel(), 1))  # an empty batch has no loss
    return torch.stack(losses)


def similarity_preserving_forward(
    student: Sequence[Tensor], teacher: Sequence[Tensor], statistics: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Losses `[L]` and, for the backward pass, M = dL/dG `[L, B, B]`.

    With E = 2 (U_s - U_t) / B^2 and r_i = ||G_i||: M_i = (E_i - U_i (U_i . E_i)) / r_i.
    """
    losses, coefficients = [], []
    for s, v in zip(student, _teacher(teacher, statistics), strict=True):
        u, norm = _unit_rows(gram(s, centred=False))
        difference = u - v
        count = max(difference.numel(), 1)
        losses.append(difference.square().sum() / count)
        e = 2 * difference / count
        along = e - u * (u * e).sum(1, keepdim=True)
        coefficients.append(torch.where(norm <= EPS, 0, along / norm))
    return torch.stack(losses), torch.stack(coefficients)


def _unit_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    squared = matrix.square().sum(1, keepdim=True)
    dead = squared.sqrt().detach() <= EPS
    # The norm of a zero row has no gradient; the row stays zero instead.
    norm = torch.where(dead, 1, squared).sqrt()
    return torch.where(dead, 0, matrix / norm), torch.where(dead, 0, norm)


def _teacher(teacher: Sequence[Tensor], statistics: Tensor | None) -> list[Tensor]:
    if statistics is not None:
        return list(statistics.detach())
    return [similarity_matrix(t.detach()) for t in teacher]
