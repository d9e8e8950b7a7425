"""Device functions of `generate` that both directions use: sizes, encoding, activation and trunk.

Activations pass from one layer to the next through a scratch buffer in global memory, which stays in the cache: layers
of any number and width then need neither shared memory nor one register array per layer.
"""

from __future__ import annotations

import triton
import triton.language as tl

# ---------------------------------------------------------------------------------------------------------------------
# Compile-time arithmetic


@triton.constexpr_function
def encoded_width(D, ENCODING):
    """Width of the encoding of D numbers."""
    return D if ENCODING == "none" else 2 * D


@triton.constexpr_function
def input_width(LAYER, D, WIDTHS, ENCODING):
    """Width of what a trunk layer reads."""
    return WIDTHS[LAYER - 1] if LAYER else (D if ENCODING == "none" else 2 * D)


@triton.constexpr_function
def sum_widths(WIDTHS, LAYERS):
    """Width of the first layers together."""
    return sum(WIDTHS[i] for i in range(LAYERS))


@triton.constexpr_function
def parameters_before(LAYER, D, WIDTHS, ENCODING):
    """Offset of a layer in the flat trunk gradient `[W_1, b_1, W_2, b_2, ...]`."""
    width, count = (D if ENCODING == "none" else 2 * D), 0
    for i in range(LAYER):
        count += WIDTHS[i] * (width + 1)
        width = WIDTHS[i]
    return count


@triton.constexpr_function
def covering_block(width, low, high):
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
def activation_slope(x, negative_slope, ACTIVATION: tl.constexpr):
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
def quarter_turns(x):
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
    mask = row_mask[:, None] & (columns < encoded_width(D, ENCODING))[None, :]
    second = columns >= D
    source = tl.where(second, columns - D, columns)
    x = tl.load(condition + rows[:, None] * D + source[None, :], mask=mask, other=0.0).to(tl.float32)
    if ENCODING == "cos|sin":
        cosine, sine = quarter_turns(x)
        x = tl.where(second[None, :], sine, cosine)
    elif ENCODING == "z|1-z":
        x = tl.where(second[None, :], 1 - x, x)
    return tl.where(mask, x, 0.0)


@triton.jit
def contract(x, w, acc, PRECISION: tl.constexpr):
    """acc[r, n] + sum_k x[r, k] w[n, k]."""
    if x.shape[0] >= 16:
        return tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
    else:
        return acc + tl.sum(x[:, None, :] * w[None, :, :], 2)


# ---------------------------------------------------------------------------------------------------------------------
# Trunk. `z` holds the pre-activations of all layers, one row per condition row.


@triton.jit
def feature_tile(
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
        offset = sum_widths(WIDTHS, LAYER - 1) + columns[None, :]
        source = z + z_rows[:, None] * sum_widths(WIDTHS, len(WIDTHS)) + offset
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
    IN: tl.constexpr = input_width(LAYER, D, WIDTHS, ENCODING)
    OUT: tl.constexpr = WIDTHS[LAYER]
    LOW: tl.constexpr = 16 if z_rows.shape[0] >= 16 else 1
    BLOCK_O: tl.constexpr = covering_block(OUT, LOW, 32)
    BLOCK_K: tl.constexpr = covering_block(IN, LOW, 16 if LOW == 16 else 32)
    for first in range(0, OUT, BLOCK_O):
        outputs = first + tl.arange(0, BLOCK_O)
        acc = tl.zeros([z_rows.shape[0], BLOCK_O], tl.float32)
        for start in range(0, IN, BLOCK_K):
            inputs = start + tl.arange(0, BLOCK_K)
            x = feature_tile(
                LAYER, condition, condition_rows, z, z_rows, row_mask, inputs,
                negative_slope, D, WIDTHS, ENCODING, ACTIVATION,
            )  # fmt: skip
            mask = (outputs < OUT)[:, None] & (inputs < IN)[None, :]
            w = tl.load(weight + outputs[:, None] * IN + inputs[None, :], mask=mask, other=0.0).to(tl.float32)
            acc = contract(x, w, acc, PRECISION)
        acc += tl.load(bias + outputs, mask=outputs < OUT, other=0.0).to(tl.float32)[None, :]
        target = z + z_rows[:, None] * sum_widths(WIDTHS, len(WIDTHS)) + sum_widths(WIDTHS, LAYER) + outputs[None, :]
        tl.store(target, acc, mask=row_mask[:, None] & (outputs < OUT)[None, :])


@triton.jit
def run_trunk(
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
def segment_features(
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
        run_trunk(
            condition, rows, z, batch, mask, weights, biases,
            negative_slope, D, WIDTHS, ENCODING, ACTIVATION, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()
        BLOCK_K: tl.constexpr = covering_block(H, 1, 64)
        for first in range(0, H, BLOCK_K):
            columns = first + tl.arange(0, BLOCK_K)
            x = feature_tile(
                len(WIDTHS), condition, rows, z, batch, mask, columns,
                negative_slope, D, WIDTHS, ENCODING, ACTIVATION,
            )  # fmt: skip
            tl.store(h + batch[:, None] * H + columns[None, :], x, mask=mask[:, None] & (columns < H)[None, :])
    tl.debug_barrier()


@triton.jit
def segment_range(offsets, S, lo, hi):
    """The segments that rows `[lo, hi)` meet, as a half-open range."""
    first = 0
    last = 0
    for start in range(0, S, 256):
        index = start + tl.arange(0, 256)
        begin = tl.load(offsets + index, mask=index < S, other=9223372036854775807)
        first += tl.sum((begin <= lo).to(tl.int32))
        last += tl.sum((begin < hi).to(tl.int32))
    return first - 1, last
