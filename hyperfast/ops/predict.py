"""`hyperfast::predict`: kernels from coordinates, its backward, and the squared error with its gradient in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hyperfast import reference
from hyperfast.backends import Backend, Dispatcher, Implementation
from hyperfast.ops import _triton
from hyperfast.ops._library import differentiate, register

_NETWORK = "Tensor[] embeddings, Tensor indices, Tensor[] weights, Tensor[] biases, "
_OPTIONS = "Tensor? rows, str fusion, str activation, str precision"


def _triton_supports(embeddings: Sequence[Tensor], *arguments: Any) -> str | None:
    reason: str | None = _triton.missing(embeddings[0].device)
    return reason or _triton.kernels("predict").supports(embeddings, *arguments)


def _triton_supports_backward(_grad: Tensor, *arguments: Any) -> str | None:
    return _triton_supports(*arguments)


def _triton_supports_error(
    embeddings: Sequence[Tensor],
    indices: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    _targets: Tensor,
    _element_weights: Tensor | None,
    rows: Tensor | None,
    fusion: str,
    activation: str,
    precision: str,
    _gradients: bool,
) -> str | None:
    return _triton_supports(embeddings, indices, weights, biases, rows, fusion, activation, precision)


def _triton_forward(*arguments: Any) -> Any:
    return _triton.kernels("predict").forward(*arguments)


def _triton_backward(*arguments: Any) -> Any:
    return _triton.kernels("predict").backward(*arguments)


def _triton_squared_error(*arguments: Any) -> Any:
    return _triton.kernels("predict").squared_error(*arguments)


forward_implementations = Dispatcher(
    "predict",
    [
        Implementation(Backend.TRITON, _triton_forward, _triton_supports),
        Implementation(Backend.REFERENCE, reference.predict),
    ],
)
backward_implementations = Dispatcher(
    "predict_backward",
    [
        Implementation(Backend.TRITON, _triton_backward, _triton_supports_backward),
        Implementation(Backend.REFERENCE, reference.predict_backward),
    ],
)
squared_error_implementations = Dispatcher(
    "predict_squared_error",
    [
        Implementation(Backend.TRITON, _triton_squared_error, _triton_supports_error),
        Implementation(Backend.REFERENCE, reference.squared_error_with_gradient),
    ],
)


def parameter_count(weights: Sequence[Tensor]) -> int:
    """Length of the flat parameter gradient `[W_1, b_1, W_2, b_2, ...]`."""
    return sum(weight.numel() + weight.shape[0] for weight in weights)


def _parameters(flat: Tensor, weights: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases out of one flat tensor; views."""
    parts = flat.split([size for weight in weights for size in (weight.numel(), weight.shape[0])])
    return [part.view(w.shape) for part, w in zip(parts[::2], weights, strict=True)], list(parts[1::2])


def _forward_fake(
    embeddings: list[Tensor],
    indices: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    rows: Tensor | None,
    *_: Any,
) -> Tensor:
    return weights[0].new_empty((indices if rows is None else rows).shape[0], weights[-1].shape[0])


def _backward_fake(
    grad: Tensor, embeddings: list[Tensor], indices: Tensor, weights: list[Tensor], *_: Any
) -> Tensor:
    return weights[0].new_empty(parameter_count(weights))


def _squared_error_fake(
    embeddings: list[Tensor], indices: Tensor, weights: list[Tensor], biases: list[Tensor], *rest: Any
) -> tuple[Tensor, Tensor]:
    gradients = rest[-1]
    return weights[0].new_empty(()), weights[0].new_empty(parameter_count(weights) if gradients else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    embeddings, indices, weights, biases, rows, *ctx.options = inputs
    ctx.tables, ctx.layers = len(embeddings), len(weights)
    ctx.save_for_backward(*embeddings, *weights, *biases, indices, rows)


def _saved(ctx: Any) -> tuple[list[Tensor], Tensor, list[Tensor], list[Tensor], Tensor | None]:
    tensors = list(ctx.saved_tensors)
    embeddings, parameters = tensors[: ctx.tables], tensors[ctx.tables : ctx.tables + 2 * ctx.layers]
    indices, rows = tensors[ctx.tables + 2 * ctx.layers :][:2]
    return embeddings, indices, parameters[: ctx.layers], parameters[ctx.layers :], rows


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    embeddings, indices, weights, biases, rows = _saved(ctx)
    flat = predict_backward(grad, embeddings, indices, weights, biases, rows, *ctx.options)
    return [None] * ctx.tables, None, *_parameters(flat, weights), None, None, None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, embeddings, indices, weights, biases, rows, *ctx.options = inputs
    ctx.tables, ctx.layers = len(embeddings), len(weights)
    ctx.save_for_backward(*embeddings, *weights, *biases, indices, rows, grad)


def _double_backward(ctx: Any, d_flat: Tensor) -> tuple[Any, ...]:
    embeddings, indices, weights, biases, rows = _saved(ctx)
    layers = ctx.layers

    def backward(grad: Tensor, *parameters: Tensor) -> Tensor:
        return reference.predict_backward(
            grad, embeddings, indices, parameters[:layers], parameters[layers:], rows, *ctx.options
        )

    found = differentiate(backward, (ctx.saved_tensors[-1], *weights, *biases), [d_flat])
    d_grad, *d_parameters = found
    d_weights, d_biases = d_parameters[:layers], d_parameters[layers:]
    return d_grad, [None] * ctx.tables, None, d_weights, d_biases, None, None, None, None


def _save_squared_error(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    embeddings, indices, weights, biases, targets, element_weights, rows, *ctx.options, ctx.gradients = inputs
    ctx.tables, ctx.layers = len(embeddings), len(weights)
    ctx.save_for_backward(*embeddings, *weights, *biases, indices, rows, targets, element_weights, output[1])
    ctx.mark_non_differentiable(output[1])


def _squared_error_backward(ctx: Any, grad: Tensor, _grad_flat: Tensor | None) -> tuple[Any, ...]:
    if not ctx.gradients:
        raise RuntimeError("predict_squared_error was called with gradients=False; call it with gradients=True")
    embeddings, indices, weights, biases, rows = _saved(ctx)
    targets, element_weights, flat = ctx.saved_tensors[-3:]
    if torch.is_grad_enabled():  # create_graph=True: once more, by operations that are differentiable themselves
        arguments = (embeddings, indices, weights, biases, rows, *ctx.options)
        difference = predict(*arguments) - (targets if rows is None else targets[rows])
        if element_weights is not None:
            difference = difference * (element_weights if rows is None else element_weights[rows])
        scaled = predict_backward(2 * grad * difference, *arguments)
    else:
        scaled = grad * flat
    return [None] * ctx.tables, None, *_parameters(scaled, weights), *[None] * 7


predict = register(
    f"predict({_NETWORK}{_OPTIONS}) -> Tensor",
    forward_implementations,
    _forward_fake,
    _backward,
    _save,
)
predict_backward = register(
    f"predict_backward(Tensor grad, {_NETWORK}{_OPTIONS}) -> Tensor",
    backward_implementations,
    _backward_fake,
    _double_backward,
    _save_backward,
)
predict_squared_error = register(
    f"predict_squared_error({_NETWORK}Tensor targets, Tensor? element_weights, {_OPTIONS}, bool gradients) "
    "-> (Tensor, Tensor)",
    squared_error_implementations,
    _squared_error_fake,
    _squared_error_backward,
    _save_squared_error,
)
