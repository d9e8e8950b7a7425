"""`hyperfast::generate`: condition -> encoding -> trunk -> head + theta0, and its one-pass backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hyperfast import reference
from hyperfast.backends import Backend, Dispatcher, Implementation
from hyperfast.ops._library import differentiate, register

_ARGUMENTS = (
    "Tensor condition, Tensor[] trunk_weights, Tensor[] trunk_biases, Tensor head, {}Tensor? offsets, "
    "str encoding, str activation, float negative_slope"
)


def _always(*_: Any) -> None:
    return None


forward_implementations = Dispatcher("generate", [Implementation(Backend.REFERENCE, reference.generate, _always)])
backward_implementations = Dispatcher(
    "generate_backward", [Implementation(Backend.REFERENCE, reference.generate_backward, _always)]
)


def trunk_size(trunk_weights: Sequence[Tensor]) -> int:
    """Length of the flat trunk gradient `[W_1, b_1, W_2, b_2, ...]`."""
    return sum(weight.numel() + weight.shape[0] for weight in trunk_weights)


def _forward_fake(
    condition: Tensor, trunk_weights: list[Tensor], trunk_biases: list[Tensor], head: Tensor, *_: Any
) -> Tensor:
    return head.new_empty(condition.shape[0], head.shape[0])


def _backward_fake(
    grad: Tensor, condition: Tensor, trunk_weights: list[Tensor], trunk_biases: list[Tensor], head: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        condition.new_empty(condition.shape),
        head.new_empty(trunk_size(trunk_weights)),
        head.new_empty(head.shape),
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
    d_condition, d_trunk, d_head = generate_backward(grad, condition, weights, biases, head, offsets, *ctx.options)
    sizes = [size for weight in weights for size in (weight.numel(), weight.shape[0])]
    parts = d_trunk.split(sizes)
    d_weights = [part.view(weight.shape) for part, weight in zip(parts[::2], weights, strict=True)]
    # One condition: theta0's gradient is the incoming gradient itself, no copy.
    d_theta0 = grad[0] if grad.shape[0] == 1 else grad.sum(0)
    return d_condition, d_weights, list(parts[1::2]), d_head, d_theta0, None, None, None, None


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
    return d_grad, d_condition, d_trunk[:layers], d_trunk[layers:], d_head, None, None, None, None


generate = register(
    f"generate({_ARGUMENTS.format('Tensor theta0, ')}) -> Tensor",
    forward_implementations,
    _forward_fake,
    _backward,
    _save,
)
generate_backward = register(
    f"generate_backward(Tensor grad, {_ARGUMENTS.format('')}) -> (Tensor, Tensor, Tensor)",
    backward_implementations,
    _backward_fake,
    _double_backward,
    _save_backward,
)
