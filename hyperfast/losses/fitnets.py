"""FitNets (arXiv 1412.6550)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hyperfast import functional
from hyperfast.losses.base import FeatureLoss, Weights

if TYPE_CHECKING:
    from torch import Tensor


class FitNets(FeatureLoss):
    r"""The student's feature maps are the teacher's, element by element.

    Over the E elements of a map of B samples, with :math:`\sigma^2 = 1` or the variance of the teacher's map:

    .. math::
        L_{mean} = \frac{1}{E \sigma^2} \| F_s - F_t \|_2^2, \qquad
        L_{batch} = \frac{1}{2 B \sigma^2} \| F_s - F_t \|_2^2 = \frac{E}{2B} L_{mean}

    Args:
        normalize: `"none"`, or `"teacher"`: by the variance of each teacher's map, so that the taps of a network weigh
            alike. A constant map has no scale: its tap has loss and gradient 0.
        reduction: `"mean"` over the elements, or `"batch"`, the paper's half of the sum per sample.
        weights: of the taps, see `FeatureLoss`; default 1 / L.
        beta: of the whole loss, see there.

    Shape:
        Maps `[B, ...]`, float16 to float64, student's and teacher's of one shape: a student of another width needs a
        regressor (the paper's is a convolution), which is trained with it. Result: a scalar, float32 (float64 for
        float64 maps).

    Notes:
        Zero, with zero gradient, for a map compared with itself. Not invariant to scale or shift of one map; to a
        common shift of both, and with `normalize="teacher"` also to a common scale.

        beta is 100 in RepDistiller (`"mean"`, one tap in the middle) and 0.1 in Knowledge-Distillation-Zoo; with
        `normalize="teacher"` 1 is a start.

    Source: Romero et al., arXiv 1412.6550: one hint, trained by itself first. RepDistiller and others add the mean to
    the cross-entropy.
    """

    def __init__(
        self,
        normalize: str = "none",
        reduction: str = "mean",
        weights: Weights | None = None,
        beta: float = 1.0,
    ) -> None:
        super().__init__(weights, beta)
        self.normalize, self.reduction = normalize, reduction

    def per_tap(self, student: Sequence[Tensor], teacher: Sequence[Tensor], expected_grad: Tensor) -> Tensor:
        """Losses `[L]` of all taps, in one launch."""
        return functional.fitnets(
            student, teacher, normalize=self.normalize, reduction=self.reduction, expected_grad=expected_grad
        )

    def extra_repr(self) -> str:
        return f"normalize={self.normalize!r}, reduction={self.reduction!r}"
