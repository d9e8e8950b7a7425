"""Attention transfer (arXiv 1612.03928)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hyperfast import functional
from hyperfast.losses.base import CompressedTeacherLoss, Features, Weights, feature_maps, tap_names

if TYPE_CHECKING:
    from torch import Tensor


class AttentionTransfer(CompressedTeacherLoss):
    r"""The student's spatial attention maps follow the teacher's: where, not what, the network looks at.

    With :math:`Q = \sum_c |F_c|^p` over N positions and :math:`u = Q_s / \|Q_s\|_2`, :math:`v = Q_t / \|Q_t\|_2`:

    .. math::
        L_{code} = \frac{1}{BN} \sum_b \|u_b - v_b\|_2^2, \qquad
        L_{paper} = \frac{1}{B} \sum_b \|u_b - v_b\|_2

    Args:
        p: power of |F|: 1, 2 or 3.
        mode: `"code"`, `"paper"` or `"zoo"`, see `hyperfast.functional.attention_transfer`.
        eps: lower bound of the norm; default 1e-12 (`zoo`: 1e-6, added to it).
        weights: of the taps, see `FeatureLoss`; default 1 / L.
        beta: of the whole loss, see there.

    Shape:
        Maps `[B, C, *spatial]`, float16 to float64; numbers of channels may differ, the larger spatial size is
        average-pooled down. Result: a scalar, float32 (float64 for float64 maps). `compress` gives one map
        `[B, 1, *spatial]` per tap.

    Notes:
        beta = 1000 is the authors' and everyone's for `"code"`, where they sum over the taps; for their total with L
        taps use 1000 L, or `weights=[1.0] * L`. A factor in front of the loss is right too, but on the CPU slower than
        `beta`: the gradients that the forward pass computed have to be computed anew. A tap of one position (1x1) has
        the same attention map whatever it contains: it contributes nothing, and is warned of once.

    Example:
        >>> distillation = AttentionTransfer(beta=1000)
        >>> loss = F.cross_entropy(logits, labels) + distillation(taps.student, taps.teacher)

    Source: Zagoruyko and Komodakis, arXiv 1612.03928; paper and code differ (szagoruyko/attention-transfer #34).
    """

    per_sample = True

    def __init__(
        self,
        p: int = 2,
        mode: str = "code",
        eps: float | None = None,
        weights: Weights | None = None,
        beta: float = 1.0,
    ) -> None:
        super().__init__(weights, beta)
        self.p, self.mode, self.eps = p, mode, eps

    def forward(self, student: Features, teacher: Features | None = None, *, statistics: Any = None) -> Tensor:
        """The weighted sum of the taps' losses, a scalar; the teacher's maps, or their attention maps (`compress`)."""
        self._warn_of_single_positions(student)
        return super().forward(student, teacher, statistics=statistics)

    def per_tap(self, student: Sequence[Tensor], teacher: Sequence[Tensor], expected_grad: Tensor) -> Tensor:
        """Losses `[L]` of all taps, in one launch."""
        return functional.attention_transfer(
            student, teacher, p=self.p, mode=self.mode, eps=self.eps, expected_grad=expected_grad
        )

    def per_tap_of_statistics(
        self, student: Sequence[Tensor], statistics: Sequence[Tensor], expected_grad: Tensor
    ) -> Tensor:
        """Losses `[L]` of all taps, in one launch."""
        return self.per_tap(student, statistics, expected_grad)

    def compress(self, teacher: Features) -> list[Tensor]:
        r""":math:`(\sum_c |F_c|^p)^{1/p}` of all taps, a map of one channel with the same attention."""
        return [_one_channel(features, self.p) for features in feature_maps(teacher)]

    def extra_repr(self) -> str:
        return f"p={self.p}, mode={self.mode!r}"

    def _warn_of_single_positions(self, student: Features) -> None:
        for name, features in zip(tap_names(student), feature_maps(student), strict=True):
            if features.shape[2:].numel() == 1 and name not in self.warned:
                self.warned.add(name)
                warnings.warn(
                    f"tap {name!r} has maps of one position ({list(features.shape)}): they contribute nothing to "
                    "attention transfer, leave the tap out",
                    stacklevel=3,
                )


def _one_channel(features: Tensor, p: int) -> Tensor:
    wide = features.detach() if features.itemsize == 8 else features.detach().float()
    return wide.abs().pow(p).sum(1, keepdim=True).pow(1 / p)
