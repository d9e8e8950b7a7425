"""Flow of the solution procedure (FSP; Yim et al., CVPR 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hyperfast import functional
from hyperfast.functional.flow_of_solution import Pairs, check_pairs
from hyperfast.losses.base import CompressedTeacherLoss, Features, Weights, feature_maps

if TYPE_CHECKING:
    from torch import Tensor


class FlowOfSolution(CompressedTeacherLoss):
    r"""How the maps of one tap lead to those of another, as the teacher does it: one loss per pair of taps.

    With maps :math:`F_1` and :math:`F_2` of two taps as `[C1, N]` and `[C2, N]` of every sample b, N positions:

    .. math::
        G_b = \frac{1}{N} F_{1,b} F_{2,b}^T, \qquad L = \frac{1}{B C_1 C_2} \sum_b \| G^s_b - G^t_b \|_F^2

    Args:
        pairs: indices of taps; default those that follow each other: (0, 1), (1, 2), ...
        pool: `"avg"` or `"max"`, how the larger map of a pair is brought to the size of the smaller.
        reduction: `"mean"`, or `"sum"` over the elements of G, the paper's.
        normalize: divide every sample's term by :math:`\|G^t_b\|_F^2`.
        weights: of the pairs, see `FeatureLoss`, by names such as `"layer1>layer2"`; default 1 / P.
        beta: of the whole loss, see there.

    Shape:
        Maps `[B, C, *spatial]`, float16 to float64, with equal C in both networks; spatial sizes may differ. Result: a
        scalar, float32 (float64 for float64 maps). `compress` gives a list of `[B, C1, C2]`, one per pair, in which
        each sample stands for itself: they may be computed once for a whole set of images.

    Notes:
        Taps are the input and the output of each stage; pairs of one spatial size need no pooling. The method is meant
        as a first stage before the labels are used: beta 50 there in RepDistiller's script, 1 in
        Knowledge-Distillation-Zoo's. For use beside the labels, `reduction="sum", normalize=True, beta=1`: the
        relative squared error. A factor or a shift of the maps changes the loss, which grows with the fourth power of
        the activations (`normalize`: a factor common to both networks does not); the order of the batch does not. A
        factor in front of the loss is right too, but on the CPU slower than `beta`: the gradients that the forward
        pass computed have to be computed anew.

    Example:
        >>> distillation = FlowOfSolution(beta=50)
        >>> loss = distillation(taps.student, taps.teacher)

    Source: Yim et al., A Gift from Knowledge Distillation, CVPR 2017; RepDistiller. See
    `hyperfast.functional.flow_of_solution`.
    """

    per_sample = True

    def __init__(
        self,
        pairs: Pairs | None = None,
        pool: str = "avg",
        reduction: str = "mean",
        normalize: bool = False,
        weights: Weights | None = None,
        beta: float = 1.0,
    ) -> None:
        super().__init__(weights, beta)
        self.pairs, self.pool, self.reduction, self.normalize = pairs, pool, reduction, normalize

    def loss_names(self, taps: list[str]) -> list[str]:
        """The pairs, `"first>second"`.

        Raises:
            ValueError: less than two taps without pairs; a pair of a tap that there is not.
        """
        return [f"{taps[first]}>{taps[second]}" for first, second in check_pairs(self.pairs, len(taps))]

    def per_tap(self, student: Sequence[Tensor], teacher: Sequence[Tensor], expected_grad: Tensor) -> Tensor:
        """Losses `[P]` of all pairs."""
        return functional.flow_of_solution(
            student,
            teacher,
            pairs=self.pairs,
            pool=self.pool,
            reduction=self.reduction,
            normalize=self.normalize,
            expected_grad=expected_grad,
        )

    def per_tap_of_statistics(
        self, student: Sequence[Tensor], statistics: Sequence[Tensor], expected_grad: Tensor
    ) -> Tensor:
        """Losses `[P]` of all pairs."""
        return functional.flow_of_solution(
            student,
            statistics=statistics,
            pairs=self.pairs,
            pool=self.pool,
            reduction=self.reduction,
            normalize=self.normalize,
            expected_grad=expected_grad,
        )

    def compress(self, teacher: Features) -> list[Tensor]:
        """G of all pairs, `[B, C1, C2]` each."""
        return functional.flow_statistics(feature_maps(teacher), pairs=self.pairs, pool=self.pool)

    def extra_repr(self) -> str:
        chosen = [] if self.pairs is None else [f"pairs={list(self.pairs)}"]
        return ", ".join([*chosen, f"pool={self.pool!r}, reduction={self.reduction!r}, normalize={self.normalize}"])
