"""Cross-entropy with labels and distillation of a teacher's logits (arXiv 1503.02531), over the same logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DIVERGENCES = ("kl", "stable", "multi_stable")
DIVERGENCE_EPS = 1e-4  # NeRN's; part of the loss, since probabilities below it pull the student no further
LOGIT_STATISTICS = 6  # of a row


def cross_entropy_distillation(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    temperature: float,
    mode: str,
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:
    """Losses `[2]`: the mean cross-entropy of the rows that have a label, and T^2 / B times the divergence.

    What is not asked for is 0, and so is a mean over no rows.
    """
    student = student.to(torch.promote_types(torch.float32, student.dtype))
    cross_entropy = distillation = student.new_zeros(())
    if labels is not None:
        total = F.cross_entropy(
            student, labels, reduction="sum", label_smoothing=label_smoothing, ignore_index=ignore_index
        )
        cross_entropy = total * _inverse_count(student, labels, ignore_index)
    if teacher is not None:
        log_q = F.log_softmax(student / temperature, dim=1)
        log_p = F.log_softmax(teacher.detach().to(student.dtype) / temperature, dim=1)
        if mode != "kl":
            log_q = (log_q.exp() + DIVERGENCE_EPS).log()
        if mode == "multi_stable":
            log_p = (log_p.exp() + DIVERGENCE_EPS).log()
        p = log_p.exp()
        terms = torch.where(p == 0, 0, p * (log_p - log_q))  # the limit, where a class has no logit: -inf
        distillation = terms.sum() * (temperature**2 / max(len(student), 1))
    return torch.stack((cross_entropy, distillation))


def cross_entropy_distillation_forward(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    temperature: float,
    mode: str,
    label_smoothing: float,
    ignore_index: int,
    expected_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses `[2]`, what native code keeps for the backward pass, and the gradient for `expected_grad` `[2]` or `[0]`.

    Kept, flat `[6 B + 1]`, zeros where there is no teacher or no label: for every row the student's largest logit m,
    the inverses of sum exp(z - m) and of sum exp((z - m) / T), the largest logit and the inverse sum of the teacher,
    and sum_k q w / (q + eps) of a stable divergence (see the backward pass); at the end 1 / rows that have a label.
    """
    options = (temperature, mode, label_smoothing, ignore_index)
    losses = cross_entropy_distillation(student, teacher, labels, *options)
    wide = student.to(losses.dtype)
    statistics = wide.new_zeros(len(student), LOGIT_STATISTICS)
    count = wide.new_zeros(())
    statistics[:, 0], statistics[:, 1] = _softmax_parts(wide, 1.0)
    if labels is not None:
        count = _inverse_count(wide, labels, ignore_index)
    if teacher is not None:
        _, statistics[:, 2] = _softmax_parts(wide, temperature)
        statistics[:, 3], statistics[:, 4] = _softmax_parts(teacher.to(wide.dtype), temperature)
        if mode != "kl":
            q, w = _probabilities(wide, teacher, temperature, mode)
            statistics[:, 5] = (q * w / (q + DIVERGENCE_EPS)).sum(1)
    statistics = torch.cat((statistics.flatten(), count[None]))
    if expected_grad is None:
        return losses, statistics, student.new_empty(0)
    gradient = cross_entropy_distillation_backward(expected_grad, student, teacher, labels, statistics, *options)
    return losses, statistics, gradient


def cross_entropy_distillation_backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    _statistics: Tensor,
    temperature: float,
    mode: str,
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:
    """Gradient `[B, C]` of the student's logits.

    With q and p the softmax at T of student and teacher, w = p (`multi_stable`: p + eps):

    - cross-entropy: (softmax(z) - y) / rows that have a label, y the smoothed label;
    - `kl`: T / B (q - p);
    - stable: T / B q (sum_k q_k w_k / (q_k + eps) - w / (q + eps)).

    Computed from the logits alone, so that it can be differentiated again.
    """
    wide = student.to(grad.dtype)
    gradient = torch.zeros_like(wide)
    if labels is not None:
        labelled = (labels != ignore_index)[:, None]
        one_hot = torch.zeros_like(wide).scatter(1, labels.where(labelled[:, 0], 0)[:, None], 1)
        smoothed = (1 - label_smoothing) * one_hot + label_smoothing / wide.shape[1]
        scale = grad[0] * _inverse_count(wide, labels, ignore_index) * labelled
        gradient = gradient + scale * (wide.softmax(1) - smoothed)
    if teacher is not None:
        q, w = _probabilities(wide, teacher, temperature, mode)
        if mode == "kl":
            slope = q - w
        else:
            ratio = w / (q + DIVERGENCE_EPS)
            slope = q * ((q * ratio).sum(1, keepdim=True) - ratio)
        gradient = gradient + grad[1] * (temperature / max(len(wide), 1)) * slope
    return gradient.to(student.dtype)


def _inverse_count(like: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """1 / rows that have a label; 0 where none has."""
    count = (labels != ignore_index).sum().to(like.dtype)
    return torch.where(count > 0, 1 / count.clamp_min(1), 0)


def _probabilities(student: Tensor, teacher: Tensor, temperature: float, mode: str) -> tuple[Tensor, Tensor]:
    q = (student / temperature).softmax(1)
    p = (teacher.detach().to(student.dtype) / temperature).softmax(1)
    return q, p + DIVERGENCE_EPS if mode == "multi_stable" else p


def _softmax_parts(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The largest logit m of every row, and the inverse of sum exp((z - m) / T)."""
    most = logits.amax(1)
    return most, 1 / ((logits - most[:, None]) / temperature).exp().sum(1)
