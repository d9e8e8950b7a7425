"""What `predict` does once per call: padded copies and tables before the rows, parameter gradients after them."""

from __future__ import annotations

import triton
import triton.language as tl

from hyperfast.kernels.triton.predict_rows import coordinates

# ---------------------------------------------------------------------------------------------------------------------
# Before: hidden matrices padded, transposed and in the dtype of the products; the tables of the first layer


@triton.jit
def _pad_matrix(
    forward, backward, weight, block, H: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One block of W, zero where it is padding, to `forward`, and of W^T to `backward`: products read along rows."""
    ACROSS: tl.constexpr = (STRIDE + BLOCK - 1) // BLOCK
    o = (block // ACROSS) * BLOCK + tl.arange(0, BLOCK)[:, None]
    i = (block % ACROSS) * BLOCK + tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + o * H + i, mask=(o < H) & (i < H), other=0.0)
    mask = (o < STRIDE) & (i < STRIDE)
    tl.store(forward + o * STRIDE + i, w, mask=mask)
    if backward is not None:
        o = (block // ACROSS) * BLOCK + tl.arange(0, BLOCK)[None, :]
        i = (block % ACROSS) * BLOCK + tl.arange(0, BLOCK)[:, None]
        tl.store(backward + i * STRIDE + o, tl.trans(w), mask=(o < STRIDE) & (i < STRIDE))


@triton.jit
def _table_tile(
    table, embedding, weight, block, count, H: tl.constexpr, STRIDE: tl.constexpr, OFFSET: tl.constexpr,
    WIDTH: tl.constexpr, E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of T_j = embedding_j W_1[:, block j]^T, in float32."""
    ACROSS: tl.constexpr = (STRIDE + BLOCK - 1) // BLOCK
    n = (block // ACROSS).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = (block % ACROSS) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK_N, BLOCK], tl.float32)
    for k in range(0, WIDTH, 16):
        inputs = k + tl.arange(0, 16)
        mask = (n < count)[:, None] & (inputs < WIDTH)[None, :]
        x = tl.load(embedding + n[:, None] * WIDTH + inputs[None, :], mask=mask, other=0.0)
        mask = (columns < H)[None, :] & (inputs < WIDTH)[:, None]
        w = tl.load(weight + columns[None, :] * E + OFFSET + inputs[:, None], mask=mask, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    mask = (n < count)[:, None] & (columns < STRIDE)[None, :]
    tl.store(table + n[:, None] * STRIDE + columns[None, :], acc, mask=mask)


@triton.jit
def predict_prepare_kernel(
    padded_biases,
    forward_weights,
    backward_weights,
    tables,
    biases,
    hidden_weights,
    embeddings,
    counts,
    first_weight,
    H: tl.constexpr,
    STRIDE: tl.constexpr,
    OFFSETS: tl.constexpr,
    WIDTHS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A bias, a block of a hidden matrix, or a tile of a table, per program."""
    E: tl.constexpr = OFFSETS[len(OFFSETS) - 1] + WIDTHS[len(OFFSETS) - 1]
    ACROSS: tl.constexpr = (STRIDE + BLOCK - 1) // BLOCK
    task = tl.program_id(0)
    for i in tl.static_range(len(biases)):
        if task == i:
            for first in range(0, STRIDE, BLOCK):
                columns = first + tl.arange(0, BLOCK)
                bias = tl.load(biases[i] + columns, mask=columns < H, other=0.0)
                tl.store(padded_biases + i * STRIDE + columns, bias, mask=columns < STRIDE)
    task -= len(biases)
    for i in tl.static_range(len(hidden_weights)):
        if (task >= 0) & (task < ACROSS * ACROSS):
            backward = None if backward_weights is None else backward_weights + i * STRIDE * STRIDE
            _pad_matrix(
                forward_weights + i * STRIDE * STRIDE, backward, hidden_weights[i], task, H, STRIDE, BLOCK
            )
        task -= ACROSS * ACROSS
    if tables is not None:
        for j in tl.static_range(len(tables)):
            tiles = (counts[j] + BLOCK_N - 1) // BLOCK_N * ACROSS
            if (task >= 0) & (task < tiles):
                _table_tile(
                    tables[j], embeddings[j], first_weight, task, counts[j],
                    H, STRIDE, OFFSETS[j], WIDTHS[j], E, BLOCK_N, BLOCK,
                )  # fmt: skip
            task -= tiles


# ---------------------------------------------------------------------------------------------------------------------
# After: dW = sum over rows of dz x^T, db = sum of dz. Every tile belongs to one program of each split of the rows,
# which adds to its own partial buffer chunk after chunk; the splits are added in their order at the end.


@triton.jit
def _store_partial(target, acc, mask, first_chunk):
    tl.store(target, acc + tl.load(target, mask=mask & (first_chunk == 0), other=0.0), mask=mask)


@triton.jit
def _outer(
    target, g, x, g_columns, x_columns, begin, end, first_chunk, G_STRIDE: tl.constexpr, X_STRIDE: tl.constexpr,
    G_LIMIT: tl.constexpr, X_LIMIT: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """target[o, i] (+)= sum_r g[r, o] x[r, i]; both have as many columns in memory as their stride."""
    acc = tl.zeros([g_columns.shape[0], x_columns.shape[0]], tl.float32)
    for start in range(begin, end, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        mask = (r < end)[:, None] & (g_columns < G_STRIDE)[None, :]
        a = tl.load(g + r[:, None] * G_STRIDE + g_columns[None, :], mask=mask, other=0.0)
        mask = (r < end)[:, None] & (x_columns < X_STRIDE)[None, :]
        b = tl.load(x + r[:, None] * X_STRIDE + x_columns[None, :], mask=mask, other=0.0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
    target += g_columns[:, None] * X_LIMIT + x_columns[None, :]
    _store_partial(target, acc, (g_columns < G_LIMIT)[:, None] & (x_columns < X_LIMIT)[None, :], first_chunk)


@triton.jit
def _coordinate_outer(
    target, g, embeddings, indices, rows, g_columns, x_columns, begin, end, start_row, end_row, first_chunk,
    H: tl.constexpr, STRIDE: tl.constexpr, E: tl.constexpr, OFFSETS: tl.constexpr, WIDTHS: tl.constexpr,
    BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same with the embedding gathered on the way: the gradient of a gather as a product, without a sort."""
    acc = tl.zeros([g_columns.shape[0], x_columns.shape[0]], tl.float32)
    for start in range(begin, end, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        mask = (r < end)[:, None] & (g_columns < STRIDE)[None, :]
        a = tl.load(g + r[:, None] * STRIDE + g_columns[None, :], mask=mask, other=0.0)
        which = tl.cast(start_row, tl.int64) + r
        which = tl.where((r < end) & (which < end_row), which, 0)
        if rows is not None:
            which = tl.load(rows + which)
        b = coordinates(embeddings, indices, which, x_columns, OFFSETS, WIDTHS)
        acc = tl.dot(tl.trans(a), b.to(a.dtype), acc, input_precision=PRECISION)
    target += g_columns[:, None] * E + x_columns[None, :]
    _store_partial(target, acc, (g_columns < H)[:, None] & (x_columns < E)[None, :], first_chunk)


@triton.jit
def _column_sums(
    target, g, columns, begin, end, first_chunk, STRIDE: tl.constexpr, LIMIT: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    acc = tl.zeros([BLOCK_R, columns.shape[0]], tl.float32)
    for start in range(begin, end, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        mask = (r < end)[:, None] & (columns < STRIDE)[None, :]
        acc += tl.load(g + r[:, None] * STRIDE + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    _store_partial(target + columns, tl.sum(acc, 0), columns < LIMIT, first_chunk)


@triton.jit(do_not_specialize=["start", "end", "filled", "slots", "chunk", "first_chunk"])
def predict_weight_gradient_kernel(
    partials,
    hidden,
    last,
    gradients,
    d_output,
    embeddings,
    indices,
    rows,
    start,
    end,
    filled,
    slots,
    chunk,
    first_chunk,
    LAYERS: tl.constexpr,
    H: tl.constexpr,
    STRIDE: tl.constexpr,
    K: tl.constexpr,
    OFFSETS: tl.constexpr,
    WIDTHS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One tile of one parameter's gradient, over one split of the rows of the workspace."""
    E: tl.constexpr = OFFSETS[len(OFFSETS) - 1] + WIDTHS[len(OFFSETS) - 1]
    ACROSS: tl.constexpr = (STRIDE + BLOCK - 1) // BLOCK
    E_ACROSS: tl.constexpr = (E + BLOCK - 1) // BLOCK
    FIRST: tl.constexpr = H * E + H
    EACH: tl.constexpr = H * H + H
    MATRICES: tl.constexpr = (LAYERS - 1) * ACROSS * ACROSS
    size = tl.cast(slots, tl.int64) * STRIDE
    split = tl.program_id(1)
    begin = split * chunk
    stop = tl.minimum(begin + chunk, filled)
    target = partials + split.to(tl.int64) * (FIRST + (LAYERS - 1) * EACH + K * H + K)
    lanes = tl.arange(0, BLOCK)
    task = tl.program_id(0)
    if task < MATRICES:
        layer = task // (ACROSS * ACROSS) + 1
        block = task % (ACROSS * ACROSS)
        _outer(
            target + FIRST + (layer - 1) * EACH, gradients + layer * size, hidden + (layer - 1) * size,
            block // ACROSS * BLOCK + lanes, block % ACROSS * BLOCK + lanes, begin, stop, first_chunk,
            STRIDE, STRIDE, H, H, BLOCK_R, PRECISION,
        )  # fmt: skip
    elif task < MATRICES + ACROSS * E_ACROSS:
        block = task - MATRICES
        _coordinate_outer(
            target, gradients, embeddings, indices, rows,
            block // E_ACROSS * BLOCK + lanes, block % E_ACROSS * BLOCK + lanes, begin, stop, start, end, first_chunk,
            H, STRIDE, E, OFFSETS, WIDTHS, BLOCK_R, PRECISION,
        )  # fmt: skip
    elif task < MATRICES + ACROSS * E_ACROSS + ACROSS:
        block = task - MATRICES - ACROSS * E_ACROSS
        _outer(
            target + FIRST + (LAYERS - 1) * EACH, d_output, last,
            tl.arange(0, BLOCK_OUT), block * BLOCK + lanes, begin, stop, first_chunk,
            BLOCK_OUT, STRIDE, K, H, BLOCK_R, EXACT,
        )  # fmt: skip
    elif task < MATRICES + ACROSS * E_ACROSS + ACROSS + LAYERS * ACROSS:
        rest = task - MATRICES - ACROSS * E_ACROSS - ACROSS
        layer = rest // ACROSS
        offset = tl.where(layer == 0, H * E, FIRST + (layer - 1) * EACH + H * H)
        _column_sums(
            target + offset, gradients + layer * size, rest % ACROSS * BLOCK + lanes, begin, stop, first_chunk,
            STRIDE, H, BLOCK_R,
        )  # fmt: skip
    else:
        _column_sums(
            target + FIRST + (LAYERS - 1) * EACH + K * H, d_output, tl.arange(0, BLOCK_OUT), begin, stop, first_chunk,
            BLOCK_OUT, K, BLOCK_R,
        )  # fmt: skip


@triton.jit(do_not_specialize=["splits", "parameters", "tiles"])
def predict_reduce_kernel(gradient, partials, loss, losses, splits, parameters, tiles, BLOCK: tl.constexpr):
    """The splits' parameter gradients, and the tiles' losses, added in a fixed order."""
    lanes = tl.arange(0, BLOCK)
    if gradient is not None:
        p = tl.program_id(0).to(tl.int64) * BLOCK + lanes
        acc = tl.zeros([BLOCK], tl.float32)
        for split in range(splits):
            acc += tl.load(partials + tl.cast(split, tl.int64) * parameters + p, mask=p < parameters, other=0.0)
        tl.store(gradient + p, acc, mask=p < parameters)
    if losses is not None:  # noqa: SIM102 - known when compiled, the other is not
        if tl.program_id(0) == tl.num_programs(0) - 1:
            acc = tl.zeros([BLOCK], tl.float32)
            for first in range(0, tiles, BLOCK):
                acc += tl.load(losses + first + lanes, mask=first + lanes < tiles, other=0.0)
            tl.store(loss, tl.sum(acc))
