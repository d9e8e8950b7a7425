"""Distillation of logits (arXiv 1503.02531)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LogitDistillation(nn.Module):
    r"""The student's softened class probabilities follow the teacher's.

    .. math::
        L = \frac{T^2}{B} \sum_b \mathrm{KL}(\mathrm{softmax}(z_t / T) \,\|\, \mathrm{softmax}(z_s / T))

    The factor :math:`T^2` keeps the size of the gradient when T changes.

    Args:
        temperature: T > 0.

    Shape:
        `loss(student_logits, teacher_logits)`, both `[B, classes]`, any floating dtype; the arithmetic is float32
        (float64 for float64), also under autocast. Result: a scalar; gradients flow to the student only.

    Source: Hinton, Vinyals and Dean, arXiv 1503.02531; `batchmean` reduction as in RepDistiller.
    """

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; expected a positive number")
        self.temperature = float(temperature)

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
        divergence = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
        return divergence * (self.temperature**2 / max(len(student_logits), 1))

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"
