"""Inter-channel correlation, ICKD-C (arXiv 2202.03680)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hyperfast.losses.plain import PlainFeatureLoss, as_map, unit_rows

if TYPE_CHECKING:
    from torch import Tensor


class InterChannelCorrelation(PlainFeatureLoss):
    r"""Channels that go together in the teacher go together in the student, image by image.

    With the channels of a sample flattened to the rows of F `[C, HW]`, :math:`G = F F^T`, and U that with every row
    divided by its norm:

    .. math::
        L = \frac{1}{B C} \sum_b \| U^s_b - U^t_b \|_F^2 = \frac{2}{B C} \sum_{b, c} (1 - \cos(G^s_{bc}, G^t_{bc}))

    Args:
        weights: of the taps, see `FeatureLoss`; default 1 / L.
        beta: of the whole loss, see there. 2.5 in the authors' code.

    Shape:
        Maps `[B, C, H, W]` or tokens `[B, N, C]` (`as_map`), any floating dtype, with as many channels in both
        networks; heights and widths may differ. Result: a scalar, float32 (float64 for float64 maps).

    Raises:
        ValueError: (in the forward) maps with different numbers of channels.

    Notes:
        Runs as torch operations: the products are batched matrix products of `[C, C]` per sample. With
        :math:`R = U^s`, :math:`E = 2 (U^s - U^t) / (B C)`, the gradient is :math:`(M + M^T) F` with rows
        :math:`M_c = (E_c - R_c \langle R_c, E_c \rangle) / \|G_c\|`. A dead channel, whose row of G is zero, has no
        gradient and no part in the value; the authors' code divides by its norm as it is.

        Invariant to the scale of either map. The authors compare the last map, the student's behind a 1x1 convolution
        and batch norm that give it the teacher's channels, whatever its own are: in the recipe that is
        `LossTerm(connector="always")`; the default, `"auto"`, leaves maps of equal channels as they are.

    Source: Liu et al., ICCV 2021, arXiv 2202.03680; ADLab-AutoDrive/ICKD. Their form for segmentation, ICKD-S, is not
    here. No values of their code are pinned.
    """

    def of_pair(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one tap."""
        s, t = as_map(student).flatten(2), as_map(teacher).flatten(2)
        if s.shape[1] != t.shape[1]:
            raise ValueError(
                f"student map {list(student.shape)}, teacher map {list(teacher.shape)}; the loss compares channel by "
                "channel: bring the student's to as many, for instance with a 1x1 convolution"
            )
        difference = unit_rows(s @ s.mT) - unit_rows(t @ t.mT)
        return difference.square().sum() / max(s.shape[0] * s.shape[1], 1)
