"""Activation boundary (arXiv 1811.03233)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hyperfast import functional
from hyperfast.losses.base import CompressedTeacherLoss, Features, Weights, feature_maps

if TYPE_CHECKING:
    from torch import Tensor

_OFFICIAL_SCALE = 3 / 1000


class ActivationBoundary(CompressedTeacherLoss):
    r"""The student's neurons are active where the teacher's are, by a margin.

    With t = 1 where :math:`F_t > 0`, else -1, over the E elements of a map of B samples:

    .. math::
        L_{mean} = \frac{1}{E} \sum \max(0, m - t F_s)^2, \qquad
        L_{batch} = \frac{1}{B} \sum \max(0, m - t F_s)^2 = \frac{E}{B} L_{mean}

    Args:
        margin: m > 0.
        reduction: `"mean"` over the elements, or `"batch"`, the sum per sample. With the latter, maps of many elements
            weigh more.
        halving: the authors' weights where none are given: 3/1000 for the deepest tap, and for every tap half of what
            the next one has. `ActivationBoundary(reduction="batch", halving=True)` is their total. Over many taps the
            first ones then weigh nothing: 2^-36 of the last among 37.
        weights: of the taps, see `FeatureLoss`; default 1 / L.
        beta: of the whole loss, see there.

    Attributes:
        mismatch: the share of elements on the other side of zero `[L]` of the last forward, still on the device: what
            the loss is a smooth stand-in for.

    Shape:
        Pre-activation maps `[B, ...]`, float16 to float64, student's and teacher's of one shape; or the teacher's
        packed by `compress`, one bit per element. Result: a scalar, float32 (float64 for float64 maps).

    Notes:
        Tap the inputs of the activations. After them the student cannot get below zero: each of its inactive elements
        has the loss :math:`m^2` and no gradient through the activation. A ReLU6 has a second boundary at 6, which is
        none here.

        Invariant to the scale of the teacher's maps; not to that of the student's, nor to any shift. A map compared
        with itself has the loss 0 only where all :math:`|F_s| \ge m`.

        beta = 10 with `"mean"` is Knowledge-Distillation-Zoo's (with a margin of 2), and about the authors' for a tap
        of 3,000 elements.

    Example:
        >>> boundary = ActivationBoundary(beta=10)
        >>> with hyperfast.taps(student, teacher, at="activations") as taps:
        ...     ...
        >>> loss = F.cross_entropy(logits, labels) + boundary(taps.student, taps.teacher)

    Source: Heo et al., arXiv 1811.03233, and the official code (bhheo/AB_distillation), which trains by this loss alone
    first. The ImageNet variant there has 1/1000 for 3/1000.
    """

    per_sample = True

    def __init__(
        self,
        margin: float = 1.0,
        reduction: str = "mean",
        *,
        halving: bool = False,
        weights: Weights | None = None,
        beta: float = 1.0,
    ) -> None:
        super().__init__(weights, beta)
        if halving and weights is not None:
            raise ValueError("weights were given and halving is on, which gives the weights itself; leave out one")
        self.margin, self.reduction, self.halving = margin, reduction, halving
        self.mismatch: Tensor | None = None

    def per_tap(self, student: Sequence[Tensor], teacher: Sequence[Tensor], expected_grad: Tensor) -> Tensor:
        """Losses `[L]` of all taps, in one launch."""
        losses, self.mismatch = functional.activation_boundary(
            student, teacher, margin=self.margin, reduction=self.reduction, expected_grad=expected_grad
        )
        return losses

    def per_tap_of_statistics(
        self, student: Sequence[Tensor], statistics: Sequence[Tensor], expected_grad: Tensor
    ) -> Tensor:
        """Losses `[L]` of all taps, in one launch."""
        return self.per_tap(student, statistics, expected_grad)

    def compress(self, teacher: Features) -> list[Tensor]:
        """Where the teacher is active, uint8 `[B, ceil(M / 8)]` per tap (`functional.pack_signs`)."""
        return functional.pack_signs(feature_maps(teacher))

    def default_weights(self, count: int) -> list[float]:
        """A mean, or the halves."""
        if not self.halving:
            return super().default_weights(count)
        return [_OFFICIAL_SCALE / 2**distance for distance in reversed(range(count))]

    def extra_repr(self) -> str:
        return f"margin={self.margin}, reduction={self.reduction!r}" + (", halving=True" if self.halving else "")
