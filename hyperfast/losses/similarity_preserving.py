"""Similarity preserving (arXiv 1907.09682)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hyperfast import functional
from hyperfast.losses.base import CompressedTeacherLoss, Features, feature_maps

if TYPE_CHECKING:
    from torch import Tensor


class SimilarityPreserving(CompressedTeacherLoss):
    r"""Samples that are alike to the teacher become alike to the student.

    With the samples of a map flattened to the rows of X, :math:`G = X X^T`, and U that with every row divided by its
    norm:

    .. math::
        L = \frac{1}{B^2} \| U_s - U_t \|_F^2

    Args:
        weights: of the taps, see `FeatureLoss`; default 1 / L.
        beta: of the whole loss, see there.

    Shape:
        Maps `[B, ...]`, float16 to float64; all axes but the first may differ between the networks. Result: a scalar,
        float32 (float64 for float64 maps). `compress` gives `[L, B, B]`.

    Notes:
        Everyone uses beta = 3000, with the last map of both networks (mdistiller; RepDistiller the one before it) or,
        with the mean over the taps that is the default here, the ends of the stages (Knowledge-Distillation-Zoo). A
        shift of the maps changes the loss, a factor does not, nor does the order of the batch; who is in the batch
        does, so that gathered over processes it is another loss: keep `drop_last=True`, and the batch of the paper.
        Rows of dead samples have no gradient.

    Example:
        >>> distillation = SimilarityPreserving(beta=3000)
        >>> loss = F.cross_entropy(logits, labels) + distillation(taps.student, taps.teacher)

    Source: Tung and Mori, arXiv 1907.09682; RepDistiller's code. See `hyperfast.functional.similarity_preserving`.
    """

    def per_tap(self, student: Sequence[Tensor], teacher: Sequence[Tensor], expected_grad: Tensor) -> Tensor:
        """Losses `[L]` of all taps."""
        return functional.similarity_preserving(student, teacher)

    def per_tap_of_statistics(self, student: Sequence[Tensor], statistics: Tensor, expected_grad: Tensor) -> Tensor:
        """Losses `[L]` of all taps."""
        return functional.similarity_preserving(student, statistics=statistics)

    def compress(self, teacher: Features) -> Tensor:
        """U of all taps, `[L, B, B]`."""
        return functional.similarity_statistics(feature_maps(teacher))
