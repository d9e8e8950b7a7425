"""Triton kernels of `flow_of_solution`: the matrices of all pairs and samples in one launch, the gradients in another.

Forward: a program per tile of a sample's matrix multiplies both networks' maps and keeps the difference; a second
launch, one program per pair, makes losses of the squares. Backward: a program per tile of a map's gradient adds up the
products of all pairs that the map is in.
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
from hyperfast.kernels.triton.table import alignment, multiple, pick, pick_size

__all__ = ["backward", "configurations", "forward", "statistics", "supports"]

MAX_MAPS = 64
"""Maps, and pairs, of one launch."""
TILE = 64
"""Rows and columns of a tile, of a matrix and of a gradient."""
STEP = 32
"""What is summed over in one step: positions forward, channels backward."""
SAMPLES = 64
"""Samples whose tiles' sums are added at once."""
EPS = 1e-12
"""A teacher's matrix of a smaller norm cannot be divided by it."""
OPTIONS = {"num_warps": 8, "num_stages": 2}
ODD_OPTIONS = {"num_warps": 8, "num_stages": 1}
"""Of the matrices of maps of any length: single elements are not worth a copy ahead, whose addresses take registers."""


@triton.jit
def _matrix_tile(first, second, rows, columns, C1, C2, N, STEP: tl.constexpr, TILE: tl.constexpr):
    """A tile of F1 F2^T / N of one sample."""
    acc = tl.zeros([TILE, TILE], tl.float32)
    for k in range(0, N, STEP):
        n = k + tl.arange(0, STEP)
        inside = (n < N)[None, :]
        x = tl.load(first + rows[:, None] * N + n[None, :], mask=(rows < C1)[:, None] & inside, other=0.0)
        y = tl.load(second + columns[:, None] * N + n[None, :], mask=(columns < C2)[:, None] & inside, other=0.0)
        acc = tl.dot(x, tl.trans(y), acc, input_precision="tf32x3")
    # Divided, not multiplied: a product and the difference that follows would be fused, and equal maps would differ.
    return tl.div_rn(acc, N.to(tl.float32))


@triton.jit
def _tiles(C1, C2, TILE: tl.constexpr):
    return ((C1 + (TILE - 1)) // TILE) * ((C2 + (TILE - 1)) // TILE)


@triton.jit(do_not_specialize=["B"])
def flow_matrices_kernel(
    matrices,
    squares,
    students,
    teachers,
    known,
    channels,
    student_positions,
    teacher_positions,
    B,
    PAIRS: tl.constexpr,
    STUDENT_ALIGN: tl.constexpr,
    TEACHER_ALIGN: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """One tile of the matrix of one pair of one sample: the student's less the teacher's, if there is one.

    The teacher's is multiplied from its maps, or read from `known`. `squares` takes two sums over the tile.
    """
    COUNT: tl.constexpr = len(PAIRS) // 2
    pair = tl.program_id(0) * 0
    place = tl.program_id(0)
    for p in tl.static_range(COUNT):
        programs = B * _tiles(channels[PAIRS[2 * p]], channels[PAIRS[2 * p + 1]], TILE)
        later = (pair == p) & (place >= programs)
        place = tl.where(later, place - programs, place)
        pair = tl.where(later, p + 1, pair)
    first = pick_size(PAIRS, 2 * pair)
    second = pick_size(PAIRS, 2 * pair + 1)
    C1 = pick_size(channels, first)
    C2 = pick_size(channels, second)
    across = (C2 + (TILE - 1)) // TILE
    tiles = _tiles(C1, C2, TILE)
    sample = (place // tiles).to(tl.int64)
    rows = (place % tiles // across) * TILE + tl.arange(0, TILE)
    columns = (place % tiles % across) * TILE + tl.arange(0, TILE)
    inside = (rows < C1)[:, None] & (columns < C2)[None, :]
    offsets = sample * C1 * C2 + rows[:, None] * C2 + columns[None, :]
    N = multiple(pick_size(student_positions, first), STUDENT_ALIGN)
    own = _matrix_tile(
        pick(students, first) + sample * C1 * N, pick(students, second) + sample * C2 * N,
        rows, columns, C1, C2, N, STEP, TILE,
    )  # fmt: skip
    if squares is not None:
        if known is not None:
            other = tl.load(pick(known, pair) + offsets, mask=inside, other=0.0)
        else:
            N = multiple(pick_size(teacher_positions, first), TEACHER_ALIGN)
            other = _matrix_tile(
                pick(teachers, first) + sample * C1 * N, pick(teachers, second) + sample * C2 * N,
                rows, columns, C1, C2, N, STEP, TILE,
            )  # fmt: skip
        own -= other
        tl.store(squares + 2 * tl.program_id(0), tl.sum(own * own))
        tl.store(squares + 2 * tl.program_id(0) + 1, tl.sum(other * other))
    tl.store(pick(matrices, pair) + offsets, own, mask=inside)


@triton.jit(do_not_specialize=["B"])
def flow_losses_kernel(
    losses,
    scales,
    squares,
    channels,
    B,
    PAIRS: tl.constexpr,
    SUM: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SMALLEST: tl.constexpr,
    TILE: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    """The loss of one pair, and the factor of each sample's squares in it."""
    pair = tl.program_id(0)
    for p in tl.static_range(len(PAIRS) // 2):
        tiles = _tiles(channels[PAIRS[2 * p]], channels[PAIRS[2 * p + 1]], TILE)
        squares += tl.where(p < pair, 2 * B * tiles, 0)
    C1 = pick_size(channels, pick_size(PAIRS, 2 * pair))
    C2 = pick_size(channels, pick_size(PAIRS, 2 * pair + 1))
    tiles = _tiles(C1, C2, TILE)
    factor = 1.0 / B if SUM else 1.0 / B / C1 / C2
    acc = tl.zeros([SAMPLES], tl.float32)
    for first in range(0, B, SAMPLES):
        b = first + tl.arange(0, SAMPLES)
        of_difference = tl.zeros([SAMPLES], tl.float32)
        of_teacher = tl.zeros([SAMPLES], tl.float32)
        for tile in range(tiles):
            place = squares + 2 * (b * tiles + tile)
            of_difference += tl.load(place, mask=b < B, other=0.0)
            of_teacher += tl.load(place + 1, mask=b < B, other=0.0)
        scale = tl.zeros([SAMPLES], tl.float32) + factor
        if NORMALIZE:
            dead = of_teacher <= SMALLEST
            scale = tl.where(dead, 0.0, scale / tl.where(dead, 1.0, of_teacher))
        tl.store(scales + pair * B + b, scale, mask=b < B)
        acc += tl.where(b < B, scale * of_difference, 0.0)
    tl.store(losses + pair, tl.sum(acc))


@triton.jit(do_not_specialize=["B"])
def flow_backward_kernel(
    gradients,
    students,
    differences,
    scales,
    grad,
    channels,
    positions,
    B,
    PAIRS: tl.constexpr,
    ALIGN: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """One tile of the gradient of one sample's map: R F2 for every pair it comes first in, R^T F1 for the others."""
    own = tl.program_id(0) * 0
    place = tl.program_id(0)
    for m in tl.static_range(len(students)):
        programs = B * _tiles(channels[m], positions[m], TILE)
        later = (own == m) & (place >= programs)
        place = tl.where(later, place - programs, place)
        own = tl.where(later, m + 1, own)
    C = pick_size(channels, own)
    N = multiple(pick_size(positions, own), ALIGN)
    across = (N + (TILE - 1)) // TILE
    tiles = _tiles(C, N, TILE)
    sample = (place // tiles).to(tl.int64)
    c = (place % tiles // across) * TILE + tl.arange(0, TILE)
    n = (place % tiles % across) * TILE + tl.arange(0, TILE)
    acc = tl.zeros([TILE, TILE], tl.float32)
    before = sample * 0
    side = own * 0
    for _ in range(len(PAIRS)):
        other = pick_size(PAIRS, side ^ 1)
        K = pick_size(channels, other)
        if pick_size(PAIRS, side) == own:
            factor = 2.0 * tl.load(grad + side // 2) * tl.load(scales + (side // 2) * B + sample) / N
            # R is [C, K] where this map comes first, [K, C] where it is second.
            matrix = differences + before + sample * C * K + c[:, None] * tl.where(side % 2 == 0, K, 1)
            source = pick(students, other) + sample * K * N
            for k in range(0, K, STEP):
                o = k + tl.arange(0, STEP)
                mask = (c < C)[:, None] & (o < K)[None, :]
                r = tl.load(matrix + o[None, :] * tl.where(side % 2 == 0, 1, C), mask=mask, other=0.0) * factor
                mask = (o < K)[:, None] & (n < N)[None, :]
                x = tl.load(source + o[:, None] * N + n[None, :], mask=mask, other=0.0).to(tl.float32)
                acc = tl.dot(r, x, acc, input_precision="tf32x3")
        # The next pair's matrices.
        before += tl.where(side % 2 == 1, B.to(tl.int64) * K * pick_size(channels, pick_size(PAIRS, side)), 0)
        side += 1
    mask = (c < C)[:, None] & (n < N)[None, :]
    tl.store(pick(gradients, own) + sample * C * N + c[:, None] * N + n[None, :], acc, mask=mask)


# ---------------------------------------------------------------------------------------------------------------------
# Launch


def _channels(maps: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(f.shape[1] for f in maps)


def _positions(maps: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(f.shape[2:].numel() for f in maps)


def _options(align: int) -> dict[str, int]:
    return OPTIONS if align > 1 else ODD_OPTIONS


def _contiguous(maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(f.contiguous() for f in maps)


def _sizes(maps: Sequence[Tensor], pairs: Sequence[int]) -> list[tuple[int, int, int]]:
    """Shapes of the matrices of all pairs."""
    channels, batch = _channels(maps), len(maps[0])
    return [(batch, channels[i], channels[j]) for i, j in zip(pairs[::2], pairs[1::2], strict=True)]


def supports(student: Sequence[Tensor], teacher: Sequence[Tensor], pairs: Sequence[int]) -> str | None:
    """Why these kernels cannot run on the maps, or `None` where they can."""
    for name, maps in (("student", student), ("teacher", teacher)):
        if len({f.dtype for f in maps}) > 1:
            return f"the {name} maps have different dtypes"
        if maps and (reason := refuse_device(maps[0].device) or refuse_dtype(maps[0].dtype)):
            return reason
        if any(f.numel() == 0 or f.shape[1:].numel() > INT32_MAX for f in maps):
            return f"a {name} map has no elements or more than 2^31 per sample"
    if len(student) > MAX_MAPS or len(pairs) > 2 * MAX_MAPS:
        return f"{len(student)} maps and {len(pairs) // 2} pairs; at most {MAX_MAPS} of each"
    return None


def _multiply(
    matrices: Sequence[Tensor],
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    known: Sequence[Tensor],
    pairs: Sequence[int],
) -> Tensor | None:
    """Fill the matrices. Returns the sums of squares of all tiles, where there is a teacher."""
    sizes = _sizes(student, pairs)
    programs = sum(batch * cdiv(rows, TILE) * cdiv(columns, TILE) for batch, rows, columns in sizes)
    compared = bool(teacher or known)
    squares = student[0].new_empty(2 * programs, dtype=torch.float32) if compared else None
    flow_matrices_kernel[(programs,)](
        tuple(matrices),
        squares,
        _contiguous(student),
        _contiguous(teacher) or None,
        tuple(g.to(torch.float32).contiguous() for g in known) or None,
        _channels(student),
        _positions(student),
        _positions(teacher) or None,
        len(student[0]),
        tuple(pairs),
        alignment(_positions(student)),
        alignment(_positions(teacher)),
        TILE,
        STEP,
        **_options(alignment([*_positions(student), *_positions(teacher)])),
    )
    return squares


def forward(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    known: Sequence[Tensor],
    pairs: Sequence[int],
    reduction: str,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, differences and scales of `reference.flow_of_solution_forward`, in two launches.

    Args:
        student: maps `[B, C, *spatial]` of one dtype; other layouts than contiguous are copied.
        teacher: as many maps of one dtype, or none.
        known: matrices of the teacher, where there are no maps.
        pairs: of maps, flat.
        reduction: `"mean"` or `"sum"`.
        normalize: divide by the norms of the teacher's matrices.

    Returns:
        float32 losses `[P]`, differences, flat, and factors of their squares `[P, B]`.
    """
    sizes, batch = _sizes(student, pairs), len(student[0])
    counts = [batch * rows * columns for _, rows, columns in sizes]
    losses = student[0].new_empty(len(sizes), dtype=torch.float32)
    differences, scales = losses.new_empty(sum(counts)), losses.new_empty((len(sizes), batch))
    with device_guard(losses):
        squares = _multiply(differences.split(counts), student, teacher, known, pairs)
        flow_losses_kernel[(len(sizes),)](
            losses,
            scales,
            squares,
            _channels(student),
            batch,
            tuple(pairs),
            reduction == "sum",
            normalize,
            EPS**2,
            TILE,
            SAMPLES,
            **OPTIONS,
        )
    return losses, differences, scales


def backward(
    grad: Tensor, student: Sequence[Tensor], differences: Tensor, scales: Tensor, pairs: Sequence[int]
) -> list[Tensor]:
    """dL/dF of every map, in one launch; in the dtype of the student's maps.

    Args:
        grad: dL/d(loss of a pair), `[P]`.
        student: the maps `forward` had.
        differences: as `forward` returned them.
        scales: as `forward` returned them.
        pairs: as for `forward`.
    """
    maps, channels, positions = _contiguous(student), _channels(student), _positions(student)
    gradients = [torch.empty_like(s) for s in student]
    targets = [g if g.is_contiguous() else torch.empty_like(m) for g, m in zip(gradients, maps, strict=True)]
    programs = len(maps[0]) * sum(cdiv(c, TILE) * cdiv(n, TILE) for c, n in zip(channels, positions, strict=True))
    with device_guard(grad):
        flow_backward_kernel[(programs,)](
            tuple(targets),
            maps,
            differences.contiguous(),
            scales.contiguous(),
            grad.contiguous(),
            channels,
            positions,
            len(maps[0]),
            tuple(pairs),
            alignment(positions),
            TILE,
            STEP,
            **OPTIONS,
        )
    for gradient, target in zip(gradients, targets, strict=True):
        if gradient is not target:
            gradient.copy_(target)
    return gradients


def statistics(maps: Sequence[Tensor], pairs: Sequence[int]) -> list[Tensor]:
    """Matrices of all pairs, float32 `[B, C1, C2]`, in one launch."""
    matrices = [maps[0].new_empty(size, dtype=torch.float32) for size in _sizes(maps, pairs)]
    with device_guard(matrices[0]):
        _multiply(matrices, maps, (), (), pairs)
    return matrices


# ---------------------------------------------------------------------------------------------------------------------
# What is shipped, for the ahead-of-time gate

# (maps, pairs, reduction, normalize, teacher's matrices, alignment)
_SHIPPED = (
    (3, (0, 1, 1, 2), False, False, False, 16),
    (2, (0, 1), True, True, True, 8),
    (8, (0, 1, 2, 3, 4, 5, 6, 7), False, True, False, 1),
)


def configurations(dtype: torch.dtype) -> Iterator[Configuration]:
    """The compiled forms of all kernels for maps of `dtype`."""
    element = f"*{TRITON_TYPES[dtype]}"
    for count, pairs, total, normalize, known, align in _SHIPPED:
        maps, sizes, matrices = (element,) * count, ("i32",) * count, ("*fp32",) * (len(pairs) // 2)
        types: dict[str, Any] = dict.fromkeys(("students", "teachers", "gradients"), maps)
        types |= dict.fromkeys(("channels", "positions", "student_positions", "teacher_positions"), sizes)
        types |= dict.fromkeys(("squares", "losses", "scales", "differences", "grad"), "*fp32")
        types |= {"matrices": matrices, "known": matrices, "B": "i32"}
        shared = {"PAIRS": pairs, "TILE": TILE}
        nothing = dict.fromkeys(("teachers", "teacher_positions") if known else ("known",))
        forms: tuple[tuple[Any, dict[str, Any]], ...] = (
            (
                flow_matrices_kernel,
                shared | nothing | {"STUDENT_ALIGN": align, "TEACHER_ALIGN": align, "STEP": STEP},
            ),
            (
                flow_losses_kernel,
                shared | {"SUM": total, "NORMALIZE": normalize, "SMALLEST": EPS**2, "SAMPLES": SAMPLES},
            ),
            (flow_backward_kernel, shared | {"ALIGN": align, "STEP": STEP}),
        )
        for kernel, constants in forms:
            # What reads no maps, only numbers per tile, is said to.
            what = "matrices" if kernel is flow_losses_kernel else f"maps={count}"
            label = f"{what} pairs={pairs} known={known} align={align} {TRITON_TYPES[dtype]}"
            options = _options(align) if kernel is flow_matrices_kernel else OPTIONS
            yield Configuration(label, kernel, kernel_signature(kernel, types, constants), constants, options)
