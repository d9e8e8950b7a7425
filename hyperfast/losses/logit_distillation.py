"""Distillation of logits (arXiv 1503.02531), alone and together with cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hyperfast import functional
from hyperfast.functional.cross_entropy_distillation import check_options


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

        With cross-entropy next to it, `CrossEntropyDistillation` does both in one pass over the logits.

    Source: Hinton, Vinyals and Dean, arXiv 1503.02531; `batchmean` reduction as in RepDistiller. Stable modes: the
    code of NeRN, arXiv 2212.13554 (maorash/NeRN).
    """

    def __init__(self, temperature: float = 4.0, mode: str = "kl") -> None:
        super().__init__()
        check_options(temperature, mode)
        self.temperature, self.mode = float(temperature), mode

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """The loss, a scalar.

        Raises:
            ValueError: logits of different shapes or devices, or not `[B, classes]`.
        """
        losses = functional.cross_entropy_distillation(
            student_logits, teacher_logits, temperature=self.temperature, mode=self.mode
        )
        return losses[1]

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}" + (f", mode={self.mode!r}" if self.mode != "kl" else "")


class CrossEntropyDistillation(nn.Module):
    r"""Cross-entropy with the labels and distillation of the teacher's logits, in one pass over both networks' logits.

    .. math::
        L = w_{ce} \, \mathrm{CE}(z_s, labels) + w_{kd} \, L_{KD}(z_s, z_t)

    with :math:`L_{KD}` as in `LogitDistillation` and CE the mean of `torch.nn.functional.cross_entropy`.

    Args:
        cross_entropy_weight: :math:`w_{ce}`.
        kd_weight: :math:`w_{kd}`.
        temperature: T > 0, of the distillation.
        mode: of the distillation: `"kl"`, `"stable"` or `"multi_stable"`.
        label_smoothing: of the cross-entropy, from 0 to 1.
        ignore_index: the label of rows that have none; they count for the distillation alone.

    Attributes:
        last: the unweighted losses `[2]` of the last forward, cross-entropy and distillation, detached and still on
            the device: reading them to a log is what waits, and is left to the caller.

    Shape:
        `loss(student_logits, labels, teacher_logits)`: floats `[B, classes]`, int64 `[B]`, floats `[B, classes]` or
        None, which leaves the distillation out. The arithmetic is float32 (float64 for float64), also under autocast.
        Result: a scalar; gradients flow to the student only.

    Notes:
        On the CPU the forward pass writes the gradient while a row is in the cache. A factor in front of the loss is
        right too, but has it computed anew: give the weights here.

    Example:
        >>> loss = CrossEntropyDistillation(kd_weight=0.9, cross_entropy_weight=0.1)
        >>> loss(student(images), labels, teacher_logits).backward()
        >>> cross_entropy, kd = loss.last.tolist()

    Source: Hinton, Vinyals and Dean, arXiv 1503.02531.
    """

    def __init__(
        self,
        cross_entropy_weight: float = 1.0,
        kd_weight: float = 1.0,
        temperature: float = 4.0,
        mode: str = "kl",
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        check_options(temperature, mode, label_smoothing)
        self.cross_entropy_weight, self.kd_weight = cross_entropy_weight, kd_weight
        self.temperature, self.mode = float(temperature), mode
        self.label_smoothing, self.ignore_index = label_smoothing, ignore_index
        self.last: Tensor | None = None
        self._weights: tuple[object, Tensor] | None = None

    def forward(self, student_logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None) -> Tensor:
        """The weighted sum, a scalar.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit together.
            IndexError: on the CPU, a label that is none of the classes.
        """
        weights = self._resolve(student_logits)
        losses = functional.cross_entropy_distillation(
            student_logits,
            teacher_logits,
            labels,
            temperature=self.temperature,
            mode=self.mode,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            expected_grad=weights,
        )
        self.last = losses.detach()
        return torch.dot(losses, weights)

    def _resolve(self, like: Tensor) -> Tensor:
        """Both weights on the device of the logits; a copy there each step would wait for it."""
        dtype = torch.promote_types(torch.float32, like.dtype)
        wanted = (self.cross_entropy_weight, self.kd_weight, like.device, dtype)
        if self._weights is None or self._weights[0] != wanted:
            self._weights = wanted, torch.tensor(wanted[:2], device=like.device, dtype=dtype)
        return self._weights[1]

    def extra_repr(self) -> str:
        return (
            f"cross_entropy_weight={self.cross_entropy_weight}, kd_weight={self.kd_weight}, "
            f"temperature={self.temperature}, mode={self.mode!r}, label_smoothing={self.label_smoothing}"
        )
