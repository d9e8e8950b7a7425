"""Distillation of logits (arXiv 1503.02531)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MODES = ("kl", "stable", "multi_stable")
_EPS = 1e-4  # NeRN's; part of the loss, since probabilities below it pull the student no further


class LogitDistillation(nn.Module):
    r"""The student's softened class probabilities follow the teacher's.

    With :math:`p = \mathrm{softmax}(z_t / T)`, :math:`q = \mathrm{softmax}(z_s / T)` and :math:`\epsilon = 10^{-4}`:

    .. math::
        L_{kl} = \frac{T^2}{B} \sum_b \sum_k p \log \frac{p}{q}, \quad
        L_{stable} = \frac{T^2}{B} \sum_b \sum_k p \log \frac{p}{q + \epsilon}, \quad
        L_{multi} = \frac{T^2}{B} \sum_b \sum_k (p + \epsilon) \log \frac{p + \epsilon}{q + \epsilon}

    The factor :math:`T^2` keeps the size of the gradient when T changes.

    Args:
        temperature: T > 0.
        mode: `"kl"`, the divergence; `"stable"`, which bounds the gradient of a class that the student thinks
            impossible; `"multi_stable"`, the same with both sides raised.

    Shape:
        `loss(student_logits, teacher_logits)`, both `[B, classes]`, any floating dtype; the arithmetic is float32
        (float64 for float64), also under autocast. Result: a scalar; gradients flow to the student only.

    Notes:
        NeRN's losses: `KLDivLoss` is `temperature=1`, `StableKLDivLoss` (which all its configurations use) is
        `temperature=1, mode="stable"`, `TempStableKLDivLoss` is `temperature=2, mode="stable"`, and
        `MultiStableKLDivLoss` is `temperature=1, mode="multi_stable"`. The two stable modes are no divergences: they
        may be slightly negative, and are not 0 where p = q.

    Source: Hinton, Vinyals and Dean, arXiv 1503.02531; `batchmean` reduction as in RepDistiller. Stable modes: the
    code of NeRN, arXiv 2212.13554 (maorash/NeRN).
    """

    def __init__(self, temperature: float = 4.0, mode: str = "kl") -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; expected a positive number")
        if mode not in _MODES:
            raise ValueError(f"mode is {mode!r}; choose one of {', '.join(map(repr, _MODES))}")
        self.temperature, self.mode = float(temperature), mode

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """The loss, a scalar.

        Raises:
            ValueError: logits of different shapes or devices, or not `[B, classes]`.
        """
        if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
            raise ValueError(
                f"student_logits are {list(student_logits.shape)}, teacher_logits {list(teacher_logits.shape)}; "
                "expected [B, classes] for both: the same images and the same classes"
            )
        if student_logits.device != teacher_logits.device:
            raise ValueError(
                f"student_logits are on {student_logits.device}, teacher_logits on {teacher_logits.device}; "
                "move one with .to(device)"
            )
        dtype = torch.promote_types(torch.float32, student_logits.dtype)
        log_student = F.log_softmax(student_logits.to(dtype) / self.temperature, dim=1)
        log_teacher = F.log_softmax(teacher_logits.detach().to(dtype) / self.temperature, dim=1)
        if self.mode != "kl":
            log_student = (log_student.exp() + _EPS).log()
        if self.mode == "multi_stable":
            log_teacher = (log_teacher.exp() + _EPS).log()
        divergence = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
        return divergence * (self.temperature**2 / max(len(student_logits), 1))

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}" + (f", mode={self.mode!r}" if self.mode != "kl" else "")
