"""The row kernel of `predict`: a tile of rows through all layers, and back, in one program.

Activations pass from layer to layer through a workspace that belongs to the tile and stays in the cache; the weight
gradient reads the same workspace. A layer's tile has all its columns at once: accumulators are a tuple of *pieces*,
powers of two that add up to the width padded to 16, so that no width pays for the next power of two. Where they would
not fit the registers, the columns are taken in several passes.

Padded columns hold zeros from the first layer to the last: every activation here maps 0 to 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

# ---------------------------------------------------------------------------------------------------------------------
# Compile-time arithmetic


@triton.constexpr_function
def width_of_first(PIECES, COUNT):
    """Columns of the first COUNT pieces."""
    return sum(PIECES[i] for i in range(COUNT))


@triton.constexpr_function
def stores_slope(ACTIVATION):
    """Whether f'(z) is no function of f(z)."""
    return ACTIVATION in ("hardswish", "gelu")


# ---------------------------------------------------------------------------------------------------------------------
# Activations; NaN passes through all of them


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == "leaky_relu":
        return tl.where(z <= 0, z * 0.01, z)
    elif ACTIVATION == "relu6":
        return tl.where(z <= 0, 0.0, tl.where(z >= 6, 6.0, z))
    elif ACTIVATION == "hardswish":
        return tl.where(z <= -3, 0.0, tl.where(z >= 3, z, z * (z + 3) * (1.0 / 6)))
    elif ACTIVATION == "gelu":
        return 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    else:
        # exp(z) - 1 cancels near zero: a series there.
        series = 1 + z * (1.0 / 8)
        series = 1 + z * series * (1.0 / 7)
        series = 1 + z * series * (1.0 / 6)
        series = 1 + z * series * (1.0 / 5)
        series = 1 + z * series * (1.0 / 4)
        series = 1 + z * series * (1.0 / 3)
        series = z + z * z * series * 0.5
        return tl.where(z > 0, z, tl.where(z < -0.5, tl.exp(z) - 1, series))


@triton.jit
def slope_of_input(z, ACTIVATION: tl.constexpr):
    """f'(z) of the activations that need z."""
    if ACTIVATION == "hardswish":
        return tl.where(z <= -3, 0.0, tl.where(z >= 3, 1.0, z * (1.0 / 3) + 0.5))
    else:
        return 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327


@triton.jit
def slope_of_output(a, ACTIVATION: tl.constexpr):
    """f'(z) from a = f(z)."""
    if ACTIVATION == "relu":
        return tl.where(a > 0, 1.0, 0.0)
    elif ACTIVATION == "leaky_relu":
        return tl.where(a > 0, 1.0, 0.01)
    elif ACTIVATION == "relu6":
        return tl.where((a > 0) & (a < 6), 1.0, 0.0)
    else:
        return tl.where(a > 0, 1.0, a + 1)


@triton.jit
def store_activation(z, activations, gradients, offset, mask, ACTIVATION: tl.constexpr):
    """f(z), and f'(z) where the gradient will be, if the backward pass could not tell it from f(z)."""
    tl.store(activations + offset, activate(z, ACTIVATION), mask=mask)
    if gradients is not None:  # noqa: SIM102 - known when compiled
        if stores_slope(ACTIVATION):
            tl.store(gradients + offset, slope_of_input(z, ACTIVATION), mask=mask)


@triton.jit
def store_gradient(g, activations, gradients, offset, mask, ACTIVATION: tl.constexpr):
    """dL/dz = g f'(z)."""
    if stores_slope(ACTIVATION):
        slope = tl.load(gradients + offset, mask=mask).to(tl.float32)
    else:
        slope = slope_of_output(tl.load(activations + offset, mask=mask).to(tl.float32), ACTIVATION)
    tl.store(gradients + offset, g * slope, mask=mask)


# ---------------------------------------------------------------------------------------------------------------------
# First layer


@triton.jit
def coordinates(embeddings, indices, which, columns, OFFSETS: tl.constexpr, WIDTHS: tl.constexpr):
    """Columns of the fused embedding of rows, `[R, C]`, gathered from the small tables."""
    x = tl.zeros([which.shape[0], columns.shape[0]], tl.float32)
    for j in tl.static_range(len(embeddings)):
        at = tl.load(indices + which * len(embeddings) + j).to(tl.int64)
        column = columns - OFFSETS[j]
        mask = (column >= 0) & (column < WIDTHS[j])
        x += tl.load(embeddings[j] + at[:, None] * WIDTHS[j] + column[None, :], mask=mask[None, :], other=0.0)
    return x


@triton.jit
def first_layer(
    activations, gradients, place, indices, which, tables, bias, stride,
    H: tl.constexpr, STRIDE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """f(sum_j T_j[index_j] + b_1) of the rows `which`, stored in the rows `place`."""
    BLOCK: tl.constexpr = 64 if which.shape[0] <= 32 else 2048 // which.shape[0]
    for first in range(0, stride, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        z = tl.zeros([which.shape[0], BLOCK], tl.float32)
        z += tl.load(bias + columns, mask=columns < H, other=0.0)[None, :]
        for j in tl.static_range(len(tables)):
            at = tl.load(indices + which * len(tables) + j).to(tl.int64)
            mask = (columns < STRIDE)[None, :]
            z += tl.load(tables[j] + at[:, None] * STRIDE + columns[None, :], mask=mask, other=0.0)
        offset = place[:, None] * STRIDE + columns[None, :]
        store_activation(z, activations, gradients, offset, (columns < STRIDE)[None, :], ACTIVATION)


# ---------------------------------------------------------------------------------------------------------------------
# Last layer and loss


@triton.jit
def last_layer(
    prediction, losses, last, gradients, d_output, place, grad, targets, element_weights, which, row, inside, tile,
    weight, bias, stride,
    H: tl.constexpr, STRIDE: tl.constexpr, K: tl.constexpr, BLOCK_OUT: tl.constexpr, ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Prediction, loss, and back to dL/dz of the last hidden layer; all in float32.

    `d_output` is dL/dprediction: 2 w (prediction - target), or `grad`. Rows that are not `inside` have a gradient of 0.
    """
    outputs = tl.arange(0, BLOCK_OUT)
    known = inside[:, None] & (outputs < K)[None, :]
    if grad is None:
        out = tl.zeros([which.shape[0], BLOCK_OUT], tl.float32)
        for k in range(0, stride, 16):
            inputs = k + tl.arange(0, 16)
            source = last + place[:, None] * STRIDE + inputs[None, :]
            x = tl.load(source, mask=(inputs < STRIDE)[None, :], other=0.0)
            mask = (outputs < K)[None, :] & (inputs < H)[:, None]
            w = tl.load(weight + outputs[None, :] * H + inputs[:, None], mask=mask, other=0.0)
            out = tl.dot(x, w, out, input_precision=EXACT)
        out += tl.load(bias + outputs, mask=outputs < K, other=0.0)[None, :]
        if prediction is not None:
            tl.store(prediction + row[:, None] * K + outputs[None, :], out, mask=known)
    if targets is not None:
        element = which[:, None] * K + outputs[None, :]
        difference = out - tl.load(targets + element, mask=known, other=0.0)
        if element_weights is not None:
            importance = tl.load(element_weights + element, mask=known, other=0.0)
            d = tl.where(known & (importance != 0), 2 * importance * difference, 0.0)
        else:
            d = tl.where(known, 2 * difference, 0.0)
        # With d = 0 where the element is left out, 0.5 * d * difference would still be NaN for a target of NaN.
        tl.store(losses + tile, tl.sum(0.5 * d * tl.where(d == 0, 0.0, difference)))
    elif grad is not None:
        d = tl.load(grad + row[:, None] * K + outputs[None, :], mask=known, other=0.0)
    if gradients is not None:
        tl.store(d_output + place[:, None] * BLOCK_OUT + outputs[None, :], d)
        BLOCK: tl.constexpr = 64 if which.shape[0] <= 32 else 2048 // which.shape[0]
        for first in range(0, stride, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            real = (outputs < K)[:, None] & (columns < H)[None, :]
            across = tl.load(weight + outputs[:, None] * H + columns[None, :], mask=real, other=0.0)
            g = tl.dot(d, across, input_precision=EXACT)
            offset = place[:, None] * STRIDE + columns[None, :]
            store_gradient(g, last, gradients, offset, (columns < STRIDE)[None, :], ACTIVATION)


# ---------------------------------------------------------------------------------------------------------------------
# Products with a tuple of accumulators: pieces AT to END of the columns


@triton.jit
def _zeros(rows, PIECES: tl.constexpr, AT: tl.constexpr, END: tl.constexpr):
    WIDTH: tl.constexpr = PIECES[AT]
    acc = tl.zeros([rows.shape[0], WIDTH], tl.float32)
    if AT + 1 == END:
        return (acc,)
    else:
        return (acc,) + _zeros(rows, PIECES, AT + 1, END)  # noqa: RUF005


@triton.jit
def _multiply(
    accs, x, w, k, LIMIT: tl.constexpr, K: tl.constexpr, PIECES: tl.constexpr, BEGIN: tl.constexpr, AT: tl.constexpr,
    END: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """accs[i][r, n] + sum_k x[r, k] w[n, k]; w has LIMIT rows of K."""
    WIDTH: tl.constexpr = PIECES[AT]
    columns = width_of_first(PIECES, AT) + tl.arange(0, WIDTH)
    inputs = k + tl.arange(0, x.shape[1])
    mask = (inputs < K)[:, None]
    if width_of_first(PIECES, len(PIECES)) > LIMIT:
        mask = mask & (columns < LIMIT)[None, :]
    tile = tl.load(w + columns[None, :] * K + inputs[:, None], mask=mask, other=0.0)
    acc = tl.dot(x, tile.to(x.dtype), accs[AT - BEGIN], input_precision=PRECISION)
    if AT + 1 == END:
        return (acc,)
    else:
        return (acc,) + _multiply(accs, x, w, k, LIMIT, K, PIECES, BEGIN, AT + 1, END, PRECISION)  # noqa: RUF005


@triton.jit
def _product(
    x, w, place, stride, STRIDE: tl.constexpr, PIECES: tl.constexpr, BEGIN: tl.constexpr, END: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    accs = _zeros(place, PIECES, BEGIN, END)
    for k in range(0, stride, BLOCK_K):
        inputs = k + tl.arange(0, BLOCK_K)
        source = x + place[:, None] * STRIDE + inputs[None, :]
        tile = tl.load(source, mask=(inputs < STRIDE)[None, :], other=0.0)
        accs = _multiply(accs, tile, w, k, STRIDE, STRIDE, PIECES, BEGIN, BEGIN, END, PRECISION)
    return accs


@triton.jit
def _coordinate_product(
    embeddings, indices, which, weight, inputs, H: tl.constexpr, OFFSETS: tl.constexpr, WIDTHS: tl.constexpr,
    PIECES: tl.constexpr, BEGIN: tl.constexpr, END: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    E: tl.constexpr = OFFSETS[len(OFFSETS) - 1] + WIDTHS[len(OFFSETS) - 1]
    accs = _zeros(which, PIECES, BEGIN, END)
    for k in range(0, inputs, BLOCK_K):
        x = coordinates(embeddings, indices, which, k + tl.arange(0, BLOCK_K), OFFSETS, WIDTHS)
        if HALF:
            x = x.to(tl.bfloat16)
        accs = _multiply(accs, x, weight, k, H, E, PIECES, BEGIN, BEGIN, END, PRECISION)
    return accs


@triton.jit
def _finish_columns(
    acc, first: tl.constexpr, activations, gradients, place, bias, STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """A layer's activations from z without its bias, or, where there is no bias, dL/dz from dL/da.

    Halved until a thread has few elements at a time: addresses and loads of the whole piece would not fit beside it.
    """
    if acc.shape[1] > 16 and acc.shape[0] * acc.shape[1] > 2048:
        HALF: tl.constexpr = acc.shape[1] // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, [acc.shape[0], 2, HALF]), (0, 2, 1)))
        _finish_columns(left, first, activations, gradients, place, bias, STRIDE, ACTIVATION)
        _finish_columns(right, first + HALF, activations, gradients, place, bias, STRIDE, ACTIVATION)
    else:
        columns = first + tl.arange(0, acc.shape[1])
        offset = place[:, None] * STRIDE + columns[None, :]
        if bias is None:
            store_gradient(acc, activations, gradients, offset, None, ACTIVATION)
        else:
            z = acc + tl.load(bias + columns)[None, :]
            store_activation(z, activations, gradients, offset, None, ACTIVATION)


@triton.jit
def _finish(
    accs, activations, gradients, place, bias, STRIDE: tl.constexpr, PIECES: tl.constexpr,
    BEGIN: tl.constexpr, AT: tl.constexpr, END: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    _finish_columns(
        accs[AT - BEGIN], width_of_first(PIECES, AT), activations, gradients, place, bias, STRIDE, ACTIVATION
    )
    if AT + 1 < END:
        _finish(accs, activations, gradients, place, bias, STRIDE, PIECES, BEGIN, AT + 1, END, ACTIVATION)


@triton.jit
def _coordinate_layer(
    activations, gradients, place, embeddings, indices, which, weight, bias, inputs, H: tl.constexpr,
    STRIDE: tl.constexpr, OFFSETS: tl.constexpr, WIDTHS: tl.constexpr, PIECES: tl.constexpr, BEGIN: tl.constexpr,
    END: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    accs = _coordinate_product(
        embeddings, indices, which, weight, inputs, H, OFFSETS, WIDTHS, PIECES, BEGIN, END, BLOCK_K, PRECISION, HALF
    )
    _finish(accs, activations, gradients, place, bias, STRIDE, PIECES, BEGIN, BEGIN, END, ACTIVATION)


@triton.jit
def _hidden_layer(
    activations, gradients, x, place, w, bias, stride, STRIDE: tl.constexpr, PIECES: tl.constexpr,
    BEGIN: tl.constexpr, END: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x w^T, and what becomes of it: see `_finish_columns`."""
    accs = _product(x, w, place, stride, STRIDE, PIECES, BEGIN, END, BLOCK_K, PRECISION)
    _finish(accs, activations, gradients, place, bias, STRIDE, PIECES, BEGIN, BEGIN, END, ACTIVATION)


@triton.jit(do_not_specialize=["start", "end", "tiles", "slots", "stride", "inputs"])
def predict_rows_kernel(
    prediction,
    losses,
    hidden,
    last,
    gradients,
    d_output,
    grad,
    targets,
    element_weights,
    embeddings,
    tables,
    indices,
    rows,
    first_weight,
    forward_weights,
    backward_weights,
    biases,
    last_weight,
    last_bias,
    start,
    end,
    tiles,
    slots,
    stride,
    inputs,
    H: tl.constexpr,
    STRIDE: tl.constexpr,
    K: tl.constexpr,
    OFFSETS: tl.constexpr,
    WIDTHS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PIECES: tl.constexpr,
    PASSES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    HALF: tl.constexpr,
    LAYERS: tl.constexpr,
):
    """Tiles of rows `[start, end)`: predictions or losses, and, with `gradients`, dL/dz of every layer."""
    size = tl.cast(slots, tl.int64) * STRIDE
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        lanes = tl.arange(0, BLOCK_M)
        row = tl.cast(start, tl.int64) + tile * BLOCK_M + lanes
        inside = row < end
        which = tl.where(inside, row, 0)
        if rows is not None:
            which = tl.load(rows + which)
        # Without gradients the workspace is this program's own. The remainder is its index, and the compiler does not
        # know it: it would compute all addresses ahead of the loop.
        place = (tile % tl.num_programs(0) if gradients is None else tile) * BLOCK_M + lanes
        tl.debug_barrier()  # other threads may still read what the last tile left

        # Layers are a loop at run time, and `stride` and `inputs` bound its loops at run time though they are known:
        # unrolled, the addresses of all steps would be computed ahead and fill the registers from end to end.
        first = last if LAYERS == 1 else hidden
        if tables is not None:
            first_layer(first, gradients, place, indices, which, tables, biases, stride, STRIDE, STRIDE, ACTIVATION)
        else:
            for p in tl.static_range(len(PASSES) - 1):
                _coordinate_layer(
                    first, gradients, place, embeddings, indices, which, first_weight, biases, inputs, H, STRIDE,
                    OFFSETS, WIDTHS, PIECES, PASSES[p], PASSES[p + 1], ACTIVATION, BLOCK_K, PRECISION, HALF,
                )  # fmt: skip
        for layer in range(1, LAYERS - 1):
            tl.debug_barrier()
            source = hidden + (layer - 1 if gradients is not None else (layer - 1) % 2) * size
            target = hidden + (layer if gradients is not None else layer % 2) * size
            for p in tl.static_range(len(PASSES) - 1):
                _hidden_layer(
                    target, None if gradients is None else gradients + layer * size, source,
                    place, forward_weights + (layer - 1) * STRIDE * STRIDE, biases + layer * STRIDE, stride,
                    STRIDE, PIECES, PASSES[p], PASSES[p + 1], ACTIVATION, BLOCK_K, PRECISION,
                )  # fmt: skip
        if LAYERS > 1:
            tl.debug_barrier()
            for p in tl.static_range(len(PASSES) - 1):
                _hidden_layer(
                    last, None if gradients is None else gradients + (LAYERS - 1) * size,
                    hidden + (LAYERS - 2 if gradients is not None else (LAYERS - 2) % 2) * size,
                    place, forward_weights + (LAYERS - 2) * STRIDE * STRIDE, biases + (LAYERS - 1) * STRIDE, stride,
                    STRIDE, PIECES, PASSES[p], PASSES[p + 1], ACTIVATION, BLOCK_K, PRECISION,
                )  # fmt: skip
        tl.debug_barrier()
        last_layer(
            prediction, losses, last, None if gradients is None else gradients + (LAYERS - 1) * size, d_output, place,
            grad, targets, element_weights, which, row, inside, start // BLOCK_M + tile, last_weight, last_bias, stride,
            H, STRIDE, K, BLOCK_OUT, ACTIVATION, EXACT,
        )  # fmt: skip
        if gradients is not None:
            for i in range(LAYERS - 1):
                layer = LAYERS - 2 - i
                tl.debug_barrier()
                for p in tl.static_range(len(PASSES) - 1):
                    _hidden_layer(
                        hidden + layer * size, gradients + layer * size, gradients + (layer + 1) * size,
                        place, backward_weights + layer * STRIDE * STRIDE, None, stride,
                        STRIDE, PIECES, PASSES[p], PASSES[p + 1], ACTIVATION, BLOCK_K, PRECISION,
                    )  # fmt: skip
