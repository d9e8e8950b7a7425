"""Complementary distillation of logits: sub-logits of every stage, labels, the teacher and the student (HCD)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SUB_LOGIT_COMPONENTS = ("gt", "kd", "sdd", "ol", "similarity")
LEAST_SQUARE = 1e-24  # a sub-logit of no greater square is similar to none
_NO_LABEL = -(1 << 62)  # is not given: every label has to be a class


class _Parts(NamedTuple):
    """What value and gradient share. Softmaxes and their logarithms at T; sub-logits are `[B, S, K, C]`."""

    student: Tensor
    fused: Tensor  # lambda_s u + lambda_t z_t
    smoothed: Tensor  # labels, [B, C]
    log_p: Tensor
    log_t: Tensor
    log_q: Tensor
    without_label: Tensor  # what is to be orthogonal, 0 at the label
    inverse_norm: Tensor  # of its rows, 0 for zero rows; [B, S, K, 1]
    cosines: Tensor  # [B, S, K, K], 0 on the diagonal
    hinge: Tensor  # relu(cosines - theta), 0 on the diagonal
    share: float  # of a stage in the sum: 1, or 1 / S


def sub_logit_distillation(
    student: Tensor,
    teacher: Tensor,
    sub_logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    label_smoothing: float,
    temperature: float,
    lambda_s: float,
    lambda_t: float,
    theta: float,
    detach_target: bool,
    fused: bool,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the first four components, and the components `[5]`: gt, kd, sdd, ol, and the mean cosine.

    Its gradient by autograd is that of `sub_logit_distillation_gradients`.
    """
    options = (label_smoothing, temperature, lambda_s, lambda_t, theta, fused, mean)
    parts = _parts(student, teacher, sub_logits, labels, *options)
    rows, (stages, count) = max(len(student), 1), sub_logits.shape[1:3]
    square = temperature**2 / rows
    log_q = parts.log_q.detach() if detach_target else parts.log_q
    from_logits = F.cross_entropy(
        parts.student, labels, reduction="sum", label_smoothing=label_smoothing, ignore_index=_NO_LABEL
    )
    from_fused = -(parts.smoothed[:, None, None] * parts.fused.log_softmax(3)).sum()
    pairs = max(count * (count - 1), 1)
    components = torch.stack(
        (
            (from_logits + from_fused * (parts.share / max(count, 1))) / rows,
            (parts.log_t.exp() * (parts.log_t - parts.log_p)).sum() * square,
            (log_q.exp() * (log_q - parts.log_p[:, None, None])).sum() * (square * parts.share / max(count, 1)),
            parts.hinge.square().sum() * (parts.share / (rows * pairs)),
            parts.cosines.sum() / (rows * max(stages, 1) * pairs),
        )
    )
    return torch.dot(components[:4], weights.to(components.dtype)), components.detach()


def sub_logit_distillation_forward(
    student: Tensor, teacher: Tensor, sub_logits: Tensor, labels: Tensor, weights: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `sub_logit_distillation`, and the gradients of the sum by the student's logits and the sub-logits."""
    total, components = sub_logit_distillation(student, teacher, sub_logits, labels, weights, *options)
    return total, components, *sub_logit_distillation_gradients(student, teacher, sub_logits, labels, weights, *options)


def sub_logit_distillation_gradients(
    student: Tensor,
    teacher: Tensor,
    sub_logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    label_smoothing: float,
    temperature: float,
    lambda_s: float,
    lambda_t: float,
    theta: float,
    detach_target: bool,
    fused: bool,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients `[B, C]` and `[B, S, K, C]`.

    With p, t and q_ij the softmax at T of student, teacher and fused sub-logits, y the smoothed label, n rows, r = 1
    or 1 / S the share of a stage, v the rows of what is to be orthogonal, without the label and of norm 1:

    - by the student: w_gt / n (softmax(z) - y) + w_kd T / n (p - t) + w_sdd r T / n (S p - 1 / K sum q_ij);
    - by a fused sub-logit: w_gt r / (n K) (softmax(f) - y), plus, unless the target is detached,
      w_sdd r T / (n K) q (log q - log p - KL(q, p));
    - by v's row before it had norm 1: 4 w_ol r / (n K (K - 1) norm_j) sum_l relu(c_jl - theta) (v_l - c_jl v_j).

    Computed so that it can be differentiated again.
    """
    options = (label_smoothing, temperature, lambda_s, lambda_t, theta, fused, mean)
    parts = _parts(student, teacher, sub_logits, labels, *options)
    rows, (stages, count) = max(len(student), 1), sub_logits.shape[1:3]
    gt, kd, sdd, ol = weights.to(parts.student.dtype)
    share = parts.share / max(count, 1)
    p, q = parts.log_p.exp(), parts.log_q.exp()
    by_student = (
        gt * (parts.student.softmax(1) - parts.smoothed)
        + kd * temperature * (p - parts.log_t.exp())
        + sdd * temperature * (parts.share * stages * p - share * q.sum((1, 2)))
    ) / rows
    by_fused = gt * (parts.fused.softmax(3) - parts.smoothed[:, None, None])
    if not detach_target:
        distance = parts.log_q - parts.log_p[:, None, None]
        by_fused = by_fused + sdd * temperature * q * (distance - (q * distance).sum(3, keepdim=True))
    unit = parts.without_label * parts.inverse_norm
    pull = parts.hinge @ unit - (parts.hinge * parts.cosines).sum(3, keepdim=True) * unit
    by_unit = ol * (4 * share / max(count - 1, 1)) * pull * parts.inverse_norm
    by_sub = lambda_s * share * by_fused + (lambda_s if fused else 1) * by_unit
    return by_student.to(student.dtype), (by_sub / rows).to(sub_logits.dtype)


def _parts(
    student: Tensor,
    teacher: Tensor,
    sub_logits: Tensor,
    labels: Tensor,
    label_smoothing: float,
    temperature: float,
    lambda_s: float,
    lambda_t: float,
    theta: float,
    on_fused: bool,
    mean: bool,
) -> _Parts:
    student = student.to(torch.promote_types(torch.float32, student.dtype))
    teacher, sub_logits = teacher.detach().to(student.dtype), sub_logits.to(student.dtype)
    fused = lambda_s * sub_logits + lambda_t * teacher[:, None, None]
    is_label = labels[:, None] == torch.arange(student.shape[1], device=labels.device)
    one_hot = is_label.to(student.dtype)
    without_label = torch.where(is_label[:, None, None], 0, fused if on_fused else sub_logits)
    # Not less the label's square: that cancels where the label has most of the norm. No root of 0: its slope is NaN.
    squares = without_label.square().sum(3, keepdim=True)
    counts = squares > LEAST_SQUARE
    inverse_norm = torch.where(counts, torch.where(counts, squares, 1).rsqrt(), 0)
    unit = without_label * inverse_norm
    apart = 1 - torch.eye(sub_logits.shape[2], dtype=student.dtype, device=student.device)
    cosines = unit @ unit.transpose(2, 3) * apart
    return _Parts(
        student,
        fused,
        (1 - label_smoothing) * one_hot + label_smoothing / student.shape[1],
        (student / temperature).log_softmax(1),
        (teacher / temperature).log_softmax(1),
        (fused / temperature).log_softmax(3),
        without_label,
        inverse_norm,
        cosines,
        (cosines - theta).relu() * apart,
        1 / max(sub_logits.shape[1], 1) if mean else 1.0,
    )
