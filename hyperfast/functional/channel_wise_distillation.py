"""Channel-wise distillation between pairs of feature maps."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hyperfast import reference
from hyperfast.backends import Backend, current_backend
from hyperfast.functional._maps import check_pairs, expectation, widened
from hyperfast.ops.channel_wise_distillation import loss as _op


def channel_wise_distillation(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    temperature: float = 4.0,
    expected_grad: Tensor | None = None,
) -> Tensor:
    r"""Channel-wise distillation of all taps in one launch: one loss per tap.

    With :math:`p_{bc} = \mathrm{softmax}(F_{bc} / T)` over the positions of channel c of sample b:

    .. math::
        L = \frac{T^2}{B C} \sum_{b, c} \mathrm{KL}(p^t_{bc} \,\|\, p^s_{bc})

    Args:
        student: maps `[B, C, *spatial]`, float16, bfloat16, float32 or float64. Gradients flow here only.
        teacher: as many maps of the same shapes.
        temperature: T > 0.
        expected_grad: `[L]`, what the gradient of the result will be: the weights with which the losses are added up.
            Changes no value. On the CPU the forward pass then writes the gradients while the maps are in the cache; if
            the gradient turns out to be another, the backward pass starts anew.

    Returns:
        float32 `[L]` (float64 for float64 maps), unweighted. Sums are float32 whatever the maps are.

    Raises:
        ValueError: unequal numbers of maps, shapes or devices; maps without a spatial axis; T that is not positive.

    Notes:
        Invariant to a constant added to a channel of either map, not to scale. Zero, with zero gradient, where the maps
        are equal, and on maps of one position (1x1).

        No probability's logarithm is taken: loss and gradient are finite however far the positions of a channel are
        apart. The authors' code gives NaN where they differ by more than about 100 T.

    Source: Shu et al., arXiv 2011.13256 (irfanICMLL/TorchDistiller), T = 4.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected a positive number")
    teacher = check_pairs(student, teacher, 3, "[B, C, *spatial]")
    if current_backend() is Backend.REFERENCE:
        wide = widened(student, student), widened(teacher, student)
        return reference.channel_wise_distillation(*wide, temperature)
    expected_grad = expectation(expected_grad, student)
    losses: Tensor = _op.forward(student, teacher, temperature, expected_grad)[0]
    return losses
