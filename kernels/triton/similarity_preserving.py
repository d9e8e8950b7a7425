"""Triton kernels of `similarity_preserving`: the Gram matrices of both networks, then one program per row of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperfast.kernels.config import Configuration, device_guard, kernel_signature, next_power_of_2, tickets
from hyperfast.kernels.triton.gram import gram
from hyperfast.kernels.triton.table import alignment, multiple

__all__ = ["configurations", "forward", "statistics"]

OPTIONS = {"num_warps": 4, "num_stages": 1}
EPS = 1e-12
"""Rows of a Gram matrix of a smaller norm count as zero."""


@triton.jit
def _unit_row(row, k, B, EPS: tl.constexpr):
    """One row of U and the norm it was divided by; zeros for a dead sample."""
    x = tl.load(row + k, mask=k < B, other=0.0)
    norm = tl.sqrt_rn(tl.sum(x * x))
    dead = norm <= EPS
    return tl.where(dead, 0.0, tl.div_rn(x, tl.where(dead, 1.0, norm))), tl.where(dead, 0.0, norm)


@triton.jit(do_not_specialize=["B"])
def similarity_rows_kernel(
    losses,
    coefficients,
    row_losses,
    ticket,
    students,
    teachers,
    L,
    B,
    KNOWN: tl.constexpr,
    EPS: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Loss share and row of M of one row of one tap; `teachers` are U where KNOWN, else G."""
    B = multiple(B, ALIGN)
    program = tl.program_id(0)
    place = program.to(tl.int64) * B
    k = tl.arange(0, BLOCK)
    u, norm = _unit_row(students + place, k, B, EPS)
    if KNOWN:
        v = tl.load(teachers + place + k, mask=k < B, other=0.0)
    else:
        v, _ = _unit_row(teachers + place, k, B, EPS)
    difference = u - v
    along = tl.sum(difference * u)
    outer = tl.where(norm == 0, 0.0, 2.0 / B / B / tl.where(norm == 0, 1.0, norm))
    tl.store(coefficients + place + k, (difference - u * along) * outer, mask=k < B)
    tl.store(row_losses + program, tl.sum(difference * difference) / B / B)

    # The barrier orders this program's store before the release; the acquire orders it before the last one's loads.
    tl.debug_barrier()
    finished = tl.atomic_add(ticket, 1, sem="acq_rel")
    if finished == tl.num_programs(0) - 1:
        tl.debug_barrier()
        tl.store(ticket, 0)
        for tap in range(L):
            # .cg: other multiprocessors wrote this, the first-level cache does not know.
            shares = tl.load(row_losses + tap * B + k, mask=k < B, other=0.0, cache_modifier=".cg")
            tl.store(losses + tap, tl.sum(shares))


@triton.jit(do_not_specialize=["B"])
def similarity_statistics_kernel(rows, B, EPS: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """One row of U in place of one of G."""
    B = multiple(B, ALIGN)
    row = rows + tl.program_id(0).to(tl.int64) * B
    k = tl.arange(0, BLOCK)
    u, _ = _unit_row(row, k, B, EPS)
    tl.store(row + k, u, mask=k < B)


# ---------------------------------------------------------------------------------------------------------------------
# Launch


def forward(student: Sequence[Tensor], teacher: Sequence[Tensor], known: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Losses and coefficients of `reference.similarity_preserving_forward`, in three launches.

    Args:
        student: maps `[B, ...]` of one dtype.
        teacher: as many maps of one dtype, or none.
        known: U of the teacher, `[L, B, B]`, where there are no maps.

    Returns:
        float32 losses `[L]` and float32 M `[L, B, B]`.
    """
    grams = gram([*student, *teacher], centred=False)
    taps, batch = len(student), len(student[0])
    losses, coefficients = grams.new_empty(taps), grams.new_empty((taps, batch, batch))
    teachers = grams[taps:] if known is None else known.to(torch.float32).contiguous()
    with device_guard(losses):
        similarity_rows_kernel[(taps * batch,)](
            losses,
            coefficients,
            grams.new_empty(taps * batch),
            tickets.take(losses.device),
            grams,
            teachers,
            taps,
            batch,
            known is not None,
            EPS,
            alignment([batch]),
            next_power_of_2(batch),
            **OPTIONS,
        )
    return losses, coefficients


def statistics(maps: Sequence[Tensor]) -> Tensor:
    """U of all maps, float32 `[L, B, B]`, in three launches."""
    rows = gram(maps, centred=False)
    batch = len(maps[0])
    with device_guard(rows):
        similarity_statistics_kernel[(len(maps) * batch,)](
            rows, batch, EPS, alignment([batch]), next_power_of_2(batch), **OPTIONS
        )
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# What is shipped, for the ahead-of-time gate


def configurations(dtype: torch.dtype) -> Iterator[Configuration]:
    """The compiled forms of both kernels; they see float32 matrices whatever the dtype of the maps is."""
    if dtype != torch.float32:
        return
    for batch, align, known in ((128, 16, False), (1024, 16, True), (100, 4, False), (33, 1, True)):
        types: dict[str, Any] = dict.fromkeys(similarity_rows_kernel.arg_names, "*fp32")
        types |= {"rows": "*fp32", "ticket": "*i32", "L": "i32", "B": "i32"}
        shared = {"EPS": EPS, "ALIGN": align, "BLOCK": next_power_of_2(batch)}
        for kernel, constants in (
            (similarity_rows_kernel, shared | {"KNOWN": known}),
            (similarity_statistics_kernel, shared),
        ):
            label = f"matrices batch={batch} known={known} align={align}"
            yield Configuration(label, kernel, kernel_signature(kernel, types, constants), constants, OPTIONS)
