"""Cross-entropy and logit distillation in one pass over the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from hyperfast import reference
from hyperfast.backends import Backend, current_backend
from hyperfast.functional._checks import check_choice, check_same_device
from hyperfast.functional._maps import gradient_can_be_ahead
from hyperfast.ops import cross_entropy_distillation as _op
from hyperfast.ops._library import accumulator_dtype


def cross_entropy_distillation(
    student_logits: Tensor,
    teacher_logits: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    temperature: float = 4.0,
    mode: str = "kl",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    expected_grad: Tensor | None = None,
) -> Tensor:
    r"""Cross-entropy with labels and the divergence from a teacher's logits, in one launch: two losses.

    With C classes, :math:`p = \mathrm{softmax}(z_t / T)`, :math:`q = \mathrm{softmax}(z_s / T)`, smoothing s,
    :math:`y_k = (1 - s) [k = label] + s / C` and :math:`\epsilon = 10^{-4}`:

    .. math::
        L_0 = -\frac{1}{|labelled|} \sum_{b\,labelled} \sum_k y_k \log \mathrm{softmax}(z_s)_k, \qquad
        L_1 = \frac{T^2}{B} \sum_b \sum_k \begin{cases}
            p \log \frac{p}{q} & kl \\
            p \log \frac{p}{q + \epsilon} & stable \\
            (p + \epsilon) \log \frac{p + \epsilon}{q + \epsilon} & multi\_stable
        \end{cases}

    Args:
        student_logits: `[B, C]`, float16, bfloat16, float32 or float64. Gradients flow here only.
        teacher_logits: `[B, C]`; None leaves the distillation out.
        labels: int64 `[B]`; None leaves the cross-entropy out.
        temperature: T > 0, of the distillation; the cross-entropy has none.
        mode: the divergence: `"kl"`, `"stable"` or `"multi_stable"`, see `hyperfast.losses.LogitDistillation`.
        label_smoothing: s, from 0 to 1.
        ignore_index: the label of rows that have none. They count for the distillation alone.
        expected_grad: `[2]`, what the gradient of the result will be: the weights with which the two are added up.
            Changes no value. On the CPU the forward pass then writes the gradient while the logits are in the cache;
            if the gradient turns out to be another, the backward pass starts anew.

    Returns:
        float32 `[2]` (float64 for float64 logits), unweighted: cross-entropy and distillation, 0 for what was left
        out. Sums are float32 whatever the logits are. A mean over no rows is 0, where `F.cross_entropy` says NaN.

    Raises:
        ValueError: neither labels nor a teacher; shapes, dtypes or devices that do not fit; T, s or mode out of range.
        IndexError: on the CPU, a label that is none of the classes. On a GPU it makes the cross-entropy NaN.

    Notes:
        Logits may be -inf: a class of teacher's probability 0 contributes 0 (`F.kl_div` says NaN), one that the
        student alone excludes makes the divergence infinite. The gradient keeps six numbers per row.

    Source: Hinton, Vinyals and Dean, arXiv 1503.02531, in the form of RepDistiller (`batchmean`, times T^2).
    """
    temperature, label_smoothing = float(temperature), float(label_smoothing)
    check_options(temperature, mode, label_smoothing)
    _check_tensors(student_logits, teacher_logits, labels)
    if teacher_logits is not None:
        student_logits, teacher_logits = _of_one_dtype(student_logits, teacher_logits.detach())
    options = (temperature, mode, label_smoothing, ignore_index)
    if current_backend() is Backend.REFERENCE:
        return reference.cross_entropy_distillation(student_logits, teacher_logits, labels, *options)
    if expected_grad is not None:
        if expected_grad.shape != (2,):
            raise ValueError(f"expected_grad is {list(expected_grad.shape)}; expected [2], one per loss")
        # A copy: whoever changes the weights before the backward pass shall get what they were.
        ahead, dtype = gradient_can_be_ahead([student_logits]), accumulator_dtype(student_logits.dtype)
        expected_grad = expected_grad.detach().to("cpu", dtype, copy=True) if ahead else None
    losses: Tensor = _op.cross_entropy_distillation(student_logits, teacher_logits, labels, *options, expected_grad)[0]
    return losses


def check_options(temperature: float, mode: str, label_smoothing: float = 0.0) -> None:
    """Raise a ValueError unless `cross_entropy_distillation` takes these."""
    check_choice("mode", mode, reference.DIVERGENCES)
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected a positive number")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; expected a number from 0 to 1")


def _check_tensors(student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> None:
    if teacher is None and labels is None:
        raise ValueError("neither teacher_logits nor labels were given; there is nothing to compare the student with")
    if student.ndim != 2 or not student.is_floating_point() or student.shape[1] == 0:
        raise ValueError(f"student_logits are {student.dtype} {list(student.shape)}; expected floats [B, classes]")
    if teacher is not None and not teacher.is_floating_point():
        raise ValueError(f"teacher_logits are {teacher.dtype}; expected floats, class indices are labels")
    if teacher is not None and teacher.shape != student.shape:
        raise ValueError(
            f"student_logits are {list(student.shape)}, teacher_logits {list(teacher.shape)}; "
            "expected [B, classes] for both: the same images and the same classes"
        )
    if labels is not None and (labels.dtype != torch.int64 or labels.shape != student.shape[:1]):
        raise ValueError(
            f"labels are {labels.dtype} {list(labels.shape)}; expected torch.int64 [{len(student)}], one class per row "
            "of student_logits"
        )
    given = {"student_logits": student, "teacher_logits": teacher, "labels": labels}
    check_same_device(**{name: tensor for name, tensor in given.items() if tensor is not None})


def _of_one_dtype(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both as they are, or in the dtype of the sums."""
    if student.dtype == teacher.dtype:
        return student, teacher
    dtype = accumulator_dtype(student.dtype)
    return student.to(dtype), teacher.to(dtype)
