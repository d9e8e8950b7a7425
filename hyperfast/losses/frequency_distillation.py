"""Distillation of magnitudes in the frequency domain, in the manner of UHKD (arXiv 2510.24116)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from hyperfast.losses.base import Weights
from hyperfast.losses.plain import PlainFeatureLoss, as_map

if TYPE_CHECKING:
    from torch import Tensor


class FrequencyDistillation(PlainFeatureLoss):
    r"""The student's maps have as much of every low frequency as the teacher's, wherever in the image it is.

    UHKD-style: with F pooled to n x n, and :math:`\hat F` its two-dimensional Fourier transform, scaled to keep the
    norm:

    .. math::
        M = \log(1 + |\hat F_{uv}|), \; |u| < k, \; 0 \le v < k, \qquad L = \mathrm{mean} \, (M_s - M_t)^2

    Args:
        size: n; larger maps are pooled to it by averages, smaller ones keep their own, the smaller of both networks'.
        keep: k, how many frequencies are kept, from the constant on; None: half of them, at least one.
        weights: of the taps, see `FeatureLoss`; default 1 / L.
        beta: of the whole loss, see there.

    Shape:
        Maps `[B, C, H, W]` or tokens `[B, N, C]` (`as_map`), any floating dtype, with as many channels in both
        networks, or a connector makes it so; heights and widths may differ. Result: a scalar, float32 (float64 for
        float64 maps).

    Raises:
        ValueError: size or keep below 1; (in the forward) maps with different numbers of channels.

    Notes:
        Runs as torch operations. With :math:`D = M_s - M_t` over E elements, the gradient by :math:`\hat F_s` is
        :math:`2 D \hat F_s / (E \, |\hat F_s| (1 + |\hat F_s|))`, and 0 where :math:`\hat F_s` is 0. A map that is
        shifted around the image by whole positions has the same loss, where nothing is pooled.

        This is not UHKD: of that paper the abstract is known, which has the teacher's magnitudes in the frequency
        domain, a learned projection of the student's, and a mean squared error at several levels. Pooling, logarithm
        and the choice of frequencies are our own; the projection is a `Connector`. Its accuracies do not apply.

    Source: after the abstract of arXiv 2510.24116.
    """

    def __init__(
        self, size: int = 8, keep: int | None = None, weights: Weights | None = None, beta: float = 1.0
    ) -> None:
        super().__init__(weights, beta)
        if size < 1 or (keep is not None and keep < 1):
            raise ValueError(f"size is {size} and keep {keep}; both must be at least 1")
        self.size, self.keep = size, keep

    def of_pair(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one tap."""
        s, t = as_map(student), as_map(teacher)
        if s.shape[1] != t.shape[1]:
            raise ValueError(
                f"student map {list(student.shape)}, teacher map {list(teacher.shape)}; the loss compares channel by "
                "channel: bring the student's to as many, for instance with a 1x1 convolution"
            )
        if not s.numel():
            return s.sum()  # a Fourier transform of nothing is an error
        height, width = (min(self.size, *sizes) for sizes in zip(s.shape[2:], t.shape[2:], strict=True))
        difference = self._magnitudes(s, height, width) - self._magnitudes(t, height, width)
        return difference.square().mean()

    def _magnitudes(self, features: Tensor, height: int, width: int) -> Tensor:
        """M `[B, C, rows, columns]`, the rows of negative frequencies behind the others."""
        spectrum = torch.fft.rfft2(F.adaptive_avg_pool2d(features, (height, width)), norm="ortho")
        rows, columns = (self.keep or max(1, size // 2) for size in (height, width))
        kept = spectrum[..., :columns]
        if 2 * rows - 1 < height:
            kept = torch.cat((kept[:, :, :rows], kept[:, :, height - rows + 1 :]), 2)
        magnitudes: Tensor = kept.abs().log1p()
        return magnitudes

    def extra_repr(self) -> str:
        return f"size={self.size}, keep={self.keep}"
