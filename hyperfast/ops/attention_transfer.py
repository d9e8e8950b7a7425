"""`hyperfast::attention_transfer`: all taps in one grouped launch.

The backward needs one number per position and the student's maps. On the CPU the forward pass may already write the
gradients, sample by sample while a map is in the cache: three passes over memory instead of four.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from hyperfast import reference
from hyperfast.backends import Backend, Dispatcher, Implementation
from hyperfast.ops import _native, _taps, _triton
from hyperfast.ops._library import register
from hyperfast.reference.reduction import accumulator

_MODES = {name: code for code, name in enumerate(reference.MODES)}
_CUDA_MOST_POSITIONS = 4096  # of one map; a block keeps its attention map per group of lanes


def _cpu_supports(student: Sequence[Tensor], teacher: Sequence[Tensor], *_: Any) -> str | None:
    return _taps.cpu_supports([*student, *teacher])


def _cpu_supports_backward(_grad: Tensor, student: Sequence[Tensor], *_: Any) -> str | None:
    return _taps.cpu_supports(student)


def _cuda_supports_backward(_grad: Tensor, student: Sequence[Tensor], *_: Any) -> str | None:
    return _taps.cuda_supports(student)


def _cuda_supports(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    _p: int,
    _mode: str,
    _eps: float,
    expected_grad: Tensor | None = None,
) -> str | None:
    positions = max(s.shape[2:].numel() for s in student)
    if positions > _CUDA_MOST_POSITIONS:
        return f"a map of {positions} positions; shared memory holds {_CUDA_MOST_POSITIONS}"
    return _taps.no_expectation(expected_grad) or _taps.cuda_supports([*student, *teacher])


def _triton_supports(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    _p: int,
    _mode: str,
    _eps: float,
    expected_grad: Tensor | None = None,
) -> str | None:
    return _taps.no_expectation(expected_grad) or _triton_limits(student, teacher)


def _triton_limits(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> str | None:
    reason: str | None = _triton.missing(student[0].device)
    return reason or _triton.kernels("attention_transfer").supports(student, teacher)


def _triton_supports_backward(_grad: Tensor, student: Sequence[Tensor], *_: Any) -> str | None:
    return _triton_limits(student, student)


def _triton_forward(
    student: Sequence[Tensor], teacher: Sequence[Tensor], p: int, mode: str, eps: float, _expected_grad: None = None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    return (*_triton.kernels("attention_transfer").forward(student, teacher, p, mode, eps), [])


def _triton_backward(*arguments: Any) -> Any:
    return _triton.kernels("attention_transfer").backward(*arguments)


def _sizes(features: Tensor) -> dict[str, int]:
    return {"batch": features.shape[0], "positions": features.shape[2:].numel()}


def _map(side: str, features: Tensor) -> dict[str, int]:
    return {
        side: features.data_ptr(),
        f"{side}_channels": features.shape[1],
        f"{side}_last": _taps.is_channels_last(features),
    }


def _native_forward(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    p: int,
    mode: str,
    eps: float,
    expected_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    maps, teacher = [_taps.dense(s) for s in student], [_taps.dense(t) for t in teacher]
    dtype = accumulator(maps)
    losses = maps[0].new_empty(len(maps), dtype=dtype)
    coefficients = maps[0].new_empty(coefficient_count(maps), dtype=dtype)
    grad = None if expected_grad is None else expected_grad.contiguous()
    gradients = [] if grad is None else [_native.empty_like(s) for s in maps]
    first = 0
    for run in _taps.batches(len(maps)):
        params = _native.module().AttentionParams(
            dtype=_native.DTYPES[maps[0].dtype], mode=_MODES[mode], power=p, eps=eps
        )
        for s, t, d in zip_longest(maps[run], teacher[run], gradients[run]):
            address = 0 if d is None else d.data_ptr()
            params.add_tap(**_sizes(s), **_map("student", s), **_map("teacher", t), d_student=address)
        # One loss per sample, and the ticket of the CUDA launch behind them.
        scratch = losses.new_empty(sum(s.shape[0] for s in maps[run]) + 1)
        params.set_forward(losses[run].data_ptr(), scratch.data_ptr(), coefficients[first:].data_ptr())
        if grad is not None:
            params.set_backward(grad[run].data_ptr(), coefficients[first:].data_ptr(), _taps.past_caches(maps[run]))
        work = sum(features.numel() for features in (*maps[run], *teacher[run]))
        _native.launch("attention_transfer_forward", params, losses, work, scratch[-1:].data_ptr())
        first += coefficient_count(maps[run])
    return losses, coefficients, [_taps.strided_as(d, s) for d, s in zip(gradients, student, strict=False)]


def _native_backward(grad: Tensor, student: Sequence[Tensor], coefficients: Tensor, p: int) -> list[Tensor]:
    grad, coefficients = grad.contiguous(), coefficients.contiguous()
    maps = [_taps.dense(s) for s in student]
    gradients = [_native.empty_like(s) for s in maps]
    first = 0
    for run in _taps.batches(len(maps)):
        params = _native.module().AttentionParams(dtype=_native.DTYPES[maps[0].dtype], mode=0, power=p, eps=0.0)
        for s, d in zip(maps[run], gradients[run], strict=True):
            params.add_tap(**_sizes(s), **_map("student", s), d_student=d.data_ptr())
        params.set_backward(grad[run].data_ptr(), coefficients[first:].data_ptr(), _taps.past_caches(maps[run]))
        _native.launch("attention_transfer_backward", params, grad, sum(s.numel() for s in maps[run]))
        first += coefficient_count(maps[run])
    return [_taps.strided_as(d, s) for d, s in zip(gradients, student, strict=True)]


forward_implementations = Dispatcher(
    "attention_transfer",
    [
        Implementation(Backend.CUDA, _native_forward, _cuda_supports),
        Implementation(Backend.CPU, _native_forward, _cpu_supports),
        Implementation(Backend.TRITON, _triton_forward, _triton_supports),
        Implementation(Backend.REFERENCE, reference.attention_transfer_forward),
    ],
)
backward_implementations = Dispatcher(
    "attention_transfer_backward",
    [
        Implementation(Backend.CUDA, _native_backward, _cuda_supports_backward),
        Implementation(Backend.CPU, _native_backward, _cpu_supports_backward),
        Implementation(Backend.TRITON, _triton_backward, _triton_supports_backward),
        Implementation(Backend.REFERENCE, reference.attention_transfer_backward),
    ],
)


def coefficient_count(student: Sequence[Tensor]) -> int:
    """Positions of all taps together: sum of B * N."""
    return sum(s.shape[0] * s.shape[2:].numel() for s in student)


def _forward_fake(
    student: list[Tensor],
    teacher: list[Tensor],
    p: int,
    mode: str,
    eps: float,
    expected_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    dtype = accumulator(student)
    return (
        student[0].new_empty(len(student), dtype=dtype),
        student[0].new_empty(coefficient_count(student), dtype=dtype),
        [] if expected_grad is None else [torch.empty_like(s) for s in student],
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    student, _teacher, p, _mode, _eps, expected_grad = inputs
    _losses, coefficients, gradients = output
    ctx.p, ctx.taps = p, len(student)
    _taps.save(ctx, [*student, coefficients], expected_grad, gradients)
    ctx.mark_non_differentiable(coefficients, *gradients)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    gradients: list[Tensor] | list[None] | None = [None] * ctx.taps
    if grad is not None:
        (*student, coefficients), gradients = _taps.saved(ctx, grad)
        if gradients is None:
            gradients = attention_transfer_backward(grad, student, coefficients, ctx.p)
    return gradients, [None] * ctx.taps, None, None, None, None


attention_transfer = register(
    "attention_transfer(Tensor[] student, Tensor[] teacher, int p, str mode, float eps, "
    "Tensor? expected_grad) -> (Tensor, Tensor, Tensor[])",
    forward_implementations,
    _forward_fake,
    _backward,
    _save,
)
attention_transfer_backward = register(
    "attention_transfer_backward(Tensor grad, Tensor[] student, Tensor coefficients, int p) -> Tensor[]",
    backward_implementations,
    lambda grad, student, coefficients, p: [torch.empty_like(s) for s in student],
    _taps.no_double_backward("attention_transfer"),
    lambda ctx, inputs, output: None,
)
