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


# ---------------------------------------------------------------------------------------------------------------------
# What is shipped, for the ahead-of-time gate

# (rows, hidden width, embedding widths, fusion, layers, outputs, activation, what is wanted, tables): tiles of 16 to
# 128 rows, one to three passes over the columns, the published widths, every activation that has code of its own.
_SHIPPED: tuple[tuple[int, int, tuple[int, ...], str, int, int, str, str, bool], ...] = (
    (1024, 16, (80, 80, 80), "sum", 2, 1, "leaky_relu", "backward", False),
    (4096, 140, (80, 80, 80), "concat", 5, 9, "relu", "loss and gradient", True),
    (4096, 300, (240,), "concat", 5, 9, "gelu", "loss and gradient", False),
    (29744, 180, (80, 80, 80), "concat", 5, 9, "elu", "backward", True),
    (94256, 280, (80, 80, 80), "concat", 5, 9, "relu", "loss and gradient", True),
    (94256, 512, (80, 80, 80), "concat", 5, 9, "hardswish", "loss and gradient", True),
    (29744, 48, (80, 80, 80), "concat", 4, 49, "relu", "loss and gradient", True),
    (94256, 280, (80, 80, 80), "concat", 5, 9, "relu6", "prediction", True),
    (29744, 140, (80, 80, 80), "concat", 5, 9, "relu", "loss", True),
)
_MULTIPROCESSORS = 132
_WIDE = (1024, 9, "relu")


def configurations(dtype: torch.dtype) -> Iterator[Configuration]:
    """The compiled forms of all kernels whose hidden products have operands of `dtype`."""
    for precision in {torch.float32: ("fp32", "tf32"), torch.bfloat16: ("bf16",)}.get(dtype, ()):
        for shape in _SHIPPED:
            yield from _fused_configurations(*shape, precision)
        yield from _layer_configurations(precision)
    if dtype == torch.float32:
        types = {"gradient": "*fp32", "partials": "*fp32", "loss": "*fp32", "losses": "*fp32"}
        types |= dict.fromkeys(("splits", "parameters", "tiles"), "i32")
        constants = {"BLOCK": predict_fused.REDUCE_BLOCK}
        signature = kernel_signature(predict_reduce_kernel, types, constants)
        label = "any number of parameters, align=1 "
        yield Configuration(label, predict_reduce_kernel, signature, constants, predict_fused.REDUCE_OPTIONS)


def _types(kernel: Any, element: str, layers: int, coordinates: int) -> dict[str, Any]:
    types: dict[str, Any] = dict.fromkeys(kernel.arg_names, "*fp32")
    types |= dict.fromkeys(("hidden", "gradients", "slopes", "forward_weights", "backward_weights", "g"), element)
    types |= {"indices": "*i64", "rows": "*i64", "embeddings": ("*fp32",) * coordinates}
    types |= {"tables": ("*fp32",) * coordinates, "counts": ("i32",) * coordinates}
    types |= {"hidden_weights": ("*fp32",) * (layers - 2)}
    types |= dict.fromkeys(
        (
            "start", "end", "tiles", "slots", "stride", "inputs", "width", "filled", "chunk", "first_chunk", "count",
        ),
        "i32",
    )
    return types


def _fused_configurations(
    count: int, width: int, embedding: tuple[int, ...], fusion: str, layers: int, outputs: int, activation: str,
    what: str, tables: bool, precision: str,
) -> Iterator[Configuration]:  # fmt: skip
    inputs = [embedding[0] if fusion == "sum" else sum(embedding), *[width] * (layers - 1)]
    meta = [torch.empty(size, device="meta") for size in embedding]
    weights = tuple(
        torch.empty(o, i, device="meta") for o, i in zip([*[width] * (layers - 1), outputs], inputs, strict=True)
    )
    arguments = Arguments(
        tuple(e.expand(1 if tables else count, -1) for e in meta), torch.empty(count, len(embedding), device="meta"),
        weights, weights, None, fusion, activation, precision,
    )  # fmt: skip
    config = predict_config(count, width, precision, _MULTIPROCESSORS)
    element = "*bf16" if config.half else "*fp32"
    absent = {"prediction": None} if what != "prediction" else {}
    absent |= {"losses": None} if "loss" not in what else {}
    absent |= {"targets": None, "element_weights": None} if "loss" not in what else {}
    absent |= {"grad": None} if what != "backward" else {}
    absent |= dict.fromkeys(("gradients", "d_output", "backward_weights")) if what in ("prediction", "loss") else {}
    absent |= {"tables": None} if not tables else {}
    absent |= {"rows": None} if count > 4096 else {}
    forms: list[tuple[Any, dict[str, Any], dict[str, int]]] = [
        (predict_rows_kernel, predict_fused.row_constants(arguments, config), predict_fused.row_options(config)),
    ]
    if layers > 2 and precision != "tf32":  # which is prepared as "fp32" is
        constants = predict_fused.first_layer_constants(arguments, config) | predict_fused.PREPARE_BLOCKS
        forms.append((predict_prepare_kernel, constants, predict_fused.PREPARE_OPTIONS))
    if "gradients" not in absent:
        constants = predict_fused.weight_constants(arguments, config)
        forms.append((predict_weight_gradient_kernel, constants, predict_fused.WEIGHT_OPTIONS))
    for kernel, constants, options in forms:
        types = _types(kernel, element, layers, len(embedding))
        if kernel is predict_prepare_kernel:
            types["biases"] = ("*fp32",) * (layers - 1)
        constants = constants | {name: None for name in absent if name in kernel.arg_names}
        label = f"{precision} rows={count} H={width} J={len(embedding)} {fusion} K={outputs} {activation} {what}"
        yield Configuration(label, kernel, kernel_signature(kernel, types, constants), constants, options)


def _layer_configurations(precision: str) -> Iterator[Configuration]:
    width, outputs, activation = _WIDE
    element = "*bf16" if precision == "bf16" else "*fp32"
    exact = "ieee" if precision == "fp32" else "tf32x3"
    common = {"H": width, "ACTIVATION": activation}
    rows = {"BLOCK_M": predict_layers.ROWS}
    forms: list[tuple[Any, dict[str, Any]]] = [
        (predict_layers.predict_first_kernel, common | rows | {"rows": None}),
        (predict_layers.predict_activation_kernel, common | {"BLOCK": predict_layers.BLOCK}),
        (
            predict_layers.predict_last_kernel,
            common | rows | {"K": outputs, "BLOCK_OUT": 16, "EXACT": exact, "prediction": None, "grad": None},
        ),
        (predict_layers.predict_slope_kernel, common | {"BLOCK": predict_layers.BLOCK}),
    ]
    for kernel, constants in forms:
        types = _types(kernel, element, 5, 3)
        types |= {"activations": element}
        label = f"{precision} H={width} {activation}"
        signature = kernel_signature(kernel, types, constants)
        yield Configuration(label, kernel, signature, constants, predict_layers.OPTIONS)
