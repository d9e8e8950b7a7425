"""FitNets' hint loss between pairs of feature maps."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hyperfast import reference
from hyperfast.backends import Backend, current_backend
from hyperfast.functional._checks import check_choice
from hyperfast.functional._maps import check_pairs, check_reduction, expectation, widened
from hyperfast.ops.fitnets import loss as _op
from hyperfast.reference.fitnets import NORMALIZATIONS


def fitnets(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    normalize: str = "none",
    reduction: str = "mean",
    expected_grad: Tensor | None = None,
) -> Tensor:
    r"""Squared difference of all taps in one launch: one loss per tap.

    With E the elements of a map of B samples, and :math:`\sigma^2` the variance of all elements of the teacher's map,
    or 1 where nothing is normalised:

    .. math::
        L_{mean} = \frac{1}{E \sigma^2} \| F_s - F_t \|_2^2, \qquad
        L_{batch} = \frac{1}{2 B \sigma^2} \| F_s - F_t \|_2^2 = \frac{E}{2B} L_{mean}

    Args:
        student: maps `[B, ...]`, float16, bfloat16, float32 or float64. Gradients flow here only.
        teacher: as many maps of the same shapes.
        normalize: `"none"`, or `"teacher"`: by the variance of each teacher's map, so that taps of different scales
            weigh alike. A constant map has no scale: its tap has loss and gradient 0. Costs a pass over the teacher's.
        reduction: `"mean"` over the elements, everyone's; `"batch"`, half the sum per sample, the paper's.
        expected_grad: `[L]`, what the gradient of the result will be: the weights with which the losses are added up.
            Changes no value. On the CPU the forward pass then writes the gradients while the maps are in the cache; if
            the gradient turns out to be another, the backward pass starts anew.

    Returns:
        float32 `[L]` (float64 for float64 maps), unweighted. Sums are float32 whatever the maps are.

    Raises:
        ValueError: unequal numbers of maps, shapes or devices.

    Notes:
        Zero, with zero gradient, where the maps are equal. Not invariant to scale or shift of one map; to a common
        shift of both, and with `normalize="teacher"` also to a common scale.

    Source: Romero et al., arXiv 1412.6550. RepDistiller and others take the mean.
    """
    check_choice("normalize", normalize, NORMALIZATIONS)
    check_reduction(reduction)
    teacher = check_pairs(student, teacher)
    by_teacher = normalize == "teacher"
    if current_backend() is Backend.REFERENCE:
        return reference.fitnets(widened(student, student), widened(teacher, student), by_teacher, reduction)[0]
    expected_grad = expectation(expected_grad, student)
    losses: Tensor = _op.forward(student, teacher, by_teacher, reduction, expected_grad)[0]
    return losses
