"""Activation boundary between pairs of feature maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hyperfast import reference
from hyperfast.backends import Backend, current_backend
from hyperfast.functional._maps import (
    check_batches,
    check_counts,
    check_map,
    check_pairs,
    check_reduction,
    expectation,
    widened,
)
from hyperfast.ops.activation_boundary import loss as _op


def activation_boundary(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    margin: float = 1.0,
    reduction: str = "mean",
    expected_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Activation boundary of all taps in one launch: one loss and one share of mismatches per tap.

    With t = 1 where :math:`F_t > 0`, else -1, m the margin and E the elements of a map of B samples:

    .. math::
        L_{mean} = \frac{1}{E} \sum \max(0, m - t F_s)^2, \qquad L_{batch} = \frac{E}{B} L_{mean}, \qquad
        \text{mismatch} = \frac{1}{E} \, \#\{(F_s > 0) \ne (F_t > 0)\}

    Args:
        student: pre-activation maps `[B, ...]`, float16, bfloat16, float32 or float64. Gradients flow here only.
        teacher: as many maps of the same shapes; or all of them packed by `pack_signs`, one bit per element. A
            teacher of exactly 0 counts as inactive.
        margin: m > 0, how far from zero the student is pushed.
        reduction: `"mean"` over the elements, or `"batch"`, the sum per sample.
        expected_grad: `[L]`, what the gradient of the losses will be: the weights with which they are added up.
            Changes no value. On the CPU the forward pass then writes the gradients while the maps are in the cache; if
            the gradient turns out to be another, the backward pass starts anew.

    Returns:
        Losses and mismatches, float32 `[L]` each (float64 for float64 maps), unweighted. The mismatches have no
        gradient: they are what the loss is a smooth stand-in for.

    Raises:
        ValueError: unequal numbers of maps, shapes or devices; a margin that is not positive; some teacher's maps
            packed and others not.

    Notes:
        Invariant to the scale of the teacher's map, not to that of the student's, which the margin is measured in; to
        no shift. Where student and teacher agree and :math:`|F_s| \ge m`, loss and gradient are 0.

        A packed teacher has the order of a contiguous map: a channels-last student is copied.

    Source: Heo et al., arXiv 1811.03233; the official code (bhheo/AB_distillation) has `"batch"`.
    """
    if not margin > 0:
        raise ValueError(f"margin is {margin}; expected a positive number")
    check_reduction(reduction)
    packed = [t.dtype == torch.uint8 for t in teacher]
    if any(packed):
        if not all(packed):
            raise ValueError(f"teacher map {packed.index(False)} is not packed and others are; pack all or none")
        _check_packed(student, teacher)
    else:
        teacher = check_pairs(student, teacher)
    if current_backend() is Backend.REFERENCE:
        return reference.activation_boundary(widened(student, student), teacher, margin, reduction)
    expected_grad = expectation(expected_grad, student)
    losses, mismatches, _ = _op.forward(student, teacher, margin, reduction, expected_grad)
    return losses, mismatches


def pack_signs(maps: Sequence[Tensor]) -> list[Tensor]:
    """Where maps are positive, one bit per element: a teacher for `activation_boundary` that is small enough to keep.

    Args:
        maps: `[B, ...]` each, of any floating dtype and layout.

    Returns:
        uint8 `[B, ceil(M / 8)]` each, M the elements of a sample: element 8 i + k, in the order of a contiguous map, is
        bit k of byte i. Samples may be stored and put together anew.

    Raises:
        ValueError: a map without samples, or not of floats.
    """
    for index, features in enumerate(maps):
        check_map(f"map {index}", features, 2, "[B, ...]")
    return [reference.pack_signs(features) for features in maps]


def _check_packed(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    check_counts(student, teacher)
    for index, (s, t) in enumerate(zip(student, teacher, strict=True)):
        check_map(f"student map {index}", s, 2, "[B, ...]")
        check_batches({f"student map {index}": s, f"teacher map {index}": t})
        expected = [len(s), (s.shape[1:].numel() + 7) // 8]
        if list(t.shape) != expected:
            raise ValueError(
                f"tap {index}: packed teacher {list(t.shape)}; expected {expected} for a student map {list(s.shape)}"
            )
