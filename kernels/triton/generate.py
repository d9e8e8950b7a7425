"""Triton kernels of `generate`: encoding -> trunk -> head + theta0, one launch forward and one launch backward.

Each program owns a contiguous range of head rows. For every segment that its range meets it runs the trunk (a few
thousand multiplications, cheaper than another launch) and streams its rows of the head once.

Backward: each program writes its rows of the head gradient and leaves its share of dh = grad^T head, one slot per
(program, segment). The last program to finish, found by an integer ticket, adds the shares in a fixed order (no float
atomics: two runs agree bit for bit) and runs the trunk's backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyperfast.kernels.config import (
    TRITON_TYPES,
    Configuration,
    GenerateConfig,
    device_guard,
    generate_config,
    kernel_signature,
    partition_rows,
    refuse_device,
    refuse_dtype,
    tickets,
)
from hyperfast.kernels.triton.generate_backward import generate_backward_kernel
from hyperfast.kernels.triton.generate_forward import generate_forward_kernel
from hyperfast.kernels.triton.trunk import encoded_width

__all__ = ["Configuration", "backward", "configurations", "forward", "supports"]

MAX_LAYERS = 8
MAX_WIDTH = 256
PRECISION = "ieee"
"""`input_precision` of float32 matrix products; "tf32" is faster and loses 13 bits."""



class _Sizes(NamedTuple):
    """What both launches read off their arguments."""

    batch: int
    segments: int
    rows: int
    width: int
    trunk: int
    constants: dict[str, Any]


def _sizes(condition: Tensor, trunk_weights: Sequence[Tensor], head: Tensor, encoding: str, activation: str) -> _Sizes:
    batch, segments, dimension = condition.shape
    widths = tuple(weight.shape[0] for weight in trunk_weights)
    constants = _constants(dimension, widths, head.shape[1], encoding, activation)
    return _Sizes(batch, segments, head.shape[0], head.shape[1], sum(widths), constants)


def _constants(dimension: int, widths: tuple[int, ...], width: int, encoding: str, activation: str) -> dict[str, Any]:
    return {
        "D": dimension,
        "WIDTHS": widths,
        "H": width,
        "ENCODING": encoding,
        "ACTIVATION": activation,
        "PRECISION": PRECISION,
    }


def _blocks(config: GenerateConfig, *, backward: bool) -> dict[str, int]:
    blocks = {"DOT": config.dot, "BLOCK_B": config.batch, "BLOCK_P": config.rows, "BLOCK_H": config.columns}
    return blocks | {"ROWS": config.trunk_rows} if backward else blocks


def _scratch(size: int, like: Tensor) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device=like.device)


def supports(
    condition: Tensor,
    trunk_weights: Sequence[Tensor],
    trunk_biases: Sequence[Tensor],
    head: Tensor,
    *_: Any,
) -> str | None:
    """Why these kernels cannot run on the arguments of `forward`, or `None` where they can.

    For the arguments of `backward`, leave the gradient out: it has no say.
    """
    tensors = [condition, *trunk_weights, *trunk_biases, head]
    if reason := refuse_device(head.device) or refuse_dtype(head.dtype):
        return reason
    if any(tensor.dtype != head.dtype for tensor in tensors):
        return "condition, trunk and head have different dtypes"
    if len(trunk_weights) > MAX_LAYERS:
        return f"{len(trunk_weights)} trunk layers; at most {MAX_LAYERS}"
    widest = max([condition.shape[-1], head.shape[1], *(weight.shape[0] for weight in trunk_weights)])
    if widest > MAX_WIDTH:
        return f"a layer is {widest} wide; at most {MAX_WIDTH}"
    if 0 in (condition.shape[-1], head.shape[1]):
        return "the condition or the head has no columns"
    return None


def forward(
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
    """Weights `[B, P]` of `reference.generate`, in one launch.

    Args:
        condition: `[B, S, D]`.
        trunk_weights: `[H_l, H_{l-1}]` each.
        trunk_biases: `[H_l]` each.
        head: `[P, H]`.
        theta0: `[P]`.
        offsets: int64 `[S + 1]`, or `None` for one segment.
        encoding: `"cos|sin"`, `"z|1-z"` or `"none"`.
        activation: `"leaky_relu"`, `"relu"`, `"gelu"` or `"tanh"`.
        negative_slope: of the leaky ReLU.

    Returns:
        theta `[B, P]` in the dtype of `head`. Sums are float32; with more than four conditions and a half-precision
        head the features are rounded to its dtype first, for the matrix units.
    """
    sizes = _sizes(condition, trunk_weights, head, encoding, activation)
    theta = head.new_empty(sizes.batch, sizes.rows)
    if not theta.numel():
        return theta
    config = generate_config(sizes.batch, sizes.segments, sizes.width, head.dtype, backward=False)
    part = partition_rows(sizes.rows, config, head.device)
    with device_guard(head):
        generate_forward_kernel[(part.programs,)](
            theta,
            condition.contiguous(),
            tuple(weight.contiguous() for weight in trunk_weights),
            tuple(bias.contiguous() for bias in trunk_biases),
            head.contiguous(),
            theta0.contiguous(),
            None if offsets is None else offsets.contiguous(),
            _scratch(part.programs * sizes.batch * (sizes.trunk + sizes.width), head),
            sizes.batch,
            sizes.segments,
            sizes.rows,
            part.chunk,
            negative_slope,
            **sizes.constants,
            **_blocks(config, backward=False),
            **config.options,
        )
    return theta


def backward(
    grad: Tensor,
    condition: Tensor,
    trunk_weights: Sequence[Tensor],
    trunk_biases: Sequence[Tensor],
    head: Tensor,
    offsets: Tensor | None,
    encoding: str,
    activation: str,
    negative_slope: float,
    head_gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `reference.generate_backward`, in one launch; bit for bit the same in every run.

    Args:
        grad: dL/dtheta `[B, P]`; the rest as for `forward`.
        head_gradient: whether d_head is wanted; else it is empty.

    Returns:
        d_condition `[B, S, D]`, d_trunk flat `[W_1, b_1, W_2, b_2, ...]`, d_head `[P, H]`.
    """
    sizes = _sizes(condition, trunk_weights, head, encoding, activation)
    d_condition = condition.new_empty(condition.shape)
    d_trunk = head.new_empty(sum(w.numel() + w.shape[0] for w in trunk_weights))
    d_head = head.new_empty(head.shape if head_gradient else 0)
    if not grad.numel() or not condition.numel():
        return d_condition.zero_(), d_trunk.zero_(), d_head.zero_()
    config = generate_config(sizes.batch, sizes.segments, sizes.width, head.dtype, backward=True)
    part = partition_rows(sizes.rows, config, head.device)
    batch, segments = sizes.batch, sizes.segments
    with device_guard(head):
        generate_backward_kernel[(part.programs,)](
            d_condition,
            d_trunk,
            d_head if head_gradient else None,
            grad.contiguous(),
            condition.contiguous(),
            tuple(weight.contiguous() for weight in trunk_weights),
            tuple(bias.contiguous() for bias in trunk_biases),
            head.contiguous(),
            None if offsets is None else offsets.contiguous(),
            _scratch(part.programs * batch * (sizes.trunk + sizes.width), head),
            _scratch((part.programs + segments) * batch * sizes.width, head),
            _scratch(2 * batch * segments * sizes.trunk, head),
            tickets.take(head.device),
            batch,
            segments,
            sizes.rows,
            part.chunk,
            negative_slope,
            **sizes.constants,
            **_blocks(config, backward=True),
            **config.options,
        )
    return d_condition, d_trunk, d_head


# ---------------------------------------------------------------------------------------------------------------------
# What is shipped, for the ahead-of-time gate

# (conditions, segments, condition width, trunk widths, encoding, activation): every block size of `generate_config`,
# every encoding and activation, with and without segments, powers of two and other widths, no trunk and a deep one.
_SHIPPED: tuple[tuple[int, int | None, int, tuple[int, ...], str, str], ...] = (
    (1, None, 1, (16, 64, 128), "cos|sin", "leaky_relu"),
    (1, 58, 8, (16, 16), "cos|sin", "leaky_relu"),
    (4, None, 3, (), "z|1-z", "relu"),
    (8, 2, 5, (32, 256), "none", "gelu"),
    (16, None, 128, (64,), "none", "relu"),
    (32, 4, 4, (100, 50), "z|1-z", "tanh"),
)


def configurations(dtype: torch.dtype) -> Iterator[Configuration]:
    """The compiled forms of both kernels for a head of `dtype`."""
    element = "*" + TRITON_TYPES[dtype]
    for batch, segments, dimension, widths, encoding, activation in _SHIPPED:
        layers = tuple(element for _ in widths)
        width = widths[-1] if widths else encoded_width(dimension, encoding)
        types: dict[str, Any] = dict.fromkeys(generate_backward_kernel.arg_names, element)
        types |= dict.fromkeys(("scratch", "partial", "trunk_scratch"), "*fp32") | {"ticket": "*i32"}
        types |= {"theta": element, "theta0": element, "weights": layers, "biases": layers, "offsets": "*i64"}
        types |= dict.fromkeys(("B", "S", "P", "chunk"), "i32") | {"negative_slope": "fp32"}
        kernels: list[tuple[Any, bool, dict[str, Any]]] = [
            (generate_forward_kernel, False, {}),
            (generate_backward_kernel, True, {}),
        ]
        if batch == 1:
            kernels.append((generate_backward_kernel, True, {"d_head": None}))
        for kernel, is_backward, omitted in kernels:
            config = generate_config(batch, segments or 1, width, dtype, backward=is_backward)
            constants: dict[str, Any] = _constants(dimension, widths, width, encoding, activation)
            constants |= _blocks(config, backward=is_backward) | ({} if segments else {"offsets": None}) | omitted
            yield Configuration(
                f"B={batch} S={segments} D={dimension} widths={widths} {encoding} {activation} {dtype}"
                + (" without d_head" if omitted else ""),
                kernel,
                kernel_signature(kernel, types, constants),
                constants,
                config.options,
            )
