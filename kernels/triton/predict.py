"""Triton kernels of `predict`: coordinates -> small tables -> hidden layers -> a kernel per row, and its gradients.

Up to a hidden width of 512 everything is fused, in four launches per chunk of rows at most (two per further chunk):

1. prepare: hidden matrices padded and in the dtype of the products; T_j = embedding_j W_1[:, block j]^T.
2. rows: a program takes a tile of rows through all layers, to the prediction or the loss, and back to dL/dz of every
   layer. Activations stay in a workspace of fixed size, in the cache.
3. weight gradient: dW = dz^T a over the rows of the chunk; that of the first layer gathers the embedding on the way,
   so that the gradient of the tables needs neither atomics nor a sort (it costs 2 R E H operations, a tenth of the
   step, instead).
4. reduce: adds the splits of step 3, and the losses of the tiles, in a fixed order: two runs agree bit for bit.

Wider predictors take matrix products of cuBLAS, layer by layer over chunks of rows, with fused steps between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hyperfast.kernels.config import (
    INTERPRET,
    Configuration,
    device_guard,
    kernel_signature,
    predict_config,
    refuse_device,
)
from hyperfast.kernels.triton import predict_fused, predict_layers
from hyperfast.kernels.triton.predict_arguments import Arguments, Wanted
from hyperfast.kernels.triton.predict_rows import predict_rows_kernel
from hyperfast.kernels.triton.predict_weights import (
    predict_prepare_kernel,
    predict_reduce_kernel,
    predict_weight_gradient_kernel,
)

__all__ = ["backward", "configurations", "forward", "squared_error", "supports"]

FUSED_WIDTH = 512
"""The widest hidden layer of the fused path; matrix products take over above it."""
MAX_COORDINATES = 8
MAX_LAYERS = 12
MAX_OUTPUTS = 64


def supports(
    embeddings: Sequence[Tensor],
    indices: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    rows: Tensor | None,
    fusion: str,
    activation: str,
    precision: str,
) -> str | None:
    """Why these kernels cannot run on the arguments of `forward`, or `None` where they can."""
    tensors = [*embeddings, *weights, *biases]
    if reason := refuse_device(weights[0].device):
        return reason
    for tensor in tensors:
        if tensor.dtype != torch.float32:
            return f"{tensor.dtype} is not float32"
    if INTERPRET and precision == "bf16":
        return "Triton's interpreter is wrong for bfloat16"
    if not 2 <= len(weights) <= MAX_LAYERS:
        return f"{len(weights)} layers; 2 to {MAX_LAYERS}"
    if len(embeddings) > MAX_COORDINATES:
        return f"{len(embeddings)} coordinates; at most {MAX_COORDINATES}"
    if weights[-1].shape[0] > MAX_OUTPUTS:
        return f"{weights[-1].shape[0]} outputs per row; at most {MAX_OUTPUTS}"
    if any(0 in tensor.shape for tensor in tensors):
        return "an embedding or a layer has no elements"
    return None


def _run(arguments: Arguments, wanted: Wanted) -> None:
    path = predict_fused if arguments.width <= FUSED_WIDTH else predict_layers
    with device_guard(arguments.weights[0]):
        path.run(arguments, wanted)


def forward(
    embeddings: Sequence[Tensor],
    indices: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    rows: Tensor | None,
    fusion: str,
    activation: str,
    precision: str,
) -> Tensor:
    """Predictions `[R, K]`, float32.

    Args:
        embeddings: tables `[n_j, E_j]`.
        indices: int32 or int64 `[N, J]`: row r reads `embeddings[j][indices[r, j]]`.
        weights: `[H, E]`, then `[H, H]` each, last `[K, H]`.
        biases: of each layer.
        rows: int64 `[R]` into `indices`, or `None` for all.
        fusion: `"concat"` or `"sum"`.
        activation: `"relu"`, `"leaky_relu"`, `"hardswish"`, `"gelu"`, `"relu6"` or `"elu"`.
        precision: `"fp32"`, `"tf32"` or `"bf16"`: of the hidden products, and of the first layer where no tables are
            made of it (fewer rows than coordinates). The last layer is float32, of three TF32 products unless `"fp32"`.
    """
    arguments = Arguments.of(embeddings, indices, weights, biases, rows, fusion, activation, precision)
    prediction = arguments.empty(arguments.count, arguments.outputs)
    if arguments.count:
        _run(arguments, Wanted(prediction=prediction))
    return prediction


def backward(
    grad: Tensor,
    embeddings: Sequence[Tensor],
    indices: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    rows: Tensor | None,
    fusion: str,
    activation: str,
    precision: str,
) -> Tensor:
    """Flat gradient of the parameters `[W_1, b_1, W_2, b_2, ...]`; activations are computed again.

    Args:
        grad: dL/dprediction `[R, K]`; the rest as for `forward`.
    """
    arguments = Arguments.of(embeddings, indices, weights, biases, rows, fusion, activation, precision)
    gradient = arguments.empty(arguments.parameters)
    if not arguments.count:
        return gradient.zero_()
    _run(arguments, Wanted(gradient=gradient, grad=grad.contiguous()))
    return gradient


def squared_error(
    embeddings: Sequence[Tensor],
    indices: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    targets: Tensor,
    element_weights: Tensor | None,
    rows: Tensor | None,
    fusion: str,
    activation: str,
    precision: str,
    gradients: bool,
) -> tuple[Tensor, Tensor]:
    """sum w (prediction - target)^2 over the rows, and its flat parameter gradient in the same pass.

    Args:
        targets: `[N, K]`.
        element_weights: `[N, K]`, or `None` for ones; what has weight 0 is not looked at.
        gradients: whether the gradient is wanted; it is empty otherwise. The rest as for `forward`.
    """
    arguments = Arguments.of(embeddings, indices, weights, biases, rows, fusion, activation, precision)
    loss = arguments.empty()
    gradient = arguments.empty(arguments.parameters if gradients else 0)
    if not arguments.count:
        return loss.zero_(), gradient.zero_()
    _run(
        arguments,
        Wanted(
            loss=loss,
            gradient=gradient if gradients else None,
            targets=targets.contiguous(),
            element_weights=None if element_weights is None else element_weights.contiguous(),
        ),
    )
    return loss, gradient
