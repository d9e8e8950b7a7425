"""The kernels of `gated_experts`; see there for what each launch does."""

from __future__ import annotations

import triton
import triton.language as tl

from hyperfast.kernels.triton.table import multiple


@triton.jit
def _seen(z, gate_input, sample, features, P, D, POSITIONS: tl.constexpr, FEATURES: tl.constexpr):
    """What the gate of a sample reads: a few of its features."""
    if gate_input is not None:
        return tl.load(gate_input + sample * D + features, mask=features < D, other=0.0).to(tl.float32)
    acc = tl.zeros([FEATURES, POSITIONS], tl.float32)
    rows = z + sample * D * P + features[:, None] * P
    for first in range(0, P, POSITIONS):
        n = first + tl.arange(0, POSITIONS)
        acc += tl.load(rows + n[None, :], mask=(features < D)[:, None] & (n < P)[None, :], other=0.0).to(tl.float32)
    return tl.sum(acc, 1) / P


@triton.jit
def _mixed(experts, gates, sample, rows, ranks, M, R, H: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr):
    """A tile of the experts, mixed by the gates of a sample."""
    inside = (rows < M)[:, None] & (ranks < R)[None, :]
    source = experts + rows[:, None] * R + ranks[None, :]
    acc = tl.zeros([ROWS, RANKS], tl.float32)
    for h in tl.static_range(H):
        share = tl.load(gates + sample * H + h)
        acc += share * tl.load(source + h * M * R, mask=inside, other=0.0).to(tl.float32)
    return acc


@triton.jit(do_not_specialize=["P", "D"])
def gated_experts_gate_kernel(
    gates,
    z,
    gate_input,
    gate_weight,
    gate_bias,
    P,
    D,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    ALIGN: tl.constexpr,
    FEATURES: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """The gates of one sample."""
    P = multiple(P, ALIGN)
    sample = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, HEADS)
    logits = tl.zeros([HEADS], tl.float32)
    for first in range(0, D, FEATURES):
        features = first + tl.arange(0, FEATURES)
        seen = _seen(z, gate_input, sample, features, P, D, POSITIONS, FEATURES)
        mask = (heads < H)[:, None] & (features < D)[None, :]
        weight = tl.load(gate_weight + heads[:, None] * D + features[None, :], mask=mask, other=0.0).to(tl.float32)
        logits += tl.sum(weight * seen[None, :], 1)
    if gate_bias is not None:
        logits += tl.load(gate_bias + heads, mask=heads < H, other=0.0).to(tl.float32)
    logits = tl.where(heads < H, logits, float("-inf"))
    powers = tl.exp(logits - tl.max(logits, 0))
    tl.store(gates + sample * H + heads, powers / tl.sum(powers, 0), mask=heads < H)


@triton.jit(do_not_specialize=["P", "M", "R"])
def gated_experts_output_kernel(
    output,
    z,
    experts,
    bias,
    gates,
    P,
    M,
    R,
    H: tl.constexpr,
    ALIGN: tl.constexpr,
    RANK_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    RANKS: tl.constexpr,
):
    """A tile of a sample's output: the mixed heads times z."""
    P = multiple(P, ALIGN)
    R = multiple(R, RANK_ALIGN)
    across = (P + (TILE - 1)) // TILE
    tiles = across * ((M + (TILE - 1)) // TILE)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    rows = (tile // across) * TILE + tl.arange(0, TILE)
    n = (tile % across) * TILE + tl.arange(0, TILE)
    acc = tl.zeros([TILE, TILE], tl.float32)
    for first in range(0, R, RANKS):
        ranks = first + tl.arange(0, RANKS)
        mixed = _mixed(experts, gates, sample, rows, ranks, M, R, H, TILE, RANKS)
        source = z + sample * R * P + ranks[:, None] * P + n[None, :]
        x = tl.load(source, mask=(ranks < R)[:, None] & (n < P)[None, :], other=0.0)
        acc = tl.dot(mixed.to(x.dtype), x, acc, input_precision=PRECISION)
    if bias is not None:
        added = tl.zeros([TILE], tl.float32)
        for h in tl.static_range(H):
            share = tl.load(gates + sample * H + h)
            added += share * tl.load(bias + h * M + rows, mask=rows < M, other=0.0).to(tl.float32)
        acc += added[:, None]
    tl.store(output + sample * M * P + rows[:, None] * P + n[None, :], acc, mask=(rows < M)[:, None] & (n < P)[None, :])


@triton.jit(do_not_specialize=["B", "P", "M", "R", "chunk"])
def gated_experts_products_kernel(
    partials,
    d_gate_partials,
    d_output,
    z,
    experts,
    bias,
    gates,
    B,
    P,
    M,
    R,
    chunk,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    ALIGN: tl.constexpr,
    RANK_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    STEP: tl.constexpr,
):
    """One tile of all heads, over a piece of the batch: their gradient, and what the tile adds to that of the gates."""
    P = multiple(P, ALIGN)
    R = multiple(R, RANK_ALIGN)
    across = (R + (RANKS - 1)) // RANKS
    tiles = across * ((M + (ROWS - 1)) // ROWS)
    piece = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    rows = (tile // across) * ROWS + tl.arange(0, ROWS)
    ranks = (tile % across) * RANKS + tl.arange(0, RANKS)
    heads = tl.arange(0, HEADS)
    places = heads[:, None, None] * M * R + rows[None, :, None] * R + ranks[None, None, :]
    inside = (heads < H)[:, None, None] & (rows < M)[None, :, None] & (ranks < R)[None, None, :]
    held = tl.load(experts + places, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([HEADS, ROWS, RANKS], tl.float32)
    if bias is not None:
        # Once for all tiles of the same rows.
        bias_places = heads[:, None] * M + rows[None, :]
        bias_inside = (heads < H)[:, None] & (rows < M)[None, :] & (tile % across == 0)
        held_bias = tl.load(bias + bias_places, mask=bias_inside, other=0.0).to(tl.float32)
        bias_total = tl.zeros([HEADS, ROWS], tl.float32)
    for sample in range(piece * chunk, tl.minimum(piece * chunk + chunk, B)):
        acc = tl.zeros([ROWS, RANKS], tl.float32)
        spread = tl.zeros([ROWS, STEP], tl.float32)
        for first in range(0, P, STEP):
            n = first + tl.arange(0, STEP)
            here = (n < P)[None, :]
            g = tl.load(
                d_output + sample * M * P + rows[:, None] * P + n[None, :], mask=(rows < M)[:, None] & here, other=0.0
            )
            x = tl.load(
                z + sample * R * P + ranks[:, None] * P + n[None, :], mask=(ranks < R)[:, None] & here, other=0.0
            )
            acc = tl.dot(g, tl.trans(x), acc, input_precision=PRECISION)
            if bias is not None:
                spread += g.to(tl.float32)
        share = tl.load(gates + sample * H + heads, mask=heads < H, other=0.0)
        total += share[:, None, None] * acc[None, :, :]
        change = tl.sum(tl.sum(held * acc[None, :, :], 2), 1)
        if bias is not None:
            sums = tl.sum(spread, 1)
            bias_total += share[:, None] * sums[None, :]
            change += tl.sum(held_bias * sums[None, :], 1)
        tl.store(d_gate_partials + (sample * tiles + tile) * H + heads, change, mask=heads < H)
    size = M * R
    if bias is not None:
        size += M
    target = partials + piece * H * size
    tl.store(target + places, total, mask=inside)
    if bias is not None:
        tl.store(target + H * M * R + bias_places, bias_total, mask=bias_inside)


@triton.jit(do_not_specialize=["P", "D", "tiles"])
def gated_experts_logits_kernel(
    d_logits,
    seen,
    d_gate_input,
    d_gates,
    d_gate_partials,
    z,
    gate_input,
    gate_weight,
    gates,
    P,
    D,
    tiles,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    ALIGN: tl.constexpr,
    FEATURES: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """The gradient by the logits of one sample's gates, what they read, and the gradient by a gate input of its own."""
    P = multiple(P, ALIGN)
    sample = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, HEADS)
    known = heads < H
    change = tl.load(d_gates + sample * H + heads, mask=known, other=0.0)
    for tile in range(tiles):
        change += tl.load(d_gate_partials + (sample * tiles + tile) * H + heads, mask=known, other=0.0)
    shares = tl.load(gates + sample * H + heads, mask=known, other=0.0)
    gradient = shares * (change - tl.sum(shares * change, 0))
    tl.store(d_logits + sample * H + heads, gradient, mask=known)
    for first in range(0, D, FEATURES):
        features = first + tl.arange(0, FEATURES)
        values = _seen(z, gate_input, sample, features, P, D, POSITIONS, FEATURES)
        tl.store(seen + sample * D + features, values, mask=features < D)
        if gate_input is not None:
            mask = known[:, None] & (features < D)[None, :]
            weight = tl.load(gate_weight + heads[:, None] * D + features[None, :], mask=mask, other=0.0).to(tl.float32)
            tl.store(d_gate_input + sample * D + features, tl.sum(gradient[:, None] * weight, 0), mask=features < D)


@triton.jit(do_not_specialize=["P", "M", "R"])
def gated_experts_input_kernel(
    d_z,
    d_output,
    experts,
    gates,
    d_logits,
    gate_weight,
    P,
    M,
    R,
    H: tl.constexpr,
    ALIGN: tl.constexpr,
    RANK_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    RANKS: tl.constexpr,
    STEP: tl.constexpr,
    TILE: tl.constexpr,
):
    """A tile of the gradient by a sample's z; through the gate too where `d_logits` is given."""
    P = multiple(P, ALIGN)
    R = multiple(R, RANK_ALIGN)
    across = (P + (TILE - 1)) // TILE
    tiles = across * ((R + (RANKS - 1)) // RANKS)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    ranks = (tile // across) * RANKS + tl.arange(0, RANKS)
    n = (tile % across) * TILE + tl.arange(0, TILE)
    acc = tl.zeros([RANKS, TILE], tl.float32)
    for first in range(0, M, STEP):
        rows = first + tl.arange(0, STEP)
        mixed = _mixed(experts, gates, sample, rows, ranks, M, R, H, STEP, RANKS)
        source = d_output + sample * M * P + rows[:, None] * P + n[None, :]
        g = tl.load(source, mask=(rows < M)[:, None] & (n < P)[None, :], other=0.0)
        acc = tl.dot(tl.trans(mixed.to(g.dtype)), g, acc, input_precision=PRECISION)
    if d_logits is not None:
        added = tl.zeros([RANKS], tl.float32)
        for h in tl.static_range(H):
            weight = tl.load(gate_weight + h * R + ranks, mask=ranks < R, other=0.0).to(tl.float32)
            added += tl.load(d_logits + sample * H + h) * weight
        acc += (added / P)[:, None]
    tl.store(d_z + sample * R * P + ranks[:, None] * P + n[None, :], acc, mask=(ranks < R)[:, None] & (n < P)[None, :])


@triton.jit(do_not_specialize=["B", "M", "R", "D", "pieces"])
def gated_experts_sums_kernel(
    d_experts,
    d_bias,
    d_gate_weight,
    d_gate_bias,
    partials,
    d_logits,
    seen,
    B,
    M,
    R,
    D,
    pieces,
    H: tl.constexpr,
    RANK_ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    SAMPLES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums: over pieces of the batch, elements of the experts' gradient; over samples, a row of the gate's."""
    count = H * M * multiple(R, RANK_ALIGN)
    size = count
    if d_bias is not None:
        size += H * M
    blocks = (size + (BLOCK - 1)) // BLOCK
    if tl.program_id(0) < blocks:
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        source = partials + i
        acc = tl.zeros([BLOCK], tl.float32)
        for _ in range(pieces):
            acc += tl.load(source, mask=i < size, other=0.0)
            source += size
        tl.store(d_experts + i, acc, mask=i < count)
        if d_bias is not None:
            tl.store(d_bias + (i - count), acc, mask=(i >= count) & (i < size))
    else:
        across = (D + (COLUMNS - 1)) // COLUMNS
        place = tl.program_id(0) - blocks
        head = place // across
        d = (place % across) * COLUMNS + tl.arange(0, COLUMNS)
        row = tl.zeros([COLUMNS], tl.float32)
        total = tl.zeros([SAMPLES], tl.float32)
        for first in range(0, B, SAMPLES):
            samples = first + tl.arange(0, SAMPLES)
            change = tl.load(d_logits + samples * H + head, mask=samples < B, other=0.0)
            values = seen + samples.to(tl.int64)[:, None] * D + d[None, :]
            known = (samples < B)[:, None] & (d < D)[None, :]
            row += tl.sum(change[:, None] * tl.load(values, mask=known, other=0.0), 0)
            total += change
        tl.store(d_gate_weight + head * D + d, row, mask=d < D)
        if place % across == 0:
            tl.store(d_gate_bias + head, tl.sum(total, 0))
