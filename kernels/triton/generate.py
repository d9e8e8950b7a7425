"""Triton kernels of `generate`: encoding -> trunk -> head + theta0, one launch forward and one launch backward.

Each program owns a contiguous range of head rows. For every segment that its range meets it runs the trunk (a few
thousand multiplications, cheaper than another launch) and streams its rows of the head once.

Backward: each program writes its rows of the head gradient and leaves its share of dh = grad^T head, one slot per
(program, segment). The last program to finish, found by an integer ticket, adds the shares in a fixed order (no float
atomics: two runs agree bit for bit) and runs the trunk's backward.

Activations pass from one layer to the next through a scratch buffer in global memory, which stays in the cache: layers
of any number and width then need neither shared memory nor one register array per layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
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

__all__ = ["Configuration", "backward", "configurations", "forward", "supports"]

MAX_LAYERS = 8
MAX_WIDTH = 256
PRECISION = "ieee"
"""`input_precision` of float32 matrix products; "tf32" is faster and loses 13 bits."""


# ---------------------------------------------------------------------------------------------------------------------
# Compile-time arithmetic


@triton.constexpr_function
def _encoded_width(D, ENCODING):
    return D if ENCODING == "none" else 2 * D


@triton.constexpr_function
def _input_width(LAYER, D, WIDTHS, ENCODING):
    return WIDTHS[LAYER - 1] if LAYER else (D if ENCODING == "none" else 2 * D)


@triton.constexpr_function
def _sum(WIDTHS, LAYERS):
    return sum(WIDTHS[i] for i in range(LAYERS))


@triton.constexpr_function
def _parameters_before(LAYER, D, WIDTHS, ENCODING):
    """Offset of a layer in the flat trunk gradient `[W_1, b_1, W_2, b_2, ...]`."""
    width, count = (D if ENCODING == "none" else 2 * D), 0
    for i in range(LAYER):
        count += WIDTHS[i] * (width + 1)
        width = WIDTHS[i]
    return count


@triton.constexpr_function
def _block(width, low, high):
    """The power of two that covers `width`, kept within bounds."""
    return max(low, min(high, 1 << max(0, width - 1).bit_length()))


# ---------------------------------------------------------------------------------------------------------------------
# Encoding, activation, small products


@triton.jit
def _activate(x, negative_slope, ACTIVATION: tl.constexpr):
    if ACTIVATION == "leaky_relu":
        return tl.where(x > 0, x, x * negative_slope)
    elif ACTIVATION == "relu":
        return tl.where(x > 0, x, 0.0)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    else:
        return _tanh(x)


@triton.jit
def _activation_slope(x, negative_slope, ACTIVATION: tl.constexpr):
    if ACTIVATION == "leaky_relu":
        return tl.where(x > 0, 1.0, negative_slope)
    elif ACTIVATION == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        return 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    else:
        y = _tanh(x)
        return 1 - y * y


@triton.jit
def _tanh(x):
    # The quotient cancels near zero: a series there. NaN passes through both.
    decay = tl.exp(-2 * tl.abs(x))
    large = (1 - decay) / (1 + decay)
    square = x * x
    series = 62.0 / 2835
    series = -17.0 / 315 + square * series
    series = 2.0 / 15 + square * series
    series = -1.0 / 3 + square * series
    return tl.where(tl.abs(x) < 0.25, x + x * square * series, tl.where(x < 0, -large, large))


@triton.jit
def _quarter_turns(x):
    """cos(pi x / 2) and sin(pi x / 2). Reduced in turns, which is exact; the library's reduction in radians spills."""
    turn = x - 4 * tl.floor(x * 0.25)
    quarter = tl.floor(turn + 0.5)
    angle = (turn - quarter) * 1.5707963267948966
    square = angle * angle
    sine = 1.0 / 362880
    sine = -1.0 / 5040 + square * sine
    sine = 1.0 / 120 + square * sine
    sine = -1.0 / 6 + square * sine
    sine = angle + angle * square * sine
    cosine = -1.0 / 3628800
    cosine = 1.0 / 40320 + square * cosine
    cosine = -1.0 / 720 + square * cosine
    cosine = 1.0 / 24 + square * cosine
    cosine = -0.5 + square * cosine
    cosine = 1 + square * cosine
    odd = (quarter == 1) | (quarter == 3)
    c = tl.where(odd, sine, cosine)
    s = tl.where(odd, cosine, sine)
    return tl.where((quarter == 1) | (quarter == 2), -c, c), tl.where((quarter == 2) | (quarter == 3), -s, s)


@triton.jit
def _encode(condition, rows, row_mask, columns, D: tl.constexpr, ENCODING: tl.constexpr):
    """Columns of the encoding of condition rows, `[R, K]`, zero outside the masks."""
    mask = row_mask[:, None] & (columns < _encoded_width(D, ENCODING))[None, :]
    second = columns >= D
    source = tl.where(second, columns - D, columns)
    x = tl.load(condition + rows[:, None] * D + source[None, :], mask=mask, other=0.0).to(tl.float32)
    if ENCODING == "cos|sin":
        cosine, sine = _quarter_turns(x)
        x = tl.where(second[None, :], sine, cosine)
    elif ENCODING == "z|1-z":
        x = tl.where(second[None, :], 1 - x, x)
    return tl.where(mask, x, 0.0)


@triton.jit
def _contract(x, w, acc, PRECISION: tl.constexpr):
    """acc[r, n] + sum_k x[r, k] w[n, k]."""
    if x.shape[0] >= 16:
        return tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
    else:
        return acc + tl.sum(x[:, None, :] * w[None, :, :], 2)


# ---------------------------------------------------------------------------------------------------------------------
# Trunk. `z` holds the pre-activations of all layers, one row per condition row.


@triton.jit
def _features(
    LAYER: tl.constexpr,
    condition,
    condition_rows,
    z,
    z_rows,
    row_mask,
    columns,
    negative_slope,
    D: tl.constexpr,
    WIDTHS: tl.constexpr,
    ENCODING: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Columns of what layer LAYER reads, `[R, K]` in float32; LAYER = number of layers gives what the head reads."""
    if LAYER == 0:
        return _encode(condition, condition_rows, row_mask, columns, D, ENCODING)
    else:
        mask = row_mask[:, None] & (columns < WIDTHS[LAYER - 1])[None, :]
        source = z + z_rows[:, None] * _sum(WIDTHS, len(WIDTHS)) + _sum(WIDTHS, LAYER - 1) + columns[None, :]
        return _activate(tl.load(source, mask=mask, other=0.0), negative_slope, ACTIVATION)


@triton.jit
def _trunk_layer(
    LAYER: tl.constexpr,
    condition,
    condition_rows,
    z,
    z_rows,
    row_mask,
    weight,
    bias,
    negative_slope,
    D: tl.constexpr,
    WIDTHS: tl.constexpr,
    ENCODING: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    IN: tl.constexpr = _input_width(LAYER, D, WIDTHS, ENCODING)
    OUT: tl.constexpr = WIDTHS[LAYER]
    LOW: tl.constexpr = 16 if z_rows.shape[0] >= 16 else 1
    BLOCK_O: tl.constexpr = _block(OUT, LOW, 32)
    BLOCK_K: tl.constexpr = _block(IN, LOW, 16 if LOW == 16 else 32)
    for first in range(0, OUT, BLOCK_O):
        outputs = first + tl.arange(0, BLOCK_O)
        acc = tl.zeros([z_rows.shape[0], BLOCK_O], tl.float32)
        for start in range(0, IN, BLOCK_K):
            inputs = start + tl.arange(0, BLOCK_K)
            x = _features(
                LAYER, condition, condition_rows, z, z_rows, row_mask, inputs,
                negative_slope, D, WIDTHS, ENCODING, ACTIVATION,
            )  # fmt: skip
            mask = (outputs < OUT)[:, None] & (inputs < IN)[None, :]
            w = tl.load(weight + outputs[:, None] * IN + inputs[None, :], mask=mask, other=0.0).to(tl.float32)
            acc = _contract(x, w, acc, PRECISION)
        acc += tl.load(bias + outputs, mask=outputs < OUT, other=0.0).to(tl.float32)[None, :]
        target = z + z_rows[:, None] * _sum(WIDTHS, len(WIDTHS)) + _sum(WIDTHS, LAYER) + outputs[None, :]
        tl.store(target, acc, mask=row_mask[:, None] & (outputs < OUT)[None, :])


@triton.jit
def _trunk(
    condition,
    condition_rows,
    z,
    z_rows,
    row_mask,
    weights,
    biases,
    negative_slope,
    D: tl.constexpr,
    WIDTHS: tl.constexpr,
    ENCODING: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    for layer in tl.static_range(len(WIDTHS)):
        # Other threads wrote what this layer reads, or still read what it writes.
        tl.debug_barrier()
        _trunk_layer(
            layer, condition, condition_rows, z, z_rows, row_mask, weights[layer], biases[layer],
            negative_slope, D, WIDTHS, ENCODING, ACTIVATION, PRECISION,
        )  # fmt: skip


@triton.jit
def _segment_features(
    h,
    segment,
    condition,
    z,
    weights,
    biases,
    B,
    S,
    negative_slope,
    D: tl.constexpr,
    WIDTHS: tl.constexpr,
    H: tl.constexpr,
    ENCODING: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """What the head reads for one segment, `[B, H]`, into the program's scratch `h`."""
    for start in range(0, B, BLOCK_B):
        batch = start + tl.arange(0, BLOCK_B)
        mask = batch < B
        rows = batch * S + segment
        _trunk(
            condition, rows, z, batch, mask, weights, biases,
            negative_slope, D, WIDTHS, ENCODING, ACTIVATION, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()
        BLOCK_K: tl.constexpr = _block(H, 1, 64)
        for first in range(0, H, BLOCK_K):
            columns = first + tl.arange(0, BLOCK_K)
            x = _features(
                len(WIDTHS), condition, rows, z, batch, mask, columns,
                negative_slope, D, WIDTHS, ENCODING, ACTIVATION,
            )  # fmt: skip
            tl.store(h + batch[:, None] * H + columns[None, :], x, mask=mask[:, None] & (columns < H)[None, :])
    tl.debug_barrier()


@triton.jit
def _segment_range(offsets, S, lo, hi):
    """The segments that rows `[lo, hi)` meet, as a half-open range."""
    first = 0
    last = 0
    for start in range(0, S, 256):
        index = start + tl.arange(0, 256)
        begin = tl.load(offsets + index, mask=index < S, other=9223372036854775807)
        first += tl.sum((begin <= lo).to(tl.int32))
        last += tl.sum((begin < hi).to(tl.int32))
    return first - 1, last


# ---------------------------------------------------------------------------------------------------------------------
# Forward


@triton.jit
def _remaining(row, end, BLOCK_P: tl.constexpr):
    """Rows of the tile at `row` that are before `end`, in 32 bits: a comparison per lane stays cheap."""
    return tl.minimum(end - row, BLOCK_P).to(tl.int32)


@triton.jit
def _forward_rows(
    theta, head, theta0, h, start, end, B, P,
    H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A few conditions: multiply and sum, the features stay in registers."""
    batch = tl.arange(0, BLOCK_B)
    columns = tl.arange(0, BLOCK_H)[None, None, :]
    lanes = tl.arange(0, BLOCK_P)
    known = (batch < B)[:, None, None] & (columns < H)
    x = tl.load(h + batch[:, None, None] * H + columns, mask=known, other=0.0)
    for row in range(start, end, BLOCK_P):
        inside = lanes < _remaining(row, end, BLOCK_P)
        tile = (head + row * H) + (lanes[None, :, None] * H + columns)
        mask = inside[None, :, None] & (columns < H)
        w = tl.load(tile, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        base = tl.load((theta0 + row) + lanes, mask=inside, other=0.0).to(tl.float32)
        value = tl.sum(w * x, 2) + base[None, :]
        target = (theta + row) + (batch[:, None].to(tl.int64) * P + lanes[None, :])
        tl.store(target, value, mask=(batch < B)[:, None] & inside[None, :])


@triton.jit
def _forward_rows_dot(
    theta, head, theta0, h, start, end, B, P,
    H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Many conditions: a matrix product per tile, `[BLOCK_B, H] x [H, BLOCK_P]`."""
    lanes = tl.arange(0, BLOCK_P)
    for row in range(start, end, BLOCK_P):
        inside = lanes < _remaining(row, end, BLOCK_P)
        base = tl.load((theta0 + row) + lanes, mask=inside, other=0.0).to(tl.float32)
        for first in range(0, B, BLOCK_B):
            batch = first + tl.arange(0, BLOCK_B)
            acc = tl.zeros([BLOCK_B, BLOCK_P], tl.float32)
            for column in range(0, H, BLOCK_H):
                columns = column + tl.arange(0, BLOCK_H)
                used = columns < H
                tile = (head + row * H) + (lanes[:, None] * H + columns[None, :])
                w = tl.load(tile, mask=inside[:, None] & used[None, :], other=0.0)
                x = tl.load(
                    h + batch[:, None] * H + columns[None, :], mask=(batch < B)[:, None] & used[None, :], other=0.0
                )
                acc = tl.dot(x.to(w.dtype), tl.trans(w), acc, input_precision=PRECISION)
            target = (theta + row) + (batch[:, None].to(tl.int64) * P + lanes[None, :])
            tl.store(target, acc + base[None, :], mask=(batch < B)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["B", "S", "P", "chunk"])
def generate_forward_kernel(
    theta,
    condition,
    weights,
    biases,
    head,
    theta0,
    offsets,
    scratch,
    B,
    S,
    P,
    chunk,
    negative_slope,
    D: tl.constexpr,
    WIDTHS: tl.constexpr,
    H: tl.constexpr,
    ENCODING: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """theta[b, p] = theta0[p] + head[p] . h[b, s(p)] for the rows of this program."""
    Z: tl.constexpr = _sum(WIDTHS, len(WIDTHS))
    program = tl.program_id(0).to(tl.int64)
    lo = program * chunk
    hi = tl.minimum(lo + chunk, P)
    z = scratch + program * B * (Z + H)
    h = z + B * Z
    first = 0
    last = 1
    if offsets is not None:
        first, last = _segment_range(offsets, S, lo, hi)
    for segment in range(first, last):
        start = lo
        end = hi
        if offsets is not None:
            start = tl.maximum(lo, tl.load(offsets + segment))
            end = tl.minimum(hi, tl.load(offsets + segment + 1))
        if start < end:
            _segment_features(
                h, segment, condition, z, weights, biases, B, S, negative_slope,
                D, WIDTHS, H, ENCODING, ACTIVATION, PRECISION, BLOCK_B,
            )  # fmt: skip
            if DOT:
                _forward_rows_dot(
                    theta, head, theta0, h, start, end, B, P, H, BLOCK_B, BLOCK_P, BLOCK_H, PRECISION
                )
            else:
                _forward_rows(theta, head, theta0, h, start, end, B, P, H, BLOCK_B, BLOCK_P, BLOCK_H)


# ---------------------------------------------------------------------------------------------------------------------
# Backward: the head


@triton.jit
def _backward_rows(
    d_head, partial, grad, head, h, start, end, B, P,
    H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A few conditions: d_head = sum_b grad_b h_b; dh is summed over the rows element by element, then once across."""
    batch = tl.arange(0, BLOCK_B)[:, None, None]
    lanes = tl.arange(0, BLOCK_P)[None, :, None]
    columns = tl.arange(0, BLOCK_H)[None, None, :]
    x = tl.load(h + batch * H + columns, mask=(batch < B) & (columns < H), other=0.0)
    acc = tl.zeros([BLOCK_B, BLOCK_P, BLOCK_H], tl.float32)
    for row in range(start, end, BLOCK_P):
        inside = lanes < _remaining(row, end, BLOCK_P)
        tile = lanes * H + columns
        mask = inside & (columns < H)
        w = tl.load((head + row * H) + tile, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        given = (grad + row) + (batch.to(tl.int64) * P + lanes)
        g = tl.load(given, mask=(batch < B) & inside, other=0.0).to(tl.float32)
        tl.store((d_head + row * H) + tile, tl.sum(g * x, 0, keep_dims=True), mask=mask)
        acc += g * w
    rows = tl.arange(0, BLOCK_B)[:, None]
    cols = tl.arange(0, BLOCK_H)[None, :]
    tl.store(partial + rows * H + cols, tl.sum(acc, 1), mask=(rows < B) & (cols < H))


@triton.jit
def _backward_rows_dot(
    d_head, partial, grad, head, h, start, end, B, P,
    H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Many conditions: two matrix products per tile of the head, which is read once."""
    lanes = tl.arange(0, BLOCK_P)
    for column in range(0, H, BLOCK_H):
        columns = column + tl.arange(0, BLOCK_H)
        used = columns < H
        for row in range(start, end, BLOCK_P):
            inside = lanes < _remaining(row, end, BLOCK_P)
            mask = inside[:, None] & used[None, :]
            tile = lanes[:, None] * H + columns[None, :]
            w = tl.load((head + row * H) + tile, mask=mask, other=0.0)
            d_w = tl.zeros([BLOCK_P, BLOCK_H], tl.float32)
            for first in range(0, B, BLOCK_B):
                batch = first + tl.arange(0, BLOCK_B)
                g_mask = (batch < B)[:, None] & inside[None, :]
                g = tl.load(
                    (grad + row) + (batch[:, None].to(tl.int64) * P + lanes[None, :]), mask=g_mask, other=0.0
                )
                slot_mask = (batch < B)[:, None] & used[None, :]
                slot = batch[:, None] * H + columns[None, :]
                x = tl.load(h + slot, mask=slot_mask, other=0.0)
                d_w = tl.dot(tl.trans(g), x.to(g.dtype), d_w, input_precision=PRECISION)
                # The running sum lives in the cache: B rows of it would not fit in registers.
                share = tl.load(partial + slot, mask=slot_mask & (row > start), other=0.0)
                share = tl.dot(g, w, share, input_precision=PRECISION)
                tl.store(partial + slot, share, mask=slot_mask)
            tl.store((d_head + row * H) + tile, d_w, mask=mask)


# ---------------------------------------------------------------------------------------------------------------------
# Backward: the trunk, by the program that finishes last


@triton.jit
def _reduced(partial, rows, row_mask, columns, offsets, B, S, chunk, programs, H: tl.constexpr):
    """dL/dh `[R, N]` of condition rows: the shares of all programs whose rows meet the row's segment."""
    segment = rows % S
    batch = rows // S
    if offsets is not None:
        start = tl.load(offsets + segment, mask=row_mask, other=0)
        end = tl.load(offsets + segment + 1, mask=row_mask, other=0)
        first = start // chunk
        count = tl.where(end > start, (end - 1) // chunk - first + 1, 0)
    else:
        first = tl.zeros_like(rows).to(tl.int64)
        count = first + tl.where(row_mask, programs, 0)
    ROWS: tl.constexpr = rows.shape[0]
    BLOCK_N: tl.constexpr = columns.shape[0]
    GROUP: tl.constexpr = _block(4096 // (ROWS * BLOCK_N), 1, 64)
    used = (row_mask[:, None] & (columns < H)[None, :])[:, None, :]
    acc = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for step in range(0, tl.max(count, 0), GROUP):
        member = step + tl.arange(0, GROUP)
        slot = ((first + segment)[:, None] + member[None, :]) * B + batch[:, None]
        source = partial + slot[:, :, None] * H + columns[None, None, :]
        mask = used & (member[None, :] < count[:, None])[:, :, None]
        # .cg: other multiprocessors wrote this, the first-level cache does not know.
        acc += tl.sum(tl.load(source, mask=mask, other=0.0, cache_modifier=".cg"), 1)
    return acc


@triton.jit
def _feature_gradient(
    LAYER: tl.constexpr, columns, rows, row_mask, partial, d_z, weights, offsets, B, S, chunk, programs,
    D: tl.constexpr, WIDTHS: tl.constexpr, H: tl.constexpr, ENCODING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dL/d(what layer LAYER reads), `[R, N]`."""
    if len(WIDTHS) == LAYER:
        return _reduced(partial, rows, row_mask, columns, offsets, B, S, chunk, programs, H)
    else:
        IN: tl.constexpr = _input_width(LAYER, D, WIDTHS, ENCODING)
        OUT: tl.constexpr = WIDTHS[LAYER]
        LOW: tl.constexpr = 16 if rows.shape[0] >= 16 else 1
        BLOCK_K: tl.constexpr = _block(OUT, LOW, 16 if LOW == 16 else 32)
        acc = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
        for start in range(0, OUT, BLOCK_K):
            outputs = start + tl.arange(0, BLOCK_K)
            source = d_z + rows[:, None] * _sum(WIDTHS, len(WIDTHS)) + _sum(WIDTHS, LAYER) + outputs[None, :]
            g = tl.load(source, mask=row_mask[:, None] & (outputs < OUT)[None, :], other=0.0)
            mask = (columns < IN)[:, None] & (outputs < OUT)[None, :]
            w = tl.load(weights[LAYER] + outputs[None, :] * IN + columns[:, None], mask=mask, other=0.0)
            acc = _contract(g, w.to(tl.float32), acc, PRECISION)
        return acc


@triton.jit
def _layer_gradient(
    LAYER: tl.constexpr, rows, row_mask, partial, z, d_z, weights, offsets, B, S, chunk, programs, negative_slope,
    D: tl.constexpr, WIDTHS: tl.constexpr, H: tl.constexpr, ENCODING: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dL/dz of a layer, for all its columns, into `d_z`."""
    LOW: tl.constexpr = 16 if rows.shape[0] >= 16 else 1
    BLOCK_N: tl.constexpr = _block(WIDTHS[LAYER], LOW, 32)
    for first in range(0, WIDTHS[LAYER], BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        gradient = _feature_gradient(
            LAYER + 1, columns, rows, row_mask, partial, d_z, weights, offsets, B, S, chunk, programs,
            D, WIDTHS, H, ENCODING, PRECISION,
        )  # fmt: skip
        place = rows[:, None] * _sum(WIDTHS, len(WIDTHS)) + _sum(WIDTHS, LAYER) + columns[None, :]
        mask = row_mask[:, None] & (columns < WIDTHS[LAYER])[None, :]
        value = tl.load(z + place, mask=mask, other=0.0)
        tl.store(d_z + place, gradient * _activation_slope(value, negative_slope, ACTIVATION), mask=mask)


@triton.jit
def _condition_gradient(
    d_condition, condition, rows, row_mask, partial, d_z, weights, offsets, B, S, chunk, programs,
    D: tl.constexpr, WIDTHS: tl.constexpr, H: tl.constexpr, ENCODING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    LOW: tl.constexpr = 16 if rows.shape[0] >= 16 else 1
    BLOCK_D: tl.constexpr = _block(D, LOW, 32)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        place = rows[:, None] * D + columns[None, :]
        mask = row_mask[:, None] & (columns < D)[None, :]
        gradient = _feature_gradient(
            0, columns, rows, row_mask, partial, d_z, weights, offsets, B, S, chunk, programs,
            D, WIDTHS, H, ENCODING, PRECISION,
        )  # fmt: skip
        if ENCODING != "none":
            second = _feature_gradient(
                0, columns + D, rows, row_mask, partial, d_z, weights, offsets, B, S, chunk, programs,
                D, WIDTHS, H, ENCODING, PRECISION,
            )  # fmt: skip
            if ENCODING == "cos|sin":
                x = tl.load(condition + place, mask=mask, other=0.0).to(tl.float32)
                cosine, sine = _quarter_turns(x)
                gradient = (second * cosine - gradient * sine) * 1.5707963267948966
            else:
                gradient -= second
        tl.store(d_condition + place, gradient, mask=mask)


@triton.jit
def _weight_gradient(
    LAYER: tl.constexpr, d_trunk, condition, z, d_z, total, negative_slope,
    D: tl.constexpr, WIDTHS: tl.constexpr, ENCODING: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dW = sum over rows of dz x^T and db = sum of dz, into their place in the flat gradient."""
    IN: tl.constexpr = _input_width(LAYER, D, WIDTHS, ENCODING)
    OUT: tl.constexpr = WIDTHS[LAYER]
    Z: tl.constexpr = _sum(WIDTHS, len(WIDTHS))
    LOW: tl.constexpr = 16 if ROWS >= 16 else 1
    BLOCK_O: tl.constexpr = _block(OUT, LOW, 32)
    BLOCK_K: tl.constexpr = _block(IN, LOW, 16 if LOW == 16 else 32)
    d_weight = d_trunk + _parameters_before(LAYER, D, WIDTHS, ENCODING)
    for first in range(0, OUT, BLOCK_O):
        outputs = first + tl.arange(0, BLOCK_O)
        bias = tl.zeros([BLOCK_O], tl.float32)
        for start in range(0, IN, BLOCK_K):
            inputs = start + tl.arange(0, BLOCK_K)
            acc = tl.zeros([BLOCK_O, BLOCK_K], tl.float32)
            for row in range(0, total, ROWS):
                rows = row + tl.arange(0, ROWS)
                inside = rows < total
                source = d_z + rows[:, None] * Z + _sum(WIDTHS, LAYER) + outputs[None, :]
                g = tl.load(source, mask=inside[:, None] & (outputs < OUT)[None, :], other=0.0)
                x = _features(
                    LAYER, condition, rows, z, rows, inside, inputs,
                    negative_slope, D, WIDTHS, ENCODING, ACTIVATION,
                )  # fmt: skip
                if ROWS >= 16:
                    acc = tl.dot(tl.trans(g), x, acc, input_precision=PRECISION)
                else:
                    acc += tl.sum(g[:, :, None] * x[:, None, :], 0)
                bias += tl.where(start == 0, tl.sum(g, 0), 0.0)
            mask = (outputs < OUT)[:, None] & (inputs < IN)[None, :]
            tl.store(d_weight + outputs[:, None] * IN + inputs[None, :], acc, mask=mask)
        tl.store(d_weight + OUT * IN + outputs, bias, mask=outputs < OUT)


@triton.jit
def _trunk_backward(
    d_condition, d_trunk, partial, condition, z, d_z, weights, biases, offsets, B, S, chunk, programs, negative_slope,
    D: tl.constexpr, WIDTHS: tl.constexpr, H: tl.constexpr, ENCODING: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    total = B * S
    for row in range(0, total, ROWS):
        rows = row + tl.arange(0, ROWS)
        inside = rows < total
        if offsets is not None:  # else this program ran the trunk for these very rows, and z has it
            _trunk(
                condition, rows, z, rows, inside, weights, biases,
                negative_slope, D, WIDTHS, ENCODING, ACTIVATION, PRECISION,
            )  # fmt: skip
        for i in tl.static_range(len(WIDTHS)):
            tl.debug_barrier()
            _layer_gradient(
                len(WIDTHS) - 1 - i, rows, inside, partial, z, d_z, weights, offsets, B, S, chunk, programs,
                negative_slope, D, WIDTHS, H, ENCODING, ACTIVATION, PRECISION,
            )  # fmt: skip
        tl.debug_barrier()
        _condition_gradient(
            d_condition, condition, rows, inside, partial, d_z, weights, offsets, B, S, chunk, programs,
            D, WIDTHS, H, ENCODING, PRECISION,
        )  # fmt: skip
    for layer in tl.static_range(len(WIDTHS)):
        _weight_gradient(
            layer, d_trunk, condition, z, d_z, total, negative_slope,
            D, WIDTHS, ENCODING, ACTIVATION, PRECISION, ROWS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["B", "S", "P", "chunk"])
def generate_backward_kernel(
    d_condition,
    d_trunk,
    d_head,
    grad,
    condition,
    weights,
    biases,
    head,
    offsets,
    scratch,
    partial,
    trunk_scratch,
    ticket,
    B,
    S,
    P,
    chunk,
    negative_slope,
    D: tl.constexpr,
    WIDTHS: tl.constexpr,
    H: tl.constexpr,
    ENCODING: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ROWS: tl.constexpr,
):
    """d_head for the rows of this program and its share of dh; then, in the last program, everything below the head."""
    Z: tl.constexpr = _sum(WIDTHS, len(WIDTHS))
    program = tl.program_id(0).to(tl.int64)
    lo = program * chunk
    hi = tl.minimum(lo + chunk, P)
    z = scratch + program * B * (Z + H)
    h = z + B * Z
    first = 0
    last = 1
    if offsets is not None:
        first, last = _segment_range(offsets, S, lo, hi)
    for segment in range(first, last):
        start = lo
        end = hi
        if offsets is not None:
            start = tl.maximum(lo, tl.load(offsets + segment))
            end = tl.minimum(hi, tl.load(offsets + segment + 1))
        if start < end:
            _segment_features(
                h, segment, condition, z, weights, biases, B, S, negative_slope,
                D, WIDTHS, H, ENCODING, ACTIVATION, PRECISION, BLOCK_B,
            )  # fmt: skip
            # Programs and segments both rise along the rows, so that their sum names the pair.
            share = partial + (program + segment) * B * H
            if DOT:
                _backward_rows_dot(
                    d_head, share, grad, head, h, start, end, B, P, H, BLOCK_B, BLOCK_P, BLOCK_H, PRECISION
                )
            else:
                _backward_rows(d_head, share, grad, head, h, start, end, B, P, H, BLOCK_B, BLOCK_P, BLOCK_H)

    # The barrier orders this program's stores before the release; the acquire orders them before the last one's loads.
    tl.debug_barrier()
    finished = tl.atomic_add(ticket, 1, sem="acq_rel")
    if finished == tl.num_programs(0) - 1:
        tl.debug_barrier()
        tl.store(ticket, 0)
        d_z = trunk_scratch
        if offsets is not None:
            z = trunk_scratch + B * S * Z
        _trunk_backward(
            d_condition, d_trunk, partial, condition, z, d_z, weights, biases, offsets,
            B, S, chunk, tl.num_programs(0), negative_slope,
            D, WIDTHS, H, ENCODING, ACTIVATION, PRECISION, ROWS,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Launch


class _Sizes(NamedTuple):
    """What both launches read off their arguments."""

    batch: int
    segments: int
    rows: int
    width: int
    trunk: int
    constants: dict[str, Any]


def _sizes(
    condition: Tensor, trunk_weights: Sequence[Tensor], head: Tensor, encoding: str, activation: str
) -> _Sizes:
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `reference.generate_backward`, in one launch; bit for bit the same in every run.

    Args:
        grad: dL/dtheta `[B, P]`; the rest as for `forward`.

    Returns:
        d_condition `[B, S, D]`, d_trunk flat `[W_1, b_1, W_2, b_2, ...]`, d_head `[P, H]`.
    """
    sizes = _sizes(condition, trunk_weights, head, encoding, activation)
    d_condition = condition.new_empty(condition.shape)
    d_trunk = head.new_empty(sum(w.numel() + w.shape[0] for w in trunk_weights))
    d_head = head.new_empty(head.shape)
    if not grad.numel() or not condition.numel():
        return d_condition.zero_(), d_trunk.zero_(), d_head.zero_()
    config = generate_config(sizes.batch, sizes.segments, sizes.width, head.dtype, backward=True)
    part = partition_rows(sizes.rows, config, head.device)
    batch, segments = sizes.batch, sizes.segments
    with device_guard(head):
        generate_backward_kernel[(part.programs,)](
            d_condition,
            d_trunk,
            d_head,
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
        width = widths[-1] if widths else _encoded_width(dimension, encoding)
        types: dict[str, Any] = dict.fromkeys(generate_backward_kernel.arg_names, element)
        types |= dict.fromkeys(("scratch", "partial", "trunk_scratch"), "*fp32") | {"ticket": "*i32"}
        types |= {"theta": element, "theta0": element, "weights": layers, "biases": layers, "offsets": "*i64"}
        types |= dict.fromkeys(("B", "S", "P", "chunk"), "i32") | {"negative_slope": "fp32"}
        for kernel, is_backward in ((generate_forward_kernel, False), (generate_backward_kernel, True)):
            config = generate_config(batch, segments or 1, width, dtype, backward=is_backward)
            constants: dict[str, Any] = _constants(dimension, widths, width, encoding, activation)
            constants |= _blocks(config, backward=is_backward) | ({} if segments else {"offsets": None})
            yield Configuration(
                f"B={batch} S={segments} D={dimension} widths={widths} {encoding} {activation} {dtype}",
                kernel,
                kernel_signature(kernel, types, constants),
                constants,
                config.options,
            )
