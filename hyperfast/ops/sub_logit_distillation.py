"""`hyperfast::sub_logit_distillation`: labels, teacher, student and sub-logits compared in one launch.

The forward pass writes the gradients of the total while the logits are on chip; the backward pass only scales them, and
on the CPU not even that where the total is what is differentiated. Second derivatives are those of the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hyperfast import reference
from hyperfast.backends import Backend, Dispatcher, Implementation
from hyperfast.ops import _native, _taps
from hyperfast.ops._library import accumulator_dtype, differentiate, register

_TENSORS = "Tensor student, Tensor teacher, Tensor sub_logits, Tensor labels, Tensor weights"
_OPTIONS = (
    "float label_smoothing, float temperature, float lambda_s, float lambda_t, float theta, bool detach_target, "
    "bool fused, bool mean"
)
_COUNT = 8  # of options


def _native_limits(student: Tensor, teacher: Tensor, sub_logits: Tensor) -> str | None:
    if len({student.dtype, teacher.dtype, sub_logits.dtype}) > 1:
        return "the logits are of several dtypes"
    if not sub_logits.numel():
        return "there are no logits"
    most = _native.module().most_sub_logits
    return f"a stage has more than {most} sub-logits" if sub_logits.shape[2] > most else None


def _cpu_supports(student: Tensor, teacher: Tensor, sub_logits: Tensor, *_: Any) -> str | None:
    reason = _native.missing() or _native.wrong_device(student, "cpu")
    return reason or _native_limits(student, teacher, sub_logits)


def _cuda_supports(student: Tensor, teacher: Tensor, sub_logits: Tensor, *_: Any) -> str | None:
    reason = _native.wrong_device(student, "cuda") or _native.missing_cuda()
    reason = reason or _native_limits(student, teacher, sub_logits)
    if reason is None and student.dtype == torch.float64:
        reason = "the logits are torch.float64; the CUDA kernels sum in float32"
    return reason


def _native_forward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, stages, count, classes = sub_logits.shape
    total, components, d_student, d_sub_logits = _fake(student, teacher, sub_logits)
    held = [x.contiguous() for x in (student, teacher, sub_logits, labels, weights.to(total.dtype))]
    ahead = [_native.empty_like(held[0]), _native.empty_like(held[2])]
    # Five numbers per sample, and the ticket of the CUDA launch behind them.
    shares = total.new_empty(len(reference.SUB_LOGIT_COMPONENTS) * rows + 1)
    sums = total.new_empty((rows, classes) if student.is_cuda else 0)
    params = _native.module().SubLogitParams(
        dtype=_native.DTYPES[student.dtype],
        detach=detach_target,
        fused=fused,
        mean=mean,
        temperature=temperature,
        smoothing=label_smoothing,
        lambda_s=lambda_s,
        lambda_t=lambda_t,
        theta=theta,
        rows=rows,
        stages=stages,
        count=count,
        classes=classes,
        student=held[0].data_ptr(),
        teacher=held[1].data_ptr(),
        sub_logits=held[2].data_ptr(),
        labels=held[3].data_ptr(),
        weights=held[4].data_ptr(),
    )
    params.set_results(
        total=total.data_ptr(),
        components=components.data_ptr(),
        shares=shares.data_ptr(),
        sums=sums.data_ptr(),
        d_student=ahead[0].data_ptr(),
        d_sub_logits=ahead[1].data_ptr(),
        stream=_taps.past_caches([sub_logits]),
    )
    _native.launch("sub_logit_distillation", params, student, sub_logits.numel(), shares[-1:].data_ptr())
    return total, components, _laid(ahead[0], d_student), _laid(ahead[1], d_sub_logits)


def _laid(gradient: Tensor, like: Tensor) -> Tensor:
    """`gradient` with the strides of `like`, which the fake kernel promised."""
    return gradient if like.is_contiguous() else like.copy_(gradient)


def _fake(student: Tensor, _teacher: Tensor, sub_logits: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulator_dtype(student.dtype)
    components = student.new_empty(len(reference.SUB_LOGIT_COMPONENTS), dtype=dtype)
    return student.new_empty((), dtype=dtype), components, torch.empty_like(student), torch.empty_like(sub_logits)


def _reference_forward(student: Tensor, teacher: Tensor, sub_logits: Tensor, *others: Any) -> tuple[Tensor, ...]:
    total, components, *gradients = reference.sub_logit_distillation_forward(student, teacher, sub_logits, *others)
    laid = [torch.empty_like(x).copy_(g) for x, g in zip((student, sub_logits), gradients, strict=True)]
    return total, components, *laid


implementations = Dispatcher(
    "sub_logit_distillation",
    [
        Implementation(Backend.CUDA, _native_forward, _cuda_supports),
        Implementation(Backend.CPU, _native_forward, _cpu_supports),
        Implementation(Backend.REFERENCE, _reference_forward),
    ],
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    tensors, ctx.options = inputs[:-_COUNT], inputs[-_COUNT:]
    _total, components, *gradients = output
    ctx.save_for_backward(*tensors, *gradients)
    ctx.mark_non_differentiable(components, *gradients)
    ctx.set_materialize_grads(False)  # no zeros as large as the logits for outputs that have no gradient


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    none = (None,) * _COUNT
    if grad is None:
        return (None,) * 5 + none
    *tensors, d_student, d_sub_logits = ctx.saved_tensors
    unscaled = (
        type(grad) is Tensor  # while a graph is traced it has no numbers
        and grad.device.type == "cpu"  # looking at them would wait for a GPU
        and not torch.is_grad_enabled()  # a gradient that is differentiated again needs its graph
        and bool(grad == 1)
    )
    if not unscaled:
        d_student, d_sub_logits = sub_logit_distillation_backward(grad, *tensors, d_student, d_sub_logits, *ctx.options)
    return (d_student, None, d_sub_logits, None, None, *none)


def _scale(grad: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    scaled = [torch.empty_like(gradient).copy_(gradient * grad) for gradient in others[5:7]]
    return scaled[0], scaled[1]


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.options = inputs[-_COUNT:]
    ctx.save_for_backward(*inputs[:6])


def _double_backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
    grad, student, teacher, sub_logits, labels, weights = ctx.saved_tensors

    def scaled(grad: Tensor, student: Tensor, sub_logits: Tensor) -> tuple[Tensor, ...]:
        found = reference.sub_logit_distillation_gradients(student, teacher, sub_logits, labels, weights, *ctx.options)
        return tuple(grad.to(gradient.dtype) * gradient for gradient in found)

    by_grad, by_student, by_sub_logits = differentiate(scaled, (grad, student, sub_logits), gradients)
    return (by_grad, by_student, None, by_sub_logits, *(None,) * (4 + _COUNT))


sub_logit_distillation = register(
    f"sub_logit_distillation({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    implementations,
    _fake,
    _backward,
    _save,
)
sub_logit_distillation_backward = register(
    f"sub_logit_distillation_backward(Tensor grad, {_TENSORS}, Tensor d_student, Tensor d_sub_logits, {_OPTIONS}) "
    "-> (Tensor, Tensor)",
    _scale,
    lambda _grad, *others: (torch.empty_like(others[5]), torch.empty_like(others[6])),
    _double_backward,
    _save_backward,
)
