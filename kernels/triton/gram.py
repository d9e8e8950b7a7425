"""Gram matrices of samples, G = X X^T of all maps in one launch, and `gram_backward`, dX = grad (M + M^T) X.

Forward: a tile of G is far too little work for a GPU, so the samples' elements are cut into pieces, each with a
program per tile and partial products of its own; a second launch adds them in a fixed order. Only tiles on and above
the diagonal are multiplied.

Relations between samples cancel unless the samples are centred: then their means come first, and no product of float32
operands is rounded to TF32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperfast.kernels.config import (
    INT32_MAX,
    TRITON_TYPES,
    Configuration,
    cdiv,
    device_guard,
    kernel_signature,
    refuse_device,
    refuse_dtype,
)
from hyperfast.kernels.triton.table import alignment, find_piece, multiple, pick, pick_size, sum_before

__all__ = ["backward", "configurations", "gram", "supports"]

MAX_MAPS = 128
"""Maps of one launch, of both networks; their addresses and sizes are half of a launch's 4 KiB of arguments."""
MAX_BATCH = 2048
TILE = 64
"""Rows and columns of a tile of G."""
STEP = 32
"""Elements of the samples that are multiplied at once."""
PIECE, CENTRED_PIECE = 1024, 256
"""Elements of the samples of one partial product; relations are differences of G's elements, and want them exact."""
COLUMNS = 64
"""Columns of a tile of the gradient."""
OPTIONS = {"num_warps": 8, "num_stages": 2}


@triton.jit(do_not_specialize=["B"])
def gram_mean_kernel(means, maps, sizes, B, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Mean over the batch of BLOCK elements of one map."""
    index, place = find_piece(sizes, tl.program_id(0), BLOCK)
    D = multiple(pick_size(sizes, index), ALIGN)
    source = pick(maps, index)
    n = place * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, B, ROWS):
        b = first + tl.arange(0, ROWS)
        offsets = b.to(tl.int64)[:, None] * D + n[None, :]
        acc += tl.load(source + offsets, mask=(b < B)[:, None] & (n < D)[None, :], other=0.0).to(tl.float32)
    tl.store(means + sum_before(sizes, index) + n, tl.sum(acc, 0) / B, mask=n < D)


@triton.jit(do_not_specialize=["B"])
def gram_partial_kernel(
    partials,
    means,
    maps,
    sizes,
    B,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    PIECE: tl.constexpr,
):
    """One tile of the products of one piece of one map."""
    across = (B + (TILE - 1)) // TILE
    piece = tl.program_id(0) // (across * across)
    tile = tl.program_id(0) % (across * across)
    row = tile // across
    column = tile % across
    if row <= column:
        index, place = find_piece(sizes, piece, PIECE)
        D = multiple(pick_size(sizes, index), ALIGN)
        source = pick(maps, index)
        i = row * TILE + tl.arange(0, TILE)
        j = column * TILE + tl.arange(0, TILE)
        left = source + i.to(tl.int64)[:, None] * D
        right = source + j.to(tl.int64)[:, None] * D
        acc = tl.zeros([TILE, TILE], tl.float32)
        first = place * PIECE
        for k in range(first, tl.minimum(first + PIECE, D), STEP):
            n = k + tl.arange(0, STEP)
            inside = (n < D)[None, :]
            x = tl.load(left + n[None, :], mask=(i < B)[:, None] & inside, other=0.0)
            y = tl.load(right + n[None, :], mask=(j < B)[:, None] & inside, other=0.0)
            if means is not None:
                mean = tl.load(means + sum_before(sizes, index) + n, mask=n < D, other=0.0)[None, :]
                x = tl.where((i < B)[:, None], x.to(tl.float32) - mean, 0.0)
                y = tl.where((j < B)[:, None], y.to(tl.float32) - mean, 0.0)
            acc = tl.dot(x, tl.trans(y), acc, input_precision=PRECISION)
        target = partials + piece.to(tl.int64) * B * B
        tl.store(target + i[:, None] * B + j[None, :], acc, mask=(i < B)[:, None] & (j < B)[None, :])


@triton.jit(do_not_specialize=["B"])
def gram_sum_kernel(grams, partials, sizes, B, ALIGN: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr):
    """One tile of one map's G, and its mirror image, from the partial products of all pieces."""
    B = multiple(B, ALIGN)
    across = (B + (BLOCK - 1)) // BLOCK
    index = tl.program_id(0) // (across * across)
    tile = tl.program_id(0) % (across * across)
    row = tile // across
    column = tile % across
    if row <= column:
        i = row * BLOCK + tl.arange(0, BLOCK)[:, None]
        j = column * BLOCK + tl.arange(0, BLOCK)[None, :]
        mask = (i < B) & (j < B)
        pieces = index * 0
        before = index * 0
        for m in tl.static_range(len(sizes)):
            count = (sizes[m] + (PIECE - 1)) // PIECE
            pieces = tl.where(m == index, count, pieces)
            before += tl.where(m < index, count, 0)
        source = partials + before.to(tl.int64) * B * B + i * B + j
        acc = tl.zeros([BLOCK, BLOCK], tl.float64)
        for _ in range(pieces):
            acc += tl.load(source, mask=mask & (i <= j), other=0.0)
            source += B * B
        if row == column:  # half of a tile; both halves are to be the same bits
            acc = tl.where(i <= j, acc, tl.trans(acc))
        target = grams + index.to(tl.int64) * B * B
        tl.store(target + i * B + j, acc, mask=mask)
        tl.store(target + j * B + i, acc, mask=mask)


@triton.jit(do_not_specialize=["B"])
def gram_backward_kernel(
    gradients,
    students,
    coefficients,
    grad,
    sizes,
    B,
    CENTRED: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile of grad (M + M^T) X of one tap."""
    down = (B + (TILE - 1)) // TILE
    tap, place = find_piece(sizes, tl.program_id(0) // down, COLUMNS)
    D = multiple(pick_size(sizes, tap), ALIGN)
    source = pick(students, tap)
    matrix = coefficients + tap.to(tl.int64) * B * B
    i = (tl.program_id(0) % down) * TILE + tl.arange(0, TILE)
    n = place * COLUMNS + tl.arange(0, COLUMNS)
    if CENTRED:
        # The rows of M + M^T sum to 0: any vector that all samples have in common may be taken from them.
        common = tl.load(source + n, mask=n < D, other=0.0).to(tl.float32)
    acc = tl.zeros([TILE, COLUMNS], tl.float32)
    for first in range(0, B, STEP):
        k = first + tl.arange(0, STEP)
        mask = (i < B)[:, None] & (k < B)[None, :]
        m = tl.load(matrix + i[:, None] * B + k[None, :], mask=mask, other=0.0)
        m += tl.load(matrix + k[None, :] * B + i[:, None], mask=mask, other=0.0)
        inside = (k < B)[:, None] & (n < D)[None, :]
        x = tl.load(source + k.to(tl.int64)[:, None] * D + n[None, :], mask=inside, other=0.0).to(tl.float32)
        if CENTRED:
            x = tl.where(inside, x - common[None, :], 0.0)
        acc = tl.dot(m, x, acc, input_precision=PRECISION)
    target = pick(gradients, tap) + i.to(tl.int64)[:, None] * D + n[None, :]
    tl.store(target, acc * tl.load(grad + tap), mask=(i < B)[:, None] & (n < D)[None, :])


# ---------------------------------------------------------------------------------------------------------------------
# Launch


def _dense(features: Tensor) -> Tensor:
    """Samples of adjacent elements, in an order that is the same for all of them: no Gram matrix depends on it."""
    if features.is_contiguous() or features.movedim(1, -1).is_contiguous():
        return features
    return features.contiguous()


def _sizes(maps: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(f.shape[1:].numel() for f in maps)


def _precision(centred: bool) -> str:
    return "ieee" if centred else "tf32x3"


def supports(student: Sequence[Tensor], teacher: Sequence[Tensor] = (), *_: Any) -> str | None:
    """Why these kernels cannot run on the maps, or `None` where they can."""
    for name, maps in (("student", student), ("teacher", teacher)):
        if len({f.dtype for f in maps}) > 1:
            return f"the {name} maps have different dtypes"
        if maps and (reason := refuse_device(maps[0].device) or refuse_dtype(maps[0].dtype)):
            return reason
        if any(f.numel() == 0 or f.shape[1:].numel() > INT32_MAX for f in maps):
            return f"a {name} map has no elements or more than 2^31 per sample"
    if len(student) + len(teacher) > MAX_MAPS:
        return f"{len(student) + len(teacher)} maps; at most {MAX_MAPS}"
    if len(student[0]) > MAX_BATCH:
        return f"a batch of {len(student[0])}; at most {MAX_BATCH}"
    return None


def gram(maps: Sequence[Tensor], centred: bool) -> Tensor:
    """Gram matrices of all maps, float32 `[L, B, B]`, equal to their transposes bit for bit.

    Args:
        maps: `[B, ...]`, contiguous or channels_last (other layouts are copied). Maps of one dtype are one launch.
        centred: subtract the mean of the batch from the samples first.
    """
    batch = len(maps[0])
    grams = maps[0].new_empty((len(maps), batch, batch), dtype=torch.float32)
    with device_guard(grams):
        start = 0
        while start < len(maps):
            end = start + 1
            while end < len(maps) and maps[end].dtype == maps[start].dtype:
                end += 1
            _multiply([_dense(f) for f in maps[start:end]], grams[start:end], centred)
            start = end
    return grams


def _multiply(maps: Sequence[Tensor], grams: Tensor, centred: bool) -> None:
    batch, sizes = len(maps[0]), _sizes(maps)
    align, table = alignment(sizes), tuple(maps)
    means = None
    if centred:
        means = grams.new_empty(sum(sizes))
        programs = sum(cdiv(size, COLUMNS) for size in sizes)
        gram_mean_kernel[(programs,)](means, table, sizes, batch, align, 16, COLUMNS, **OPTIONS)
    piece = CENTRED_PIECE if centred else PIECE
    pieces = sum(cdiv(size, piece) for size in sizes)
    partials = grams.new_empty((pieces, batch, batch))
    gram_partial_kernel[(pieces * cdiv(batch, TILE) ** 2,)](
        partials, means, table, sizes, batch, align, _precision(centred), TILE, STEP, piece, **OPTIONS
    )
    gram_sum_kernel[(len(maps) * cdiv(batch, STEP) ** 2,)](
        grams, partials, sizes, batch, alignment([batch]), piece, STEP, **OPTIONS
    )


def backward(grad: Tensor, student: Sequence[Tensor], coefficients: Tensor, centred: bool) -> list[Tensor]:
    """dX = grad_l (M + M^T) X of every tap, in one launch; in the dtype and memory format of the student's maps.

    Args:
        grad: dL/d(loss of a tap), `[L]`.
        student: the maps.
        coefficients: M, `[L, B, B]`; where `centred`, the rows of M + M^T sum to 0.
        centred: X is less its mean.
    """
    gradients = [torch.empty_like(s) for s in student]
    maps = [_dense(s) for s in student]
    targets = [g if g.stride() == m.stride() else torch.empty_like(m) for g, m in zip(gradients, maps, strict=True)]
    batch, sizes = len(maps[0]), _sizes(maps)
    programs = sum(cdiv(size, COLUMNS) for size in sizes) * cdiv(batch, TILE)
    with device_guard(grad):
        gram_backward_kernel[(programs,)](
            tuple(targets),
            tuple(maps),
            coefficients.contiguous(),
            grad.contiguous(),
            sizes,
            batch,
            centred,
            alignment(sizes),
            _precision(centred),
            TILE,
            STEP,
            COLUMNS,
            **OPTIONS,
        )
    for gradient, target in zip(gradients, targets, strict=True):
        if gradient is not target:
            gradient.copy_(target)
    return gradients


# ---------------------------------------------------------------------------------------------------------------------
# What is shipped, for the ahead-of-time gate

# (maps, centred, alignment)
_SHIPPED = ((4, False, 16), (2, True, 16), (24, True, 1))


def configurations(dtype: torch.dtype) -> Iterator[Configuration]:
    """The compiled forms of all kernels for maps of `dtype`."""
    element = f"*{TRITON_TYPES[dtype]}"
    for count, centred, align in _SHIPPED:
        table: dict[str, Any] = {"maps": (element,) * count, "sizes": ("i32",) * count, "B": "i32"}
        precision, piece = _precision(centred), CENTRED_PIECE if centred else PIECE
        forms: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
            (
                gram_partial_kernel,
                table | {"partials": "*fp32", "means": "*fp32"},
                {"ALIGN": align, "PRECISION": precision, "TILE": TILE, "STEP": STEP, "PIECE": piece}
                | ({} if centred else {"means": None}),
            ),
            (
                gram_sum_kernel,
                table | {"grams": "*fp32", "partials": "*fp32"},
                {"ALIGN": align, "PIECE": piece, "BLOCK": STEP},
            ),
            (
                gram_backward_kernel,
                {
                    "gradients": (element,) * count,
                    "students": (element,) * count,
                    "coefficients": "*fp32",
                    "grad": "*fp32",
                    "sizes": ("i32",) * count,
                    "B": "i32",
                },
                {"CENTRED": centred, "ALIGN": align, "PRECISION": precision, "TILE": TILE, "STEP": STEP}
                | {"COLUMNS": COLUMNS},
            ),
        ]
        if centred:
            constants = {"ALIGN": align, "ROWS": 16, "BLOCK": COLUMNS}
            forms.append((gram_mean_kernel, table | {"means": "*fp32"}, constants))
        for kernel, types, constants in forms:
            what = "matrices" if kernel is gram_sum_kernel else "maps"
            label = f"{what}={count} centred={centred} align={align} {TRITON_TYPES[dtype]}"
            yield Configuration(label, kernel, kernel_signature(kernel, types, constants), constants, OPTIONS)
