"""`hyperfast::cross_entropy_distillation`: cross-entropy and logit distillation in one launch.

The backward needs six numbers per row and the logits. On the CPU the forward pass may already write the gradient, row
by row while the logits are in the cache. It is right only for the upstream gradient that was expected; any other makes
the backward compute it anew. Where none was expected it is an empty tensor: a list of none would cost 60 us a step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hyperfast import reference
from hyperfast.backends import Backend, Dispatcher, Implementation
from hyperfast.ops import _native, _taps
from hyperfast.ops._library import accumulator_dtype, differentiate, register

_DIVERGENCES = {name: code for code, name in enumerate(reference.DIVERGENCES)}
_OPTIONS = "float temperature, str mode, float label_smoothing, int ignore_index"


def _native_limits(student: Tensor, teacher: Tensor | None) -> str | None:
    if teacher is not None and teacher.dtype != student.dtype:
        return "the logits are of two dtypes"
    return "there are no logits" if student.numel() == 0 else None


def _cpu_supports(student: Tensor, teacher: Tensor | None, *_: Any) -> str | None:
    return _native.missing() or _native.wrong_device(student, "cpu") or _native_limits(student, teacher)


def _cpu_supports_backward(_grad: Tensor, student: Tensor, teacher: Tensor | None, *_: Any) -> str | None:
    return _cpu_supports(student, teacher)


def _cuda_limits(student: Tensor, teacher: Tensor | None) -> str | None:
    reason = _native.wrong_device(student, "cuda") or _native.missing_cuda() or _native_limits(student, teacher)
    if reason is None and student.dtype == torch.float64:
        reason = "the logits are torch.float64; the CUDA kernels sum in float32"
    return reason


def _cuda_supports(student: Tensor, teacher: Tensor | None, *options: Any) -> str | None:
    # Comparing with the upstream gradient would wait for a GPU.
    unexpected = None if options[-1] is None else "expected_grad is for the CPU"
    return _cuda_limits(student, teacher) or unexpected


def _cuda_supports_backward(_grad: Tensor, student: Tensor, teacher: Tensor | None, *_: Any) -> str | None:
    return _cuda_limits(student, teacher)


def _params(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    statistics: Tensor,
    temperature: float,
    mode: str,
    label_smoothing: float,
    ignore_index: int,
) -> Any:
    return _native.module().LogitParams(
        dtype=_native.DTYPES[student.dtype],
        divergence=_DIVERGENCES[mode],
        temperature=temperature,
        smoothing=label_smoothing,
        rows=student.shape[0],
        classes=student.shape[1],
        student=student.data_ptr(),
        teacher=0 if teacher is None else teacher.data_ptr(),
        labels=0 if labels is None else labels.data_ptr(),
        ignored=ignore_index,
        statistics=statistics.data_ptr(),
    )


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if x is None else x.contiguous() for x in tensors]


def _work(student: Tensor, teacher: Tensor | None) -> int:
    return student.numel() * (1 if teacher is None else 2)


def _native_forward(
    student: Tensor, teacher: Tensor | None, labels: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *options, expected_grad = others
    logits, teacher, labels, grad = _contiguous(student, teacher, labels, expected_grad)
    losses, statistics = _results(logits)
    # Three numbers per row, and the ticket of the CUDA launch behind them.
    scratch = losses.new_empty(3 * len(logits) + 1)
    params = _params(logits, teacher, labels, statistics, *options)
    params.set_forward(losses.data_ptr(), scratch.data_ptr())
    gradient = logits.new_empty(0)
    if grad is not None:
        gradient = _native.empty_like(logits)
        params.set_backward(grad.data_ptr(), gradient.data_ptr(), _taps.past_caches([logits]))
    ticket = scratch[-1:].data_ptr()
    _native.launch("cross_entropy_distillation_forward", params, logits, _work(logits, teacher), ticket)
    return losses, statistics, gradient if grad is None else _strided_as(gradient, student)


def _native_backward(
    grad: Tensor, student: Tensor, teacher: Tensor | None, labels: Tensor | None, statistics: Tensor, *options: Any
) -> Tensor:
    logits, teacher, labels, statistics, grad = _contiguous(student, teacher, labels, statistics, grad)
    gradient = _native.empty_like(logits)
    params = _params(logits, teacher, labels, statistics, *options)
    params.set_backward(grad.data_ptr(), gradient.data_ptr(), _taps.past_caches([logits]))
    _native.launch("cross_entropy_distillation_backward", params, logits, _work(logits, teacher))
    return _strided_as(gradient, student)


def _strided_as(gradient: Tensor, student: Tensor) -> Tensor:
    """`gradient` with the strides that `torch.empty_like(student)` has, which the fake kernel promised."""
    return gradient if student.is_contiguous() else torch.empty_like(student).copy_(gradient)


def _results(student: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and statistics, uninitialised."""
    dtype = accumulator_dtype(student.dtype)
    count = reference.LOGIT_STATISTICS * student.shape[0] + 1
    return student.new_empty(2, dtype=dtype), student.new_empty(count, dtype=dtype)


forward_implementations = Dispatcher(
    "cross_entropy_distillation",
    [
        Implementation(Backend.CUDA, _native_forward, _cuda_supports),
        Implementation(Backend.CPU, _native_forward, _cpu_supports),
        Implementation(Backend.REFERENCE, reference.cross_entropy_distillation_forward),
    ],
)
backward_implementations = Dispatcher(
    "cross_entropy_distillation_backward",
    [
        Implementation(Backend.CUDA, _native_backward, _cuda_supports_backward),
        Implementation(Backend.CPU, _native_backward, _cpu_supports_backward),
        Implementation(Backend.REFERENCE, reference.cross_entropy_distillation_backward),
    ],
)


def _forward_fake(
    student: Tensor, teacher: Tensor | None, labels: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return (*_results(student), student.new_empty(0) if options[-1] is None else torch.empty_like(student))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, labels, *ctx.options, expected_grad = inputs
    _losses, statistics, gradient = output
    ctx.save_for_backward(student, teacher, labels, statistics, expected_grad, gradient)
    ctx.mark_non_differentiable(statistics, gradient)
    ctx.set_materialize_grads(False)  # no zeros as large as the logits for outputs that have no gradient


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 8
    *inputs, expected_grad, gradient = ctx.saved_tensors
    as_expected = (
        expected_grad is not None
        and type(grad) is Tensor  # while a graph is traced it has no numbers
        and not torch.is_grad_enabled()  # a gradient that is differentiated again needs its graph
        and torch.equal(grad, expected_grad)
    )
    if not as_expected:
        gradient = cross_entropy_distillation_backward(grad, *inputs, *ctx.options)
    return (gradient, *(None,) * 7)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, student, teacher, labels, statistics, *ctx.options = inputs
    ctx.save_for_backward(grad, student, teacher, labels, statistics)


def _double_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    grad, student, *others = ctx.saved_tensors

    def backward(grad: Tensor, student: Tensor) -> Tensor:
        return reference.cross_entropy_distillation_backward(grad, student, *others, *ctx.options)

    return (*differentiate(backward, (grad, student), [gradient]), *(None,) * 7)


cross_entropy_distillation = register(
    f"cross_entropy_distillation(Tensor student, Tensor? teacher, Tensor? labels, {_OPTIONS}, "
    "Tensor? expected_grad) -> (Tensor, Tensor, Tensor)",
    forward_implementations,
    _forward_fake,
    _backward,
    _save,
)
cross_entropy_distillation_backward = register(
    f"cross_entropy_distillation_backward(Tensor grad, Tensor student, Tensor? teacher, Tensor? labels, "
    f"Tensor statistics, {_OPTIONS}) -> Tensor",
    backward_implementations,
    lambda grad, student, *_: torch.empty_like(student),
    _double_backward,
    _save_backward,
)
