"""`hyperfast::attention_transfer`: all taps in one grouped launch; the backward keeps one number per position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hyperfast import reference
from hyperfast.backends import Backend, Dispatcher, Implementation
from hyperfast.ops._library import accumulator_dtype, register


def _always(*_: Any) -> None:
    return None


forward_implementations = Dispatcher(
    "attention_transfer", [Implementation(Backend.REFERENCE, reference.attention_transfer_with_coefficients, _always)]
)
backward_implementations = Dispatcher(
    "attention_transfer_backward",
    [Implementation(Backend.REFERENCE, reference.attention_transfer_backward, _always)],
)


def coefficient_count(student: Sequence[Tensor]) -> int:
    """Positions of all taps together: sum of B * N."""
    return sum(s.shape[0] * s.shape[2:].numel() for s in student)


def accumulator(student: Sequence[Tensor]) -> torch.dtype:
    """float64 as soon as one map is, else float32."""
    return torch.float64 if any(accumulator_dtype(s.dtype) == torch.float64 for s in student) else torch.float32


def _forward_fake(student: list[Tensor], teacher: list[Tensor], p: int, mode: str, eps: float) -> tuple[Tensor, Tensor]:
    dtype = accumulator(student)
    return (
        student[0].new_empty(len(student), dtype=dtype),
        student[0].new_empty(coefficient_count(student), dtype=dtype),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    student, _teacher, p, _mode, _eps = inputs
    ctx.save_for_backward(*student, output[1])
    ctx.p = p
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _grad_coefficients: Tensor | None) -> tuple[Any, ...]:
    *student, coefficients = ctx.saved_tensors
    gradients = attention_transfer_backward(grad, student, coefficients, ctx.p)
    return gradients, [None] * len(student), None, None, None


def _no_double_backward(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(
        "attention_transfer has no fused second derivative; compute it inside hyperfast.use_backend('reference')"
    )


attention_transfer = register(
    "attention_transfer(Tensor[] student, Tensor[] teacher, int p, str mode, float eps) -> (Tensor, Tensor)",
    forward_implementations,
    _forward_fake,
    _backward,
    _save,
)
attention_transfer_backward = register(
    "attention_transfer_backward(Tensor grad, Tensor[] student, Tensor coefficients, int p) -> Tensor[]",
    backward_implementations,
    lambda grad, student, coefficients, p: [torch.empty_like(s) for s in student],
    _no_double_backward,
    lambda ctx, inputs, output: None,
)
