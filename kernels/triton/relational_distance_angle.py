"""Triton kernels of `relational_distance_angle`: centred Gram matrices, then two launches over their rows.

The first has a program per sample i, which sums over all vertices j the angles between the arms to i and to k. What
belongs to the arm between i and j is complete once all programs are: the second launch makes M of it.

No product is fused with a sum (FMA): the angles of equal samples would differ by a rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperfast.kernels.config import Configuration, device_guard, kernel_signature, next_power_of_2
from hyperfast.kernels.triton.gram import gram
from hyperfast.kernels.triton.table import alignment, multiple

__all__ = ["configurations", "forward", "statistics", "supports"]

MAX_BATCH = 1024
"""A program keeps whole rows of the matrices in registers."""
VERTICES = 1024
"""Elements of a tile of vertices and third samples."""
# As in the reference: squared distances that are smaller are those of equal samples, for distances and for angles; and
# so many units in the last place.
NEAREST: tl.constexpr = tl.constexpr(1e-12)
NEAREST_OF_ANGLES: tl.constexpr = tl.constexpr(1e-24)
NOISE: tl.constexpr = tl.constexpr(8 * 2.0**-23)


@triton.jit
def _measure(products, squares, others, same):
    """Distance, its inverse for angles, and whether it follows the samples, by <x, y>, ||x||^2 and ||y||^2."""
    total = squares + others
    squared = total - 2.0 * products
    noise = NOISE * total
    near = (squared <= NEAREST) | (squared <= noise)
    without = same | (squared <= NEAREST_OF_ANGLES) | (squared <= noise)
    distance = tl.where(same, 0.0, tl.sqrt_rn(tl.where(near, NEAREST, squared)))
    inverse = tl.where(without, 0.0, tl.div_rn(1.0, tl.sqrt_rn(tl.where(without, 1.0, squared))))
    return distance, inverse, (near | same) == 0


@triton.jit
def _clamp(x):
    """x between -1 and 1; a NaN stays one."""
    return tl.where(x > 1.0, 1.0, tl.where(x < -1.0, -1.0, x))


@triton.jit
def _mean_distance(gram, B, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Mean distance of different samples, in the same order in every program."""
    k = tl.arange(0, BLOCK)
    squares = tl.load(gram + k * B + k, mask=k < B, other=0.0)
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, B, ROWS):
        j = first + tl.arange(0, ROWS)
        own = tl.load(gram + j * B + j, mask=j < B, other=0.0)
        inside = (j < B)[:, None] & (k < B)[None, :]
        products = tl.load(gram + j[:, None] * B + k[None, :], mask=inside, other=0.0)
        found = _measure(products, squares[None, :], own[:, None], j[:, None] == k[None, :])
        acc += tl.where(inside, found[0], 0.0)
    return tl.sum(acc) / B / (B - 1)


@triton.jit
def _row(gram, i, k, B):
    """Row i of G, and the squares of the samples k and i."""
    row = tl.load(gram + i * B + k, mask=k < B, other=0.0)
    return row, tl.load(gram + k * B + k, mask=k < B, other=0.0), tl.load(gram + i * B + i)


@triton.jit
def _cosines(gram, row, squares, i, j, k, inside, B):
    """psi at the vertices j between i and k, `[j, k]`, and 1 / (d_ij d_kj)."""
    products = tl.load(gram + j[:, None] * B + k[None, :], mask=inside, other=0.0)
    own = tl.load(gram + j * B + j, mask=j < B, other=0.0)
    with_i = tl.load(gram + j * B + i, mask=j < B, other=0.0)
    arms = _measure(products, squares[None, :], own[:, None], j[:, None] == k[None, :])[1]
    arm = _measure(with_i, tl.load(gram + i * B + i), own, j == i)[1]
    both = tl.where(inside, arms * arm[:, None], 0.0)
    return (row[None, :] - products + (own - with_i)[:, None]) * both, both


@triton.jit(do_not_specialize=["B", "distance_weight", "angle_weight"])
def relational_rows_kernel(
    pairs,
    arms,
    lengths,
    sums,
    students,
    teachers,
    B,
    distance_weight,
    angle_weight,
    ANGLES: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sums over one sample's distances and angles: rows of three matrices, and of `sums`: its loss, delta d, means."""
    B = multiple(B, ALIGN)
    tap = (tl.program_id(0) // B).to(tl.int64)
    i = tl.program_id(0) % B
    gram_s = students + tap * B * B
    gram_t = teachers + tap * B * B
    k = tl.arange(0, BLOCK)
    mean_s = _mean_distance(gram_s, B, BLOCK, ROWS)
    mean_t = _mean_distance(gram_t, B, BLOCK, ROWS)
    row_s, squares_s, own_s = _row(gram_s, i, k, B)
    row_t, squares_t, own_t = _row(gram_t, i, k, B)
    same = (k == i) | (k >= B)
    d_s = _measure(row_s, squares_s, own_s, same)[0]
    d_t = _measure(row_t, squares_t, own_t, same)[0]
    difference = tl.div_rn(d_s, mean_s) - tl.div_rn(d_t, mean_t)
    delta = _clamp(difference)
    loss = distance_weight * (tl.sum(delta * (difference - 0.5 * delta)) / B / B)
    weighted = tl.sum(delta * d_s)
    place = tap * B * B + i * B
    if ANGLES:
        acc = tl.zeros([BLOCK], tl.float32)
        losses = tl.zeros([BLOCK], tl.float32)
        for first in range(0, B, ROWS):
            j = first + tl.arange(0, ROWS)
            inside = (j < B)[:, None] & (k < B)[None, :]
            psi, both = _cosines(gram_s, row_s, squares_s, i, j, k, inside, B)
            psi_t = _cosines(gram_t, row_t, squares_t, i, j, k, inside, B)[0]
            of_angle = psi - psi_t
            clamped = _clamp(of_angle)
            losses += tl.sum(clamped * (of_angle - 0.5 * clamped), 0)
            weights = clamped * both
            acc += tl.sum(weights, 0)
            tl.store(arms + place + j, tl.sum(weights, 1), mask=j < B)
            tl.store(lengths + place + j, tl.sum(clamped * psi, 1), mask=j < B)
        tl.store(pairs + place + k, acc, mask=k < B)
        loss += angle_weight * (tl.sum(losses) / B / B / B)
    sums += tl.program_id(0) * 4
    tl.store(sums, loss)
    tl.store(sums + 1, weighted)
    tl.store(sums + 2, mean_s)
    tl.store(sums + 3, mean_t)


@triton.jit(do_not_specialize=["B", "distance_weight", "angle_weight"])
def relational_coefficients_kernel(
    losses,
    coefficients,
    pairs,
    arms,
    lengths,
    sums,
    students,
    teachers,
    B,
    distance_weight,
    angle_weight,
    ANGLES: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of M of one tap; the first also adds the losses."""
    B = multiple(B, ALIGN)
    tap = (tl.program_id(0) // B).to(tl.int64)
    i = tl.program_id(0) % B
    k = tl.arange(0, BLOCK)
    same = (k == i) | (k >= B)
    row_s, squares_s, own_s = _row(students + tap * B * B, i, k, B)
    row_t, squares_t, own_t = _row(teachers + tap * B * B, i, k, B)
    d_s, inverse, moves = _measure(row_s, squares_s, own_s, same)
    d_t = _measure(row_t, squares_t, own_t, same)[0]
    mean_s = tl.load(sums + tap * B * 4 + 2)
    mean_t = tl.load(sums + tap * B * 4 + 3)
    weighted = tl.sum(tl.load(sums + (tap * B + k) * 4 + 1, mask=k < B, other=0.0))
    delta = _clamp(tl.div_rn(d_s, mean_s) - tl.div_rn(d_t, mean_t))
    through_mean = weighted / mean_s / B / (B - 1)
    scale = distance_weight / B / B / mean_s
    m = tl.where(moves, -scale * (delta - through_mean) / tl.where(moves, d_s, 1.0), 0.0)
    place = tap * B * B + i * B
    if ANGLES:
        of_pairs = tl.load(pairs + place + k, mask=k < B, other=0.0)
        of_arms = tl.load(arms + place + k, mask=k < B, other=0.0)
        of_lengths = tl.load(lengths + place + k, mask=k < B, other=0.0)
        column = tap * B * B + k * B + i
        of_arms += tl.load(arms + column, mask=k < B, other=0.0)
        of_lengths += tl.load(lengths + column, mask=k < B, other=0.0)
        value = of_pairs - of_arms + of_lengths * inverse * inverse
        m += tl.where(same, 0.0, angle_weight / B / B / B * value)
    # All distances and angles stay when the batch is moved as a whole: rows sum to 0.
    tl.store(coefficients + place + k, tl.where(k == i, -tl.sum(m), m), mask=k < B)
    if i == 0:
        tl.store(losses + tap, tl.sum(tl.load(sums + (tap * B + k) * 4, mask=k < B, other=0.0)))


# ---------------------------------------------------------------------------------------------------------------------
# Launch


def _options(block: int) -> dict[str, int]:
    return {"num_warps": 8 if block <= 512 else 16, "num_stages": 1, "enable_fp_fusion": False}


def supports(student: Sequence[Tensor], *_: Any) -> str | None:
    """Why these kernels cannot run on maps that `gram` can, or `None` where they can."""
    batch = len(student[0])
    return None if batch <= MAX_BATCH else f"a batch of {batch}; at most {MAX_BATCH}"


def forward(
    student: Sequence[Tensor], teacher: Sequence[Tensor], known: Tensor | None, distance: float, angle: float
) -> tuple[Tensor, Tensor]:
    """Losses and coefficients of `reference.relational_distance_angle_forward`, in five launches.

    Args:
        student: maps `[B, ...]` of one dtype.
        teacher: as many maps of one dtype, or none.
        known: the teacher's centred Gram matrices, `[L, B, B]`, where there are no maps.
        distance: weight of the distances.
        angle: weight of the angles; 0 leaves them out.

    Returns:
        float32 losses `[L]` and float32 M `[L, B, B]`.
    """
    grams = gram([*student, *teacher], centred=True)
    taps, batch = len(student), len(student[0])
    losses, coefficients = grams.new_empty(taps), grams.new_empty((taps, batch, batch))
    teachers = grams[taps:] if known is None else known.to(torch.float32).contiguous()
    pairs, arms, lengths = grams.new_empty((3, taps, batch, batch) if angle else (3, 0)).unbind()
    sums = grams.new_empty((taps, batch, 4))
    block = next_power_of_2(batch)
    align, rows = alignment([batch]), max(1, VERTICES // block)
    weights = (float(distance), float(angle))
    with device_guard(losses):
        relational_rows_kernel[(taps * batch,)](
            pairs,
            arms,
            lengths,
            sums,
            grams,
            teachers,
            batch,
            *weights,
            angle != 0,
            align,
            block,
            rows,
            **_options(block),
        )
        relational_coefficients_kernel[(taps * batch,)](
            losses,
            coefficients,
            pairs,
            arms,
            lengths,
            sums,
            grams,
            teachers,
            batch,
            *weights,
            angle != 0,
            align,
            block,
            **_options(block),
        )
    return losses, coefficients


def statistics(maps: Sequence[Tensor]) -> Tensor:
    """Centred Gram matrices of all maps, float32 `[L, B, B]`, in three launches."""
    return gram(maps, centred=True)


# ---------------------------------------------------------------------------------------------------------------------
# What is shipped, for the ahead-of-time gate


def configurations(dtype: torch.dtype) -> Iterator[Configuration]:
    """The compiled forms of both kernels; they see float32 matrices whatever the dtype of the maps is."""
    if dtype != torch.float32:
        return
    for batch, align, angles in ((128, 16, True), (1024, 16, True), (100, 4, False), (33, 1, True)):
        types: dict[str, Any] = dict.fromkeys(relational_coefficients_kernel.arg_names, "*fp32")
        types |= {"B": "i32", "distance_weight": "fp32", "angle_weight": "fp32"}
        block = next_power_of_2(batch)
        shared = {"ANGLES": angles, "ALIGN": align, "BLOCK": block}
        for kernel, constants in (
            (relational_rows_kernel, shared | {"ROWS": max(1, VERTICES // block)}),
            (relational_coefficients_kernel, shared),
        ):
            label = f"matrices batch={batch} angles={angles} align={align}"
            yield Configuration(label, kernel, kernel_signature(kernel, types, constants), constants, _options(block))
