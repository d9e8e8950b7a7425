"""Complementary distillation of logits: a student, its stages' sub-logits, a teacher and labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hyperfast import reference
from hyperfast.backends import Backend, current_backend
from hyperfast.functional._checks import check_choice, check_same_device
from hyperfast.ops import sub_logit_distillation as _op
from hyperfast.ops._library import accumulator_dtype, without_autocast

WEIGHTS = (1.0, 1.0, 6.0, 1.0)
ORTHOGONALITIES = ("fused", "sub")
STAGE_REDUCTIONS = ("sum", "mean")


class SubLogitLosses(NamedTuple):
    """What `sub_logit_distillation` finds.

    Attributes:
        total: the weighted sum, a scalar; the only one with a gradient.
        components: `[4]`, unweighted: gt, kd, sdd, ol.
        similarity: the mean of c_jl over all samples, stages and pairs.
    """

    total: Tensor
    components: Tensor
    similarity: Tensor


def sub_logit_distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    sub_logits: Tensor,
    labels: Tensor,
    weights: Sequence[float] | Tensor = WEIGHTS,
    *,
    label_smoothing: float = 0.1,
    temperature: float = 1.0,
    lambda_s: float = 1.0,
    lambda_t: float = 1.0,
    theta: float = 0.5,
    detach_target: bool = False,
    orthogonality: str = "fused",
    reduction: str = "sum",
) -> SubLogitLosses:
    r"""The losses of heterogeneous complementary distillation, with their gradients in one launch.

    With stages i, K sub-logits :math:`u_{ij}` of each, fused with the teacher's logits to
    :math:`f_{ij} = \lambda_s u_{ij} + \lambda_t z_t`, the softmax at T of student, teacher and fused sub-logit p, t and
    :math:`q_{ij}`, and the cross-entropy :math:`\mathrm{CE}` with smoothed labels:

    .. math::
        L_{gt} &= \mathrm{CE}(z_s) + \sum_i \frac{1}{K} \sum_j \mathrm{CE}(f_{ij}) \\
        L_{kd} &= T^2 \, \mathrm{KL}(t \,\|\, p) \\
        L_{sdd} &= \sum_i \frac{1}{K} \sum_j T^2 \, \mathrm{KL}(q_{ij} \,\|\, p) \\
        L_{ol} &= \sum_i \frac{1}{K (K - 1)} \sum_{j \ne l} \max(0, c_{jl} - \theta)^2

    each a mean over the samples; :math:`c_{jl}` is the cosine between :math:`f_{ij}` and :math:`f_{il}` (or
    :math:`u_{ij}` and :math:`u_{il}`), both without the entry of the label. The total is their weighted sum.

    Args:
        student_logits: `[B, C]`, float16, bfloat16, float32 or float64; finite.
        teacher_logits: `[B, C]`; no gradient flows there.
        sub_logits: `[B, S, K, C]`, of S stages.
        labels: int64 `[B]`.
        weights: of gt, kd, sdd and ol: four numbers, or a tensor `[4]` on the device, which costs no copy to it. No
            gradient flows there.
        label_smoothing: of both cross-entropies, from 0 to 1.
        temperature: T > 0, of both divergences.
        lambda_s: of the sub-logits, not negative.
        lambda_t: of the teacher's logits, not negative.
        theta: the cosine up to which nothing is pushed apart, from -1 to 1.
        detach_target: q is the target of sdd and gets no gradient from it.
        orthogonality: `"fused"`: between :math:`f_{ij}`. All have the teacher's logits in common: while the sub-logits
            are small, c is close to 1 and has no slope. `"sub"`: between :math:`u_{ij}`.
        reduction: over stages: `"sum"`, or `"mean"`, where each sum over i is divided by S.

    Returns:
        `SubLogitLosses`, float32 (float64 for float64 logits), whatever the logits are.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; labels that are probabilities; a number out of range;
            another name of `orthogonality` or `reduction`.
        IndexError: on the CPU, a label that is none of the classes. On a GPU it makes gt NaN.

    Notes:
        A sub-logit whose entries other than the label's have a norm up to 1e-12 has cosine 0 with every other, and no
        gradient from ol.

    Source: HCD, arXiv 2511.10942, by way of a third party's port, since the authors' code was not at hand. That masks
    the label by a large negative number or by 0; here the entry is left out.
    """
    options = (float(label_smoothing), float(temperature), float(lambda_s), float(lambda_t), float(theta))
    check_options(*options, orthogonality, reduction)
    _check_tensors(student_logits, teacher_logits, sub_logits, labels)
    switches = (detach_target, orthogonality == "fused", reduction == "mean")
    given = [student_logits, teacher_logits.detach(), sub_logits]
    if len({logits.dtype for logits in given}) > 1:
        given = [logits.to(accumulator_dtype(student_logits.dtype)) for logits in given]
    scales = _weights(weights, given[0])
    if current_backend() is Backend.REFERENCE:
        plain = without_autocast(reference.sub_logit_distillation)
        total, components = plain(*given, labels, scales, *options, *switches)
    else:
        total, components, *_ = _op.sub_logit_distillation(*given, labels, scales, *options, *switches)
    return SubLogitLosses(total, components[:4], components[4])


def check_options(
    label_smoothing: float,
    temperature: float,
    lambda_s: float,
    lambda_t: float,
    theta: float,
    orthogonality: str,
    reduction: str,
) -> None:
    """Raise a ValueError unless `sub_logit_distillation` takes these."""
    check_choice("orthogonality", orthogonality, ORTHOGONALITIES)
    check_choice("reduction", reduction, STAGE_REDUCTIONS)
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected a positive number")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; expected a number from 0 to 1")
    for name, value in (("lambda_s", lambda_s), ("lambda_t", lambda_t)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} is {value}; expected a finite number that is not negative")
    if not -1 <= theta <= 1:
        raise ValueError(f"theta is {theta}; expected a cosine, from -1 to 1")


def _check_tensors(student: Tensor, teacher: Tensor, sub_logits: Tensor, labels: Tensor) -> None:
    if student.ndim != 2 or not student.is_floating_point() or student.shape[1] == 0:
        raise ValueError(f"student_logits are {student.dtype} {list(student.shape)}; expected floats [B, classes]")
    if teacher.shape != student.shape or not teacher.is_floating_point():
        raise ValueError(
            f"student_logits are {list(student.shape)}, teacher_logits {teacher.dtype} {list(teacher.shape)}; "
            "expected floats [B, classes] for both: the same images and the same classes"
        )
    rows, classes = student.shape
    fits = sub_logits.ndim == 4 and sub_logits.shape[0] == rows and sub_logits.shape[3] == classes
    if not fits or not sub_logits.is_floating_point() or 0 in sub_logits.shape[1:3]:
        raise ValueError(
            f"sub_logits are {sub_logits.dtype} {list(sub_logits.shape)}; expected floats "
            f"[{rows}, stages, sub-logits, {classes}], of the images and classes of student_logits"
        )
    if labels.is_floating_point():
        raise ValueError(
            f"labels are {labels.dtype} {list(labels.shape)}, probabilities of classes; the entry of the label is left "
            "out of the sub-logits, so that each image needs one class: give labels.argmax(1)"
        )
    if labels.dtype != torch.int64 or labels.shape != student.shape[:1]:
        raise ValueError(
            f"labels are {labels.dtype} {list(labels.shape)}; expected torch.int64 [{rows}], one class per row of "
            "student_logits"
        )
    check_same_device(student_logits=student, teacher_logits=teacher, sub_logits=sub_logits, labels=labels)


def _weights(weights: Sequence[float] | Tensor, like: Tensor) -> Tensor:
    """The weights `[4]`, on the device of the logits and in the dtype of the sums."""
    dtype = accumulator_dtype(like.dtype)
    count = tuple(weights.shape) if isinstance(weights, Tensor) else (len(weights),)
    if count != (4,):
        raise ValueError(f"weights are {list(count)}; expected [4], of gt, kd, sdd and ol")
    if isinstance(weights, Tensor):
        check_same_device(student_logits=like, weights=weights)
        return weights.detach().to(dtype)
    return torch.tensor(weights, dtype=dtype, device=like.device)
