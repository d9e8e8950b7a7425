"""`hyperfast::predict`: kernels from coordinates, its backward, and the squared error with its gradient in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hyperfast import reference
from hyperfast.backends import Backend, Dispatcher, Implementation
from hyperfast.ops import _native, _triton
from hyperfast.ops._library import differentiate, register

_NETWORK = "Tensor[] embeddings, Tensor indices, Tensor[] weights, Tensor[] biases, "
_OPTIONS = "Tensor? rows, str fusion, str activation, str precision"

# Below zero these activations are a line of this slope; the native kernels know them by it.
_SLOPES = {"relu": 0.0, "leaky_relu": reference.LEAKY_SLOPE}


def _cpu_supports(
    embeddings: Sequence[Tensor],
    indices: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    rows: Tensor | None,
    fusion: str,
    activation: str,
    precision: str,
) -> str | None:
    reason = _native.missing() or _native.wrong_device(indices, "cpu")
    if reason is None and weights[0].dtype not in (torch.float32, torch.float64):
        reason = f"the weights are {weights[0].dtype}; the CPU kernels take float32 and float64"
    if reason is None and activation not in _SLOPES:
        reason = f"activation {activation!r}; the CPU kernels have {', '.join(map(repr, _SLOPES))}"
    if reason is None and len(embeddings) > (most := _native.module().max_tables):
        reason = f"{len(embeddings)} embeddings; the CPU kernels take up to {most}"
    if reason is None and len(weights) > (most := _native.module().max_predict_layers):
        reason = f"{len(weights)} layers; the CPU kernels take up to {most}"
    if reason is None and (indices if rows is None else rows).shape[0] == 0:
        reason = "there are no rows to predict"
    return reason


def _bfloat16_supports(*arguments: Any) -> str | None:
    """As `_cpu_supports`, for the processor's own products of bfloat16; only `explain` sees the difference."""
    reason, precision = _cpu_supports(*arguments), arguments[-1]
    if reason is None and precision == "bf16" and _native.module().instruction_set() != "avx512bf16":
        reason = "the processor multiplies no bfloat16; float32 products of the rounded operands stand in"
    return reason


def _triton_supports(embeddings: Sequence[Tensor], *arguments: Any) -> str | None:
    reason: str | None = _triton.missing(embeddings[0].device)
    return reason or _triton.kernels("predict").supports(embeddings, *arguments)


def _of_backward(supports: Callable[..., str | None]) -> Callable[..., str | None]:
    """`supports` of the forward pass for the arguments of the backward pass."""
    return lambda _grad, *arguments: supports(*arguments)


def _of_squared_error(supports: Callable[..., str | None]) -> Callable[..., str | None]:
    """`supports` of the forward pass for the arguments of the squared error."""

    def supported(*arguments: Any) -> str | None:
        *network, _targets, _element_weights, rows, fusion, activation, precision, _gradients = arguments
        return supports(*network, rows, fusion, activation, precision)

    return supported


def _triton_forward(*arguments: Any) -> Any:
    return _triton.kernels("predict").forward(*arguments)


def _triton_backward(*arguments: Any) -> Any:
    return _triton.kernels("predict").backward(*arguments)


def _triton_squared_error(*arguments: Any) -> Any:
    return _triton.kernels("predict").squared_error(*arguments)


class _Launch:
    """Native parameters, and the contiguous tensors that they point into."""

    def __init__(
        self,
        embeddings: Sequence[Tensor],
        indices: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        rows: Tensor | None,
        fusion: str,
        activation: str,
        precision: str,
    ) -> None:
        self._held: list[Tensor] = []
        self._like = weights[0]
        self.count = (indices if rows is None else rows).shape[0]
        hidden = weights[0].shape[0]
        self._work = self.count * hidden * len(weights)
        self.params = _native.module().PredictParams(
            dtype=_native.DTYPES[weights[0].dtype],
            round=precision == "bf16",
            concat=fusion == "concat",
            slope=_SLOPES[activation],
            embeddings=[self.address(e) for e in embeddings],
            table_rows=[e.shape[0] for e in embeddings],
            table_widths=[e.shape[1] for e in embeddings],
            weights=[self.address(w) for w in weights],
            biases=[self.address(b) for b in biases],
            hidden=hidden,
            outputs=weights[-1].shape[0],
            indices=self.address(indices),
            long_indices=indices.dtype == torch.int64,
            kernels=indices.shape[0],
            rows=self.address(rows),
            count=self.count,
        )

    def address(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        self._held.append(tensor.contiguous())
        return self._held[-1].data_ptr()

    def run(self) -> None:
        _native.launch("predict", self.params, self._like, self._work)


def _native_forward(
    embeddings: Sequence[Tensor], indices: Tensor, weights: Sequence[Tensor], *options: Any
) -> Tensor:
    launch = _Launch(embeddings, indices, weights, *options)
    predictions = weights[0].new_empty(launch.count, weights[-1].shape[0])
    launch.params.set_forward(predictions.data_ptr())
    launch.run()
    return predictions


def _native_backward(
    grad: Tensor, embeddings: Sequence[Tensor], indices: Tensor, weights: Sequence[Tensor], *options: Any
) -> Tensor:
    launch = _Launch(embeddings, indices, weights, *options)
    gradient = weights[0].new_empty(parameter_count(weights))
    launch.params.set_backward(launch.address(grad), gradient.data_ptr())
    launch.run()
    return gradient


def _native_squared_error(
    embeddings: Sequence[Tensor],
    indices: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    targets: Tensor,
    element_weights: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    *rest, gradients = options
    launch = _Launch(embeddings, indices, weights, biases, *rest)
    loss = weights[0].new_empty(())
    gradient = weights[0].new_empty(parameter_count(weights) if gradients else 0)
    addresses = (launch.address(targets), launch.address(element_weights))
    launch.params.set_squared_error(*addresses, loss.data_ptr(), gradient.data_ptr() if gradients else 0)
    launch.run()
    return loss, gradient


forward_implementations = Dispatcher(
    "predict",
    [
        Implementation(Backend.CPU, _native_forward, _bfloat16_supports),
        Implementation(Backend.CPU, _native_forward, _cpu_supports),
        Implementation(Backend.TRITON, _triton_forward, _triton_supports),
        Implementation(Backend.REFERENCE, reference.predict),
    ],
)
backward_implementations = Dispatcher(
    "predict_backward",
    [
        Implementation(Backend.CPU, _native_backward, _of_backward(_bfloat16_supports)),
        Implementation(Backend.CPU, _native_backward, _of_backward(_cpu_supports)),
        Implementation(Backend.TRITON, _triton_backward, _of_backward(_triton_supports)),
        Implementation(Backend.REFERENCE, reference.predict_backward),
    ],
)
squared_error_implementations = Dispatcher(
    "predict_squared_error",
    [
        Implementation(Backend.CPU, _native_squared_error, _of_squared_error(_bfloat16_supports)),
        Implementation(Backend.CPU, _native_squared_error, _of_squared_error(_cpu_supports)),
        Implementation(Backend.TRITON, _triton_squared_error, _of_squared_error(_triton_supports)),
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
