"""The forward kernel of `generate`: one contiguous range of head rows per program."""

from __future__ import annotations

import triton
import triton.language as tl

from hyperfast.kernels.triton.trunk import (
    segment_features,
    segment_range,
    sum_widths,
)


@triton.jit
def remaining_rows(row, end, BLOCK_P: tl.constexpr):
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
        inside = lanes < remaining_rows(row, end, BLOCK_P)
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
        inside = lanes < remaining_rows(row, end, BLOCK_P)
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
    Z: tl.constexpr = sum_widths(WIDTHS, len(WIDTHS))
    program = tl.program_id(0).to(tl.int64)
    lo = program * chunk
    hi = tl.minimum(lo + chunk, P)
    z = scratch + program * B * (Z + H)
    h = z + B * Z
    first = 0
    last = 1
    if offsets is not None:
        first, last = segment_range(offsets, S, lo, hi)
    for segment in range(first, last):
        start = lo
        end = hi
        if offsets is not None:
            start = tl.maximum(lo, tl.load(offsets + segment))
            end = tl.minimum(hi, tl.load(offsets + segment + 1))
        if start < end:
            segment_features(
                h, segment, condition, z, weights, biases, B, S, negative_slope,
                D, WIDTHS, H, ENCODING, ACTIVATION, PRECISION, BLOCK_B,
            )  # fmt: skip
            if DOT:
                _forward_rows_dot(
                    theta, head, theta0, h, start, end, B, P, H, BLOCK_B, BLOCK_P, BLOCK_H, PRECISION
                )
            else:
                _forward_rows(theta, head, theta0, h, start, end, B, P, H, BLOCK_B, BLOCK_P, BLOCK_H)
