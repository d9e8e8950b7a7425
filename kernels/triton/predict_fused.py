"""Launches of the fused path of `predict`: hidden widths up to 512."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hyperfast.kernels.config import PredictConfig, cdiv, multiprocessors, predict_config
from hyperfast.kernels.triton.predict_arguments import Arguments, Wanted
from hyperfast.kernels.triton.predict_rows import predict_rows_kernel
from hyperfast.kernels.triton.predict_weights import (
    predict_prepare_kernel,
    predict_reduce_kernel,
    predict_weight_gradient_kernel,
)

WORKSPACE = 32 << 20
"""Bytes of activations and gradients of one chunk of rows, about: it is read again from the second-level cache."""
SPLIT = 256
"""Rows that a program sums, at least, before its weight gradient is worth a partial buffer."""
REDUCE_BLOCK = 1024
PREPARE_BLOCKS = {"BLOCK_N": 16, "BLOCK": 64}
PREPARE_OPTIONS = {"num_warps": 4, "num_stages": 2}
WEIGHT_OPTIONS = {"num_warps": 4, "num_stages": 3}
REDUCE_OPTIONS = {"num_warps": 4, "num_stages": 1}


def row_constants(arguments: Arguments, config: PredictConfig) -> dict[str, Any]:
    """Compile-time arguments of the row kernel."""
    return first_layer_constants(arguments, config) | {
        "K": arguments.outputs,
        "ACTIVATION": arguments.activation,
        "PIECES": config.pieces,
        "PASSES": config.passes,
        "BLOCK_M": config.rows,
        "BLOCK_K": config.inner,
        "BLOCK_OUT": arguments.block_outputs,
        "PRECISION": config.precision,
        "EXACT": config.exact,
        "HALF": config.half,
        "LAYERS": arguments.hidden_layers,
    }


def weight_constants(arguments: Arguments, config: PredictConfig) -> dict[str, Any]:
    """Compile-time arguments of the weight gradient kernel."""
    return first_layer_constants(arguments, config) | {
        "LAYERS": arguments.hidden_layers,
        "K": arguments.outputs,
        "BLOCK": config.block,
        "BLOCK_R": config.inner,
        "BLOCK_OUT": arguments.block_outputs,
        "PRECISION": config.precision,
        "EXACT": config.exact,
    }


def first_layer_constants(arguments: Arguments, config: PredictConfig) -> dict[str, Any]:
    """Compile-time arguments that say where the coordinates are."""
    return {
        "H": arguments.width,
        "STRIDE": config.stride,
        "OFFSETS": arguments.embedding_offsets,
        "WIDTHS": arguments.embedding_widths,
    }


def row_options(config: PredictConfig) -> dict[str, int]:
    """Launch options of the row kernel."""
    return {"num_warps": config.warps, "num_stages": 3}


def _prepare(
    arguments: Arguments, config: PredictConfig, *, backward: bool
) -> tuple[Tensor, Tensor, Tensor | None, tuple[Tensor, ...] | None]:
    """Biases, matrices, transposes, all padded, and tables of the first layer (`None` where they do not pay)."""
    stride, matrices = config.stride, arguments.hidden_layers - 1
    biases = arguments.empty(arguments.hidden_layers, stride)
    forward_weights = arguments.empty(matrices, stride, stride, dtype=arguments.element)
    backward_weights = arguments.empty(matrices, stride, stride, dtype=arguments.element) if backward else None
    tables = None
    across = cdiv(stride, PREPARE_BLOCKS["BLOCK"])
    programs = arguments.hidden_layers + matrices * across**2
    if arguments.factorised:
        tables = tuple(arguments.empty(e.shape[0], stride) for e in arguments.embeddings)
        programs += across * sum(cdiv(e.shape[0], PREPARE_BLOCKS["BLOCK_N"]) for e in arguments.embeddings)
    predict_prepare_kernel[(programs,)](
        biases,
        forward_weights,
        backward_weights,
        tables,
        arguments.biases[:-1],
        arguments.weights[1:-1],
        arguments.embeddings,
        tuple(e.shape[0] for e in arguments.embeddings),
        arguments.weights[0],
        **first_layer_constants(arguments, config),
        **PREPARE_BLOCKS,
        **PREPARE_OPTIONS,
    )
    return biases, forward_weights, backward_weights, tables


def run(arguments: Arguments, wanted: Wanted) -> None:
    """Fill what is wanted; the rows of a gradient go chunk by chunk, so that the workspace does not grow with them."""
    device = arguments.weights[0].device
    processors = multiprocessors(device)
    config = predict_config(arguments.count, arguments.width, arguments.precision, processors)
    tiles = cdiv(arguments.count, config.rows)
    keep = wanted.gradient is not None
    layers, stride, element = arguments.hidden_layers, config.stride, arguments.element
    if keep:
        row_bytes = stride * ((2 * layers - 1) * element.itemsize + 4)
        waves = max(1, WORKSPACE // (row_bytes * config.rows * processors))
        chunk_tiles = min(tiles, waves * processors)
    else:
        chunk_tiles = tiles
    programs = min(chunk_tiles, tiles if keep else 2 * processors)
    slots = programs * config.rows
    hidden = arguments.empty(layers - 1 if keep else 2, slots, stride, dtype=element)
    last = arguments.empty(slots, stride)
    gradients = arguments.empty(layers, slots, stride, dtype=element) if keep else None
    d_output = arguments.empty(slots, arguments.block_outputs) if keep else None
    losses = None if wanted.loss is None else arguments.empty(tiles)
    biases, forward_weights, backward_weights, tables = _prepare(arguments, config, backward=keep)

    splits, partials = 1, None
    if keep:
        across = cdiv(stride, config.block)
        first_across = cdiv(arguments.weights[0].shape[1], config.block)
        tasks = across * ((layers - 1) * across + first_across + 1 + layers) + 1
        splits = max(1, min(cdiv(2 * processors, tasks), cdiv(slots, SPLIT)))
        partials = arguments.empty(splits, arguments.parameters)
    for first in range(0, tiles, chunk_tiles):
        filled = min(chunk_tiles, tiles - first)
        predict_rows_kernel[(min(programs, filled),)](
            wanted.prediction,
            losses,
            hidden,
            last,
            gradients,
            d_output,
            wanted.grad,
            wanted.targets,
            wanted.element_weights,
            arguments.embeddings,
            tables,
            arguments.indices,
            arguments.rows,
            arguments.weights[0],
            forward_weights,
            backward_weights,
            biases,
            arguments.weights[-1],
            arguments.biases[-1],
            first * config.rows,
            arguments.count,
            filled,
            slots,
            stride,
            arguments.weights[0].shape[1],
            **row_constants(arguments, config),
            **row_options(config),
        )
        if keep:
            predict_weight_gradient_kernel[(tasks, splits)](
                partials,
                hidden,
                last,
                gradients,
                d_output,
                arguments.embeddings,
                arguments.indices,
                arguments.rows,
                first * config.rows,
                arguments.count,
                filled * config.rows,
                slots,
                cdiv(cdiv(slots, splits), config.inner) * config.inner,
                int(first == 0),
                **weight_constants(arguments, config),
                **WEIGHT_OPTIONS,
            )
    reduce(wanted.gradient, partials, wanted.loss, losses, splits)


def reduce(
    gradient: Tensor | None, partials: Tensor | None, loss: Tensor | None, losses: Tensor | None, splits: int
) -> None:
    """Add the splits' gradients and the tiles' losses."""
    if gradient is None and loss is None:
        return
    parameters = 0 if gradient is None else gradient.numel()
    predict_reduce_kernel[(max(1, cdiv(parameters, REDUCE_BLOCK)),)](
        gradient,
        partials,
        loss,
        losses,
        splits,
        parameters,
        0 if losses is None else losses.numel(),
        REDUCE_BLOCK,
        **REDUCE_OPTIONS,
    )
