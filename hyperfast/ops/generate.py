"""`hyperfast::generate`: condition -> encoding -> trunk -> head + theta0, and its one-pass backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hyperfast import reference
from hyperfast.backends import Backend, Dispatcher, Implementation
from hyperfast.ops import _native, _triton
from hyperfast.ops._library import accumulator_dtype, differentiate, register

_ARGUMENTS = (
    "Tensor condition, Tensor[] trunk_weights, Tensor[] trunk_biases, Tensor head, {}Tensor? offsets, "
    "str encoding, str activation, float negative_slope"
)


_ENCODINGS = {name: code for code, name in enumerate(reference.ENCODINGS)}
_ACTIVATIONS = {name: code for code, name in enumerate(reference.ACTIVATIONS)}

_CPU_CHUNK_BYTES = 1 << 21  # of the head per work item: many items per thread, few partial sums
_CUDA_BLOCKS_PER_PROCESSOR = 4
# A CUDA block keeps the trunk of every condition, and a share of dh per group of lanes, in shared memory.
_CUDA_MOST_CONDITIONS = 8
_CUDA_MOST_FEATURES = 512
_CUDA_MOST_TRUNK = 1024


def _native_limits(condition: Tensor, trunk_weights: Sequence[Tensor], head: Tensor) -> str | None:
    most = _native.module().max_layers
    if len(trunk_weights) > most:
        return f"{len(trunk_weights)} trunk layers; the native kernels take up to {most}"
    if 0 in (*condition.shape, *head.shape):
        return "there is nothing to generate"
    return None


def _cpu_supports_backward(
    _grad: Tensor, condition: Tensor, trunk_weights: Sequence[Tensor], _biases: Sequence[Tensor], head: Tensor, *_: Any
) -> str | None:
    reason = _native.missing() or _native.wrong_device(head, "cpu")
    if reason is None and head.dtype not in (torch.float32, torch.float64):
        reason = f"the weights are {head.dtype}; the CPU kernels take float32 and float64"
    return reason or _native_limits(condition, trunk_weights, head)


def _cpu_supports(condition: Tensor, *arguments: Any) -> str | None:
    return _cpu_supports_backward(condition, condition, *arguments)


def _cuda_supports_backward(
    _grad: Tensor, condition: Tensor, trunk_weights: Sequence[Tensor], _biases: Sequence[Tensor], head: Tensor, *_: Any
) -> str | None:
    reason = _native.wrong_device(head, "cuda") or _native.missing_cuda()
    if reason is None and head.dtype == torch.float64:
        reason = "the weights are torch.float64; the CUDA kernels sum in float32"
    if reason is None and condition.shape[0] > _CUDA_MOST_CONDITIONS:
        reason = f"{condition.shape[0]} conditions; above {_CUDA_MOST_CONDITIONS} this is a matrix product"
    trunk = sum(weight.shape[0] for weight in trunk_weights)
    if reason is None and (head.shape[1] > _CUDA_MOST_FEATURES or trunk > _CUDA_MOST_TRUNK):
        reason = (
            f"{head.shape[1]} features and {trunk} hidden units; "
            f"shared memory holds {_CUDA_MOST_FEATURES} and {_CUDA_MOST_TRUNK}"
        )
    return reason or _native_limits(condition, trunk_weights, head)


def _cuda_supports(condition: Tensor, *arguments: Any) -> str | None:
    return _cuda_supports_backward(condition, condition, *arguments)


def _triton_supports(condition: Tensor, *arguments: Any) -> str | None:
    reason: str | None = _triton.missing(condition.device)
    return reason or _triton.kernels("generate").supports(condition, *arguments)


def _triton_supports_backward(_grad: Tensor, *arguments: Any) -> str | None:
    return _triton_supports(*arguments)


def _triton_forward(*arguments: Any) -> Any:
    return _triton.kernels("generate").forward(*arguments)


def _triton_backward(*arguments: Any) -> Any:
    return _triton.kernels("generate").backward(*arguments)


def _chunk(head: Tensor) -> int:
    """Head rows of one work item. On the CPU no function of the number of threads, which results must not depend on."""
    rows, hidden = head.shape
    if head.device.type == "cpu":
        return max(16, _CPU_CHUNK_BYTES // (hidden * head.element_size()))
    # One chunk per block of a grid that fills the device once: each block computes the trunk once.
    return max(16, -(-rows // (_native.processors(head) * _CUDA_BLOCKS_PER_PROCESSOR)))


def _params(
    condition: Tensor,
    trunk_weights: Sequence[Tensor],
    trunk_biases: Sequence[Tensor],
    head: Tensor,
    offsets: Tensor | None,
    encoding: str,
    activation: str,
    negative_slope: float,
) -> Any:
    batch, segments, size = condition.shape
    return _native.module().GenerateParams(
        dtype=_native.DTYPES[head.dtype],
        encoding=_ENCODINGS[encoding],
        activation=_ACTIVATIONS[activation],
        negative_slope=negative_slope,
        batch=batch,
        segments=segments,
        condition_size=size,
        rows=head.shape[0],
        hidden=head.shape[1],
        widths=[weight.shape[0] for weight in trunk_weights],
        weights=[weight.data_ptr() for weight in trunk_weights],
        biases=[bias.data_ptr() for bias in trunk_biases],
        condition=condition.data_ptr(),
        head=head.data_ptr(),
        offsets=0 if offsets is None else offsets.data_ptr(),
        chunk=_chunk(head),
    )


def _native_forward(
    condition: Tensor,
    trunk_weights: Sequence[Tensor],
    trunk_biases: Sequence[Tensor],
    head: Tensor,
    theta0: Tensor,
    offsets: Tensor | None,
    encoding: str,
    activation: str,
    negative_slope: float,
) -> Tensor:
    condition, head, theta0 = condition.contiguous(), head.contiguous(), theta0.contiguous()
    weights, biases = [w.contiguous() for w in trunk_weights], [b.contiguous() for b in trunk_biases]
    theta = _native.empty((condition.shape[0], head.shape[0]), head)
    params = _params(condition, weights, biases, head, offsets, encoding, activation, negative_slope)
    params.set_forward(theta0.data_ptr(), theta.data_ptr())
    _native.launch("generate_forward", params, head, head.numel())
    return theta


def _native_backward(
    grad: Tensor,
    condition: Tensor,
    trunk_weights: Sequence[Tensor],
    trunk_biases: Sequence[Tensor],
    head: Tensor,
    offsets: Tensor | None,
    encoding: str,
    activation: str,
    negative_slope: float,
    head_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad, condition, head = grad.contiguous(), condition.contiguous(), head.contiguous()
    weights, biases = [w.contiguous() for w in trunk_weights], [b.contiguous() for b in trunk_biases]
    d_condition = condition.new_empty(condition.shape)
    d_trunk = head.new_empty(trunk_size(weights))
    d_head = _native.empty(head.shape if head_gradient else (0,), head)
    params = _params(condition, weights, biases, head, offsets, encoding, activation, negative_slope)
    # The last element is the ticket by which a CUDA block learns that it is the last one.
    dtype = accumulator_dtype(head.dtype)
    workspace = _native.empty((params.workspace_size + 1,), head, dtype)
    params.set_backward(
        grad.data_ptr(), d_condition.data_ptr(), d_trunk.data_ptr(), d_head.data_ptr(), workspace.data_ptr()
    )
    _native.launch("generate_backward", params, head, head.numel(), workspace[-1:].data_ptr())
    return d_condition, d_trunk, d_head


forward_implementations = Dispatcher(
    "generate",
    [
        Implementation(Backend.CUDA, _native_forward, _cuda_supports),
        Implementation(Backend.CPU, _native_forward, _cpu_supports),
        Implementation(Backend.TRITON, _triton_forward, _triton_supports),
        Implementation(Backend.REFERENCE, reference.generate),
    ],
)
backward_implementations = Dispatcher(
    "generate_backward",
    [
        Implementation(Backend.CUDA, _native_backward, _cuda_supports_backward),
        Implementation(Backend.CPU, _native_backward, _cpu_supports_backward),
        Implementation(Backend.TRITON, _triton_backward, _triton_supports_backward),
        Implementation(Backend.REFERENCE, reference.generate_backward),
    ],
)


def trunk_size(trunk_weights: Sequence[Tensor]) -> int:
    """Length of the flat trunk gradient `[W_1, b_1, W_2, b_2, ...]`."""
    return sum(weight.numel() + weight.shape[0] for weight in trunk_weights)


def _forward_fake(
    condition: Tensor, trunk_weights: list[Tensor], trunk_biases: list[Tensor], head: Tensor, *_: Any
) -> Tensor:
    return head.new_empty(condition.shape[0], head.shape[0])


def _backward_fake(
    grad: Tensor,
    condition: Tensor,
    trunk_weights: list[Tensor],
    trunk_biases: list[Tensor],
    head: Tensor,
    offsets: Tensor | None,
    encoding: str,
    activation: str,
    negative_slope: float,
    head_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        condition.new_empty(condition.shape),
        head.new_empty(trunk_size(trunk_weights)),
        head.new_empty(head.shape if head_gradient else 0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    condition, trunk_weights, trunk_biases, head, _theta0, offsets, *options = inputs
    ctx.save_for_backward(condition, *trunk_weights, *trunk_biases, head, offsets)
    ctx.options = options


def _saved(ctx: Any) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor, Tensor | None]:
    condition, *trunk, head, offsets = ctx.saved_tensors
    layers = len(trunk) // 2
    return condition, trunk[:layers], trunk[layers:], head, offsets


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    condition, weights, biases, head, offsets = _saved(ctx)
    wanted = ctx.needs_input_grad[3]
    d_condition, d_trunk, d_head = generate_backward(
        grad, condition, weights, biases, head, offsets, *ctx.options, wanted
    )
    sizes = [size for weight in weights for size in (weight.numel(), weight.shape[0])]
    parts = d_trunk.split(sizes)
    d_weights = [part.view(weight.shape) for part, weight in zip(parts[::2], weights, strict=True)]
    # One condition: theta0's gradient is the incoming gradient itself, no copy.
    d_theta0 = grad.squeeze(0) if grad.shape[0] == 1 else grad.sum(0)
    return d_condition, d_weights, list(parts[1::2]), d_head if wanted else None, d_theta0, None, None, None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, condition, trunk_weights, trunk_biases, head, offsets, *options = inputs
    ctx.save_for_backward(grad, condition, *trunk_weights, *trunk_biases, head, offsets)
    ctx.options = options


def _double_backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
    grad, condition, *trunk, head, offsets = ctx.saved_tensors
    layers = len(trunk) // 2

    def backward(grad: Tensor, condition: Tensor, head: Tensor, *trunk: Tensor) -> tuple[Tensor, ...]:
        return reference.generate_backward(
            grad, condition, trunk[:layers], trunk[layers:], head, offsets, *ctx.options
        )

    found = differentiate(backward, (grad, condition, head, *trunk), gradients)
    d_grad, d_condition, d_head, *d_trunk = found
    return d_grad, d_condition, d_trunk[:layers], d_trunk[layers:], d_head, None, None, None, None, None


generate = register(
    f"generate({_ARGUMENTS.format('Tensor theta0, ')}) -> Tensor",
    forward_implementations,
    _forward_fake,
    _backward,
    _save,
)
generate_backward = register(
    f"generate_backward(Tensor grad, {_ARGUMENTS.format('')}, bool head_gradient) -> (Tensor, Tensor, Tensor)",
    backward_implementations,
    _backward_fake,
    _double_backward,
    _save_backward,
)
