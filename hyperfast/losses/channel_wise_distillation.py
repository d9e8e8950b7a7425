"""Channel-wise distillation (arXiv 2011.13256)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hyperfast import functional
from hyperfast.losses.base import FeatureLoss, Weights

if TYPE_CHECKING:
    from torch import Tensor


class ChannelWiseDistillation(FeatureLoss):
    r"""Each of the student's channels looks where the teacher's does: a divergence between distributions of positions.

    With :math:`p_{bc} = \mathrm{softmax}(F_{bc} / T)` over the positions of channel c of sample b:

    .. math::
        L = \frac{T^2}{B C} \sum_{b, c} \mathrm{KL}(p^t_{bc} \,\|\, p^s_{bc})

    Args:
        temperature: T > 0; the softer, the more positions count.
        weights: of the taps, see `FeatureLoss`; default 1 / L.
        beta: of the whole loss, see there.

    Shape:
        Maps `[B, C, *spatial]`, float16 to float64, student's and teacher's of one shape: a student of another width
        needs a 1x1 convolution, which is trained with it. Result: a scalar, float32 (float64 for float64 maps).

    Notes:
        Invariant to a constant added to a channel of either map, not to scale. Zero, with zero gradient, for a map
        compared with itself. The sum over the channels per sample is C times this mean.

        The authors have T = 4, beta = 3 for logit maps of dense prediction and 50 for feature maps; mmrazor T = 1,
        beta = 5. Take student and teacher both before or both after the activation. A tap of one position (1x1)
        contributes nothing.

    Source: Shu et al., arXiv 2011.13256 (irfanICMLL/TorchDistiller), whose code takes the logarithm of a softmax and is
    NaN where the positions of a channel differ by more than about 100 T; this one is not.
    """

    def __init__(self, temperature: float = 4.0, weights: Weights | None = None, beta: float = 1.0) -> None:
        super().__init__(weights, beta)
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; expected a positive number")
        self.temperature = float(temperature)

    def per_tap(self, student: Sequence[Tensor], teacher: Sequence[Tensor], expected_grad: Tensor) -> Tensor:
        """Losses `[L]` of all taps, in one launch."""
        return functional.channel_wise_distillation(
            student, teacher, temperature=self.temperature, expected_grad=expected_grad
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"
