"""`hyperfast::attention_transfer`: all taps in one grouped launch.

The backward needs one number per position and the student's maps. On the CPU the forward pass may already write the
gradients, sample by sample while a map is in the cache: three passes over memory instead of four. They are right only
for the upstream gradient that was expected; any other makes the backward compute them anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from hyperfast import reference
from hyperfast.backends import Backend, Dispatcher, Implementation
from hyperfast.ops import _native, _triton
from hyperfast.ops._library import accumulator, register

_MODES = {name: code for code, name in enumerate(reference.MODES)}
_CUDA_MOST_POSITIONS = 4096  # of one map; a block keeps its attention map per group of lanes


def _native_limits(maps: Sequence[Tensor]) -> str | None:
    if len({features.dtype for features in maps}) > 1:
        return "the maps are of different dtypes"
    if any(features.numel() == 0 for features in maps):
        return "a map is empty"
    return None


def _cpu_supports(student: Sequence[Tensor], teacher: Sequence[Tensor], *_: Any) -> str | None:
    reason = _native.missing() or _native.wrong_device(student[0], "cpu")
    return reason or _native_limits([*student, *teacher])


def _cpu_supports_backward(_grad: Tensor, student: Sequence[Tensor], *_: Any) -> str | None:
    return _cpu_supports(student, [])


def _cuda_supports_backward(_grad: Tensor, student: Sequence[Tensor], *_: Any) -> str | None:
    reason = _native.wrong_device(student[0], "cuda") or _native.missing_cuda() or _native_limits(student)
    if reason is None and student[0].dtype == torch.float64:
        reason = "the maps are torch.float64; the CUDA kernels sum in float32"
    return reason


def _without_expectation(expected_grad: Tensor | None) -> str | None:
    """Comparing with the upstream gradient would wait for a GPU."""
    return None if expected_grad is None else "expected_grad is for the CPU"


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
    return _without_expectation(expected_grad) or _cuda_supports_backward(student[0], [*student, *teacher])


def _triton_supports(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    _p: int,
    _mode: str,
    _eps: float,
    expected_grad: Tensor | None = None,
) -> str | None:
    return _without_expectation(expected_grad) or _triton_limits(student, teacher)


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
        f"{side}_last": _native.is_channels_last(features),
    }


def _batches(taps: int) -> list[slice]:
    """Runs of taps that one launch takes."""
    most = _native.module().max_taps
    return [slice(first, min(first + most, taps)) for first in range(0, taps, most)]


def _native_forward(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    p: int,
    mode: str,
    eps: float,
    expected_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    maps, teacher = [_native.dense(s) for s in student], [_native.dense(t) for t in teacher]
    dtype = accumulator(maps)
    losses = maps[0].new_empty(len(maps), dtype=dtype)
    coefficients = maps[0].new_empty(coefficient_count(maps), dtype=dtype)
    grad = None if expected_grad is None else expected_grad.contiguous()
    gradients = [] if grad is None else [_native.empty_like(s) for s in maps]
    first = 0
    for run in _batches(len(maps)):
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
            params.set_backward(grad[run].data_ptr(), coefficients[first:].data_ptr(), _native.past_caches(maps[run]))
        work = sum(features.numel() for features in (*maps[run], *teacher[run]))
        _native.launch("attention_transfer_forward", params, losses, work, scratch[-1:].data_ptr())
        first += coefficient_count(maps[run])
    return losses, coefficients, [_native.strided_as(d, s) for d, s in zip(gradients, student, strict=False)]


def _native_backward(grad: Tensor, student: Sequence[Tensor], coefficients: Tensor, p: int) -> list[Tensor]:
    grad, coefficients = grad.contiguous(), coefficients.contiguous()
    maps = [_native.dense(s) for s in student]
    gradients = [_native.empty_like(s) for s in maps]
    first = 0
    for run in _batches(len(maps)):
        params = _native.module().AttentionParams(dtype=_native.DTYPES[maps[0].dtype], mode=0, power=p, eps=0.0)
        for s, d in zip(maps[run], gradients[run], strict=True):
            params.add_tap(**_sizes(s), **_map("student", s), d_student=d.data_ptr())
        params.set_backward(grad[run].data_ptr(), coefficients[first:].data_ptr(), _native.past_caches(maps[run]))
        _native.launch("attention_transfer_backward", params, grad, sum(s.numel() for s in maps[run]))
        first += coefficient_count(maps[run])
    return [_native.strided_as(d, s) for d, s in zip(gradients, student, strict=True)]


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
    if expected_grad is None:
        ctx.save_for_backward(*student, coefficients)
    else:
        ctx.save_for_backward(*student, coefficients, expected_grad, *gradients)
    ctx.mark_non_differentiable(coefficients, *gradients)
    ctx.set_materialize_grads(False)  # no zeros as large as the maps for outputs that have no gradient


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return [None] * ctx.taps, [None] * ctx.taps, None, None, None, None
    student, coefficients = ctx.saved_tensors[: ctx.taps], ctx.saved_tensors[ctx.taps]
    expected_grad, *gradients = ctx.saved_tensors[ctx.taps + 1 :] or [None]
    as_expected = (
        expected_grad is not None
        and type(grad) is Tensor  # while a graph is traced it has no numbers
        and not torch.is_grad_enabled()  # a gradient that is differentiated again needs its graph
        and torch.equal(grad, expected_grad)
    )
    if not as_expected:
        gradients = attention_transfer_backward(grad, student, coefficients, ctx.p)
    return gradients, [None] * ctx.taps, None, None, None, None


def _no_double_backward(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(
        "attention_transfer has no fused second derivative; compute it inside hyperfast.use_backend('reference')"
    )


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
    _no_double_backward,
    lambda ctx, inputs, output: None,
)
