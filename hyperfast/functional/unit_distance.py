"""Distance between feature maps whose samples are scaled to norm 1."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hyperfast import reference
from hyperfast.backends import Backend, current_backend
from hyperfast.functional._maps import check_pairs, check_reduction, expectation, widened
from hyperfast.ops.unit_distance import loss as _op


def unit_distance(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    p: int = 1,
    eps: float = 1e-12,
    added: bool = False,
    reduction: str = "mean",
    expected_grad: Tensor | None = None,
) -> Tensor:
    r"""Distance between samples of norm 1, of all taps in one launch: one loss per tap.

    With each sample b flattened to M numbers, :math:`u_b = s_b / \|s_b\|_2` and :math:`v_b = t_b / \|t_b\|_2`:

    .. math::
        L_{mean} = \frac{1}{B M} \sum_b \| u_b - v_b \|_p^p, \qquad L_{batch} = \frac{1}{B} \sum_b \| u_b - v_b \|_p^p

    Args:
        student: maps `[B, ...]`, float16, bfloat16, float32 or float64. Gradients flow here only.
        teacher: as many maps of the same shapes.
        p: 1, absolute differences, or 2, squares.
        eps: a norm that is not larger is none: the sample has loss and gradient 0, whichever of the two it is.
        added: divide by norm + eps instead, and leave no sample out.
        reduction: `"mean"` over the elements, or `"batch"`, the sum per sample.
        expected_grad: `[L]`, what the gradient of the result will be: the weights with which the losses are added up.
            Changes no value. On the CPU the forward pass then writes the gradients while the maps are in the cache; if
            the gradient turns out to be another, the backward pass starts anew.

    Returns:
        float32 `[L]` (float64 for float64 maps), unweighted. Norms are float32 whatever the maps are.

    Raises:
        ValueError: unequal numbers of maps, shapes or devices; another p.

    Notes:
        Invariant to the scale of each sample of either map (with `added`, but for eps), not to a shift. Zero, with zero
        gradient, where the maps are equal.

    Source: the distance of factor transfer, arXiv 1802.04977 (mean, p = 1), whose code divides by max(norm, eps); and
    of NeRN's feature maps, arXiv 2212.13554 (batch, p = 2, eps = 1e-3 added).
    """
    p = int(p)  # a compiler may see an unknown number
    if p not in (1, 2):
        raise ValueError(f"p is {p!r}; choose 1 or 2")
    check_reduction(reduction)
    teacher = check_pairs(student, teacher)
    if current_backend() is Backend.REFERENCE:
        wide = widened(student, student), widened(teacher, student)
        return reference.unit_distance(*wide, p, eps, added, reduction)
    expected_grad = expectation(expected_grad, student)
    losses: Tensor = _op.forward(student, teacher, p, eps, added, reduction, expected_grad)[0]
    return losses
