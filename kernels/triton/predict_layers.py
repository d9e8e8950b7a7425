"""The layer-wise path of `predict`, for hidden widths over 512: cuBLAS products with fused Triton steps between them.

Rows go chunk by chunk through a workspace of fixed size, forward and at once backward, so that memory does not grow
with rows times width times layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperfast.kernels.config import cdiv
from hyperfast.kernels.triton.predict_arguments import Arguments, Wanted
from hyperfast.kernels.triton.predict_fused import reduce
from hyperfast.kernels.triton.predict_rows import first_layer, last_layer, store_activation, store_gradient

WORKSPACE = 256 << 20
"""Bytes of activations and gradients of one chunk of rows, about."""
ROWS = 32
"""Rows of a program of the first and the last layer."""
BLOCK = 1024
OPTIONS = {"num_warps": 4, "num_stages": 2}


@triton.jit(do_not_specialize=["start", "end", "width"])
def predict_first_kernel(
    activations, slopes, indices, rows, tables, bias, start, end, width,
    H: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The first layer of rows `[start, end)` from its tables."""
    place = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    which = tl.cast(start, tl.int64) + place
    which = tl.where(which < end, which, 0)
    if rows is not None:
        which = tl.load(rows + which)
    first_layer(activations, slopes, place.to(tl.int64), indices, which, tables, bias, width, H, H, ACTIVATION)


@triton.jit(do_not_specialize=["count"])
def predict_activation_kernel(
    activations, slopes, bias, count, H: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """f(z + b) in place, and f'(z + b) where it will be needed."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < tl.cast(count, tl.int64) * H
    z = tl.load(activations + offset, mask=mask, other=0.0).to(tl.float32) + tl.load(bias + offset % H)
    store_activation(z, activations, slopes, offset, mask, ACTIVATION)


@triton.jit(do_not_specialize=["start", "end", "width"])
def predict_last_kernel(
    prediction, losses, last, gradients, d_output, grad, targets, element_weights, rows, weight, bias, start, end,
    width,
    H: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_OUT: tl.constexpr, ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """The last layer, the loss, and back to dL/dz of the last hidden layer."""
    place = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.cast(start, tl.int64) + place
    inside = row < end
    which = tl.where(inside, row, 0)
    if rows is not None:
        which = tl.load(rows + which)
    last_layer(
        prediction, losses, last, gradients, d_output, place.to(tl.int64), grad, targets, element_weights, which, row,
        inside, start // BLOCK_M + tl.program_id(0), weight, bias, width, H, H, K, BLOCK_OUT, ACTIVATION, EXACT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def predict_slope_kernel(
    g, activations, gradients, count, H: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """dL/dz = g f'(z)."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < tl.cast(count, tl.int64) * H
    g = tl.load(g + offset, mask=mask, other=0.0).to(tl.float32)
    store_gradient(g, activations, gradients, offset, mask, ACTIVATION)


@contextlib.contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    """What cuBLAS does with float32 operands, whatever the program around us has chosen."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, from operands of either dtype."""
    return a @ b if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32)


def _coordinates(arguments: Arguments, start: int, end: int) -> Tensor:
    """The fused embedding of rows `[start, end)`."""
    rows = arguments.rows
    indices = arguments.indices[start:end] if rows is None else arguments.indices.index_select(0, rows[start:end])
    parts = [e.index_select(0, indices[:, j]) for j, e in enumerate(arguments.embeddings)]
    if arguments.fusion == "sum":
        return torch.stack(parts).sum(0).to(arguments.element)
    return torch.cat(parts, 1).to(arguments.element)


def _tables(arguments: Arguments) -> tuple[Tensor, ...]:
    parts = zip(arguments.embeddings, arguments.embedding_offsets, arguments.embedding_widths, strict=True)
    return tuple(e @ arguments.weights[0][:, first : first + width].t() for e, first, width in parts)


class _Pass:
    """One call: the workspace, and the steps that a chunk of rows takes through it."""

    def __init__(self, arguments: Arguments, wanted: Wanted) -> None:
        self.arguments, self.wanted = arguments, wanted
        self.keep = wanted.gradient is not None
        self.layers, width, element = arguments.hidden_layers, arguments.width, arguments.element
        row_bytes = width * (2 * self.layers * element.itemsize + 4)
        self.chunk = min(cdiv(arguments.count, ROWS), max(1, WORKSPACE // (row_bytes * ROWS))) * ROWS
        self.hidden = arguments.empty(self.layers - 1 if self.keep else 2, self.chunk, width, dtype=element)
        self.last = arguments.empty(self.chunk, width)
        self.gradients = arguments.empty(self.layers, self.chunk, width, dtype=element) if self.keep else None
        self.spare = arguments.empty(self.chunk, width, dtype=element) if self.keep else None
        self.d_output = arguments.empty(self.chunk, arguments.block_outputs) if self.keep else None
        self.losses = None if wanted.loss is None else arguments.empty(cdiv(arguments.count, ROWS))
        # float32 weights are used where they are, bfloat16 ones are copies.
        self.matrices = [w.to(element) for w in arguments.weights[:-1]]
        self.tables = None
        if arguments.factorised:
            with _matmul_precision("fp32"):
                self.tables = _tables(arguments)

    def activations(self, layer: int) -> Tensor:
        if layer == self.layers - 1:
            return self.last
        return self.hidden[layer if self.keep else layer % 2]

    def slopes(self, layer: int) -> Tensor | None:
        return None if self.gradients is None else self.gradients[layer]

    def forward(self, start: int, end: int) -> None:
        arguments, count = self.arguments, end - start
        for layer in range(self.layers):
            target = self.activations(layer)[:count]
            bias = arguments.biases[layer]
            if layer == 0 and self.tables is not None:
                predict_first_kernel[(cdiv(count, ROWS),)](
                    target, self.slopes(0), arguments.indices, arguments.rows, self.tables, bias, start, end,
                    arguments.width, arguments.width, arguments.activation, ROWS, **OPTIONS,
                )  # fmt: skip
                continue
            x = self.activations(layer - 1)[:count] if layer else _coordinates(arguments, start, end)
            if target.dtype == x.dtype:
                torch.mm(x, self.matrices[layer].t(), out=target)
            else:  # what the last layer reads is float32
                torch.mm(x, self.matrices[layer].t(), out_dtype=torch.float32, out=target)
            predict_activation_kernel[(cdiv(target.numel(), BLOCK),)](
                target, self.slopes(layer), bias, count,
                arguments.width, arguments.activation, BLOCK, **OPTIONS,
            )  # fmt: skip

    def last_layer(self, start: int, end: int) -> None:
        arguments, wanted = self.arguments, self.wanted
        predict_last_kernel[(cdiv(end - start, ROWS),)](
            wanted.prediction, self.losses, self.last, self.slopes(self.layers - 1), self.d_output, wanted.grad,
            wanted.targets, wanted.element_weights, arguments.rows, arguments.weights[-1],
            arguments.biases[-1], start, end, arguments.width, arguments.width, arguments.outputs, ROWS,
            arguments.block_outputs, arguments.activation,
            "ieee" if arguments.precision == "fp32" else "tf32x3", **OPTIONS,
        )  # fmt: skip

    def backward(self, start: int, end: int) -> None:
        assert self.gradients is not None and self.spare is not None
        count = end - start
        for layer in reversed(range(self.layers - 1)):
            g = self.spare[:count]
            torch.mm(self.gradients[layer + 1, :count], self.matrices[layer + 1], out=g)
            predict_slope_kernel[(cdiv(g.numel(), BLOCK),)](
                g, self.activations(layer), self.gradients[layer], count,
                self.arguments.width, self.arguments.activation, BLOCK, **OPTIONS,
            )  # fmt: skip

    def add_parameter_gradients(self, start: int, end: int) -> None:
        assert self.gradients is not None and self.d_output is not None and self.wanted.gradient is not None
        arguments, count, offset = self.arguments, end - start, 0
        for layer, (weight, bias) in enumerate(zip(arguments.weights, arguments.biases, strict=True)):
            d_weight = self.wanted.gradient[offset : offset + weight.numel()].view(weight.shape)
            offset += weight.numel()
            d_bias = self.wanted.gradient[offset : offset + bias.numel()]
            offset += bias.numel()
            if layer == self.layers:
                with _matmul_precision("fp32"):
                    d_output = self.d_output[:count, : arguments.outputs]
                    d_weight.addmm_(d_output.t(), self.last[:count])
            else:
                d_output = self.gradients[layer, :count]
                x = self.activations(layer - 1)[:count] if layer else _coordinates(arguments, start, end)
                d_weight.add_(_product(d_output.t(), x))
            d_bias.add_(d_output.sum(0, dtype=torch.float32))


def run(arguments: Arguments, wanted: Wanted) -> None:
    """Fill what is wanted."""
    with _matmul_precision(arguments.precision):
        work = _Pass(arguments, wanted)
        if wanted.gradient is not None:
            wanted.gradient.zero_()
        for start in range(0, arguments.count, work.chunk):
            end = min(start + work.chunk, arguments.count)
            work.forward(start, end)
            work.last_layer(start, end)
            if work.keep:
                work.backward(start, end)
                work.add_parameter_gradients(start, end)
        reduce(None, None, wanted.loss, work.losses, 1)
