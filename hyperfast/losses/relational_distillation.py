"""Relational knowledge distillation (arXiv 1904.05068)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hyperfast import functional
from hyperfast.losses.base import CompressedTeacherLoss, Features, Weights, feature_maps

if TYPE_CHECKING:
    from torch import Tensor


class RelationalDistillation(CompressedTeacherLoss):
    r"""The samples of a batch keep the teacher's distances and angles.

    With :math:`d_{ij}` the distance of two samples, :math:`\mu` its mean, :math:`\psi_{ijk}` the cosine of the angle
    at sample j between samples i and k, and h the Huber loss (smooth L1, beta 1):

    .. math::
        L = \frac{w_d}{B^2} \sum_{ij} h\left( \frac{d^s_{ij}}{\mu_s} - \frac{d^t_{ij}}{\mu_t} \right) +
            \frac{w_a}{B^3} \sum_{ijk} h\left( \psi^s_{ijk} - \psi^t_{ijk} \right)

    Args:
        distance: :math:`w_d`; 0 leaves the term out.
        angle: :math:`w_a`; 0 leaves the term out.
        normalize: divide every sample by its L2 norm first, the form of the authors' classification script.
        weights: of the taps, see `FeatureLoss`; default 1 / L.
        beta: of the whole loss, see there.

    Shape:
        Maps `[B, ...]` with B at least 2, float16 to float64; all axes but the first may differ between the networks.
        Result: a scalar, float32 (float64 for float64 maps). `compress` gives `[L, B, B]`.

    Notes:
        beta = 1 with the default weights 25 and 50 is what the authors' classification script, RepDistiller,
        mdistiller and Knowledge-Distillation-Zoo use, on the pooled embedding before the classifier; torchdistill and
        the authors' metric learning use 1 and 2. A factor or a shift of the maps changes nothing, nor does the order
        of the batch; two samples alone have loss 0. The angles are B^3: at a batch of 128 two million per network and
        tap.

    Example:
        >>> distillation = RelationalDistillation()
        >>> loss = F.cross_entropy(logits, labels) + distillation([embedding], [teacher_embedding])

    Source: Park et al., arXiv 1904.05068; lenscloth/RKD. See `hyperfast.functional.relational_distance_angle`.
    """

    def __init__(
        self,
        distance: float = 25.0,
        angle: float = 50.0,
        normalize: bool = False,
        weights: Weights | None = None,
        beta: float = 1.0,
    ) -> None:
        super().__init__(weights, beta)
        self.distance, self.angle, self.normalize = distance, angle, normalize

    def per_tap(self, student: Sequence[Tensor], teacher: Sequence[Tensor], expected_grad: Tensor) -> Tensor:
        """Losses `[L]` of all taps."""
        return functional.relational_distance_angle(
            student, teacher, distance=self.distance, angle=self.angle, normalize=self.normalize
        )

    def per_tap_of_statistics(self, student: Sequence[Tensor], statistics: Tensor, expected_grad: Tensor) -> Tensor:
        """Losses `[L]` of all taps."""
        return functional.relational_distance_angle(
            student, statistics=statistics, distance=self.distance, angle=self.angle, normalize=self.normalize
        )

    def compress(self, teacher: Features) -> Tensor:
        """Gram matrices of the samples less their mean, of all taps, `[L, B, B]`."""
        return functional.relational_statistics(feature_maps(teacher), normalize=self.normalize)

    def extra_repr(self) -> str:
        return f"distance={self.distance}, angle={self.angle}" + (", normalize=True" if self.normalize else "")
