"""The backward kernel of `generate`: one pass over the head, then the trunk in the program that finishes last."""

from __future__ import annotations

import triton
import triton.language as tl

from hyperfast.kernels.triton.generate_forward import remaining_rows
from hyperfast.kernels.triton.trunk import (
    activation_slope,
    contract,
    covering_block,
    feature_tile,
    input_width,
    parameters_before,
    quarter_turns,
    run_trunk,
    segment_features,
    segment_range,
    sum_widths,
)

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
        inside = lanes < remaining_rows(row, end, BLOCK_P)
        tile = lanes * H + columns
        mask = inside & (columns < H)
        w = tl.load((head + row * H) + tile, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        given = (grad + row) + (batch.to(tl.int64) * P + lanes)
        g = tl.load(given, mask=(batch < B) & inside, other=0.0).to(tl.float32)
        if d_head is not None:
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
            inside = lanes < remaining_rows(row, end, BLOCK_P)
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
                if d_head is not None:
                    d_w = tl.dot(tl.trans(g), x.to(g.dtype), d_w, input_precision=PRECISION)
                # The running sum lives in the cache: B rows of it would not fit in registers.
                share = tl.load(partial + slot, mask=slot_mask & (row > start), other=0.0)
                share = tl.dot(g, w, share, input_precision=PRECISION)
                tl.store(partial + slot, share, mask=slot_mask)
            if d_head is not None:
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
    GROUP: tl.constexpr = covering_block(4096 // (ROWS * BLOCK_N), 1, 64)
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
        IN: tl.constexpr = input_width(LAYER, D, WIDTHS, ENCODING)
        OUT: tl.constexpr = WIDTHS[LAYER]
        LOW: tl.constexpr = 16 if rows.shape[0] >= 16 else 1
        BLOCK_K: tl.constexpr = covering_block(OUT, LOW, 16 if LOW == 16 else 32)
        acc = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
        for start in range(0, OUT, BLOCK_K):
            outputs = start + tl.arange(0, BLOCK_K)
            offset = sum_widths(WIDTHS, LAYER) + outputs[None, :]
            source = d_z + rows[:, None] * sum_widths(WIDTHS, len(WIDTHS)) + offset
            g = tl.load(source, mask=row_mask[:, None] & (outputs < OUT)[None, :], other=0.0)
            mask = (columns < IN)[:, None] & (outputs < OUT)[None, :]
            w = tl.load(weights[LAYER] + outputs[None, :] * IN + columns[:, None], mask=mask, other=0.0)
            acc = contract(g, w.to(tl.float32), acc, PRECISION)
        return acc


@triton.jit
def _layer_gradient(
    LAYER: tl.constexpr, rows, row_mask, partial, z, d_z, weights, offsets, B, S, chunk, programs, negative_slope,
    D: tl.constexpr, WIDTHS: tl.constexpr, H: tl.constexpr, ENCODING: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dL/dz of a layer, for all its columns, into `d_z`."""
    LOW: tl.constexpr = 16 if rows.shape[0] >= 16 else 1
    BLOCK_N: tl.constexpr = covering_block(WIDTHS[LAYER], LOW, 32)
    for first in range(0, WIDTHS[LAYER], BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        gradient = _feature_gradient(
            LAYER + 1, columns, rows, row_mask, partial, d_z, weights, offsets, B, S, chunk, programs,
            D, WIDTHS, H, ENCODING, PRECISION,
        )  # fmt: skip
        place = rows[:, None] * sum_widths(WIDTHS, len(WIDTHS)) + sum_widths(WIDTHS, LAYER) + columns[None, :]
        mask = row_mask[:, None] & (columns < WIDTHS[LAYER])[None, :]
        value = tl.load(z + place, mask=mask, other=0.0)
        tl.store(d_z + place, gradient * activation_slope(value, negative_slope, ACTIVATION), mask=mask)


@triton.jit
def _condition_gradient(
    d_condition, condition, rows, row_mask, partial, d_z, weights, offsets, B, S, chunk, programs,
    D: tl.constexpr, WIDTHS: tl.constexpr, H: tl.constexpr, ENCODING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    LOW: tl.constexpr = 16 if rows.shape[0] >= 16 else 1
    BLOCK_D: tl.constexpr = covering_block(D, LOW, 32)
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
                cosine, sine = quarter_turns(x)
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
    IN: tl.constexpr = input_width(LAYER, D, WIDTHS, ENCODING)
    OUT: tl.constexpr = WIDTHS[LAYER]
    Z: tl.constexpr = sum_widths(WIDTHS, len(WIDTHS))
    LOW: tl.constexpr = 16 if ROWS >= 16 else 1
    BLOCK_O: tl.constexpr = covering_block(OUT, LOW, 32)
    BLOCK_K: tl.constexpr = covering_block(IN, LOW, 16 if LOW == 16 else 32)
    d_weight = d_trunk + parameters_before(LAYER, D, WIDTHS, ENCODING)
    for first in range(0, OUT, BLOCK_O):
        outputs = first + tl.arange(0, BLOCK_O)
        bias = tl.zeros([BLOCK_O], tl.float32)
        for start in range(0, IN, BLOCK_K):
            inputs = start + tl.arange(0, BLOCK_K)
            acc = tl.zeros([BLOCK_O, BLOCK_K], tl.float32)
            for row in range(0, total, ROWS):
                rows = row + tl.arange(0, ROWS)
                inside = rows < total
                source = d_z + rows[:, None] * Z + sum_widths(WIDTHS, LAYER) + outputs[None, :]
                g = tl.load(source, mask=inside[:, None] & (outputs < OUT)[None, :], other=0.0)
                x = feature_tile(
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
            run_trunk(
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
