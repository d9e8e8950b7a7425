"""Attention transfer between pairs of feature maps."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hyperfast import reference
from hyperfast.backends import Backend, current_backend
from hyperfast.functional._checks import check_choice
from hyperfast.functional._maps import check_counts, check_pair, expectation, pooled, widened
from hyperfast.ops import attention_transfer as _op
from hyperfast.reference.attention_transfer import MODES


def attention_transfer(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    p: int = 2,
    mode: str = "code",
    eps: float | None = None,
    expected_grad: Tensor | None = None,
) -> Tensor:
    r"""Attention transfer of all taps in one launch: one loss per tap.

    With :math:`Q = \sum_c |F_c|^p` over N positions and :math:`u = Q_s / \|Q_s\|_2`, :math:`v = Q_t / \|Q_t\|_2`:

    .. math::
        L_{code} = \frac{1}{BN} \sum_b \|u_b - v_b\|_2^2, \qquad
        L_{paper} = \frac{1}{B} \sum_b \|u_b - v_b\|_2

    Args:
        student: feature maps `[B, C, *spatial]`, float16, bfloat16, float32 or float64. Gradients flow here only.
        teacher: as many maps; C may differ, a different spatial size is average-pooled down to the smaller one.
        p: power of |F|: 1, 2 or 3.
        mode: `"code"`, the formula of the authors' code and of RepDistiller; `"paper"`, the formula printed in the
            paper, without its factor beta / 2; `"zoo"`, Knowledge-Distillation-Zoo's, which divides by norm + eps.
            For a positive map the three differ in square against norm and in eps, not in the attention map.
        eps: lower bound of the norm (`zoo`: added to it); default 1e-12, `zoo` 1e-6.
        expected_grad: `[L]`, what the gradient of the result will be: the weights with which the losses are added up.
            Changes no value. On the CPU the forward pass then writes the gradients while the maps are in the cache,
            which is a quarter faster; if the gradient turns out to be another, the backward pass starts anew.

    Returns:
        float32 `[L]` (float64 for float64 maps), unweighted. Statistics are float32 whatever the maps are: in
        float16 eps is 0 and squares overflow above 255.

    Raises:
        ValueError: unequal numbers of maps, batch sizes or devices; a map without spatial positions.

    Notes:
        Invariant to the scale of either map. Zero, with zero gradient, on maps of one position (1x1) and where the
        student's map is zero. The gradient keeps one number per position, never a tensor as large as a map.

    Source: Zagoruyko and Komodakis, arXiv 1612.03928; paper and code differ (szagoruyko/attention-transfer #34).
    """
    check_choice("mode", mode, MODES)
    p = int(p)  # a compiler may see an unknown number
    if p not in (1, 2, 3):
        raise ValueError(f"p is {p!r}; choose 1, 2 or 3")
    check_counts(student, teacher)
    pairs = [_matched_maps(index, s, t) for index, (s, t) in enumerate(zip(student, teacher, strict=True))]
    if eps is None:
        eps = 1e-6 if mode == "zoo" else 1e-12
    students, teachers = [s for s, _ in pairs], [t for _, t in pairs]
    if current_backend() is Backend.REFERENCE:
        wide = widened(students, students), widened(teachers, students)
        return reference.attention_transfer(*wide, p, mode, eps)
    expected_grad = expectation(expected_grad, students)
    losses: Tensor = _op.attention_transfer(students, teachers, p, mode, eps, expected_grad)[0]
    return losses


def _matched_maps(index: int, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """One pair of maps with equal spatial sizes; the larger is average-pooled, as RepDistiller does."""
    teacher = teacher.detach()
    check_pair(index, student, teacher, 3, "[B, C, *spatial]")
    if student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    if student.ndim != teacher.ndim or student.ndim > 5:
        raise ValueError(
            f"tap {index}: maps {list(student.shape)} and {list(teacher.shape)} cannot be matched by pooling"
        )
    size = [min(a, b) for a, b in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    return pooled(student, size), pooled(teacher, size)
