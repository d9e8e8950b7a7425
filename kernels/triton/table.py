"""Tables in kernel arguments: tuples of addresses and sizes, of which a program picks its own.

No table of pointers is copied to the device: a copy from pageable host memory would be a second operation, and inside a
captured CUDA graph it would replay whatever the host buffer holds by then.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl


@triton.jit
def pick(pointers, index):
    """pointers[index] of a tuple, for an index known at run time only."""
    chosen = pointers[0]
    for i in tl.static_range(1, len(pointers)):
        chosen = tl.where(index == i, pointers[i], chosen)
    return chosen


@triton.jit
def pick_size(sizes, index):
    """sizes[index]. In a tuple, Triton turns a size of 1 into a constant even where asked not to specialise."""
    chosen = index * 0
    for i in tl.static_range(len(sizes)):
        chosen = tl.where(index == i, sizes[i], chosen)
    return chosen


@triton.jit
def multiple(size, ALIGN: tl.constexpr):
    """`size`, which is a multiple of ALIGN, so that the compiler sees it (a hint gets lost behind the selects)."""
    return size // ALIGN * ALIGN


@triton.jit
def sum_before(sizes, index):
    """Sum of the sizes before `index`, in 64 bits."""
    count = index.to(tl.int64) * 0
    for i in tl.static_range(len(sizes)):
        count += tl.where(i < index, sizes[i], 0)
    return count


@triton.jit
def find_piece(sizes, piece, LENGTH: tl.constexpr):
    """Each size is cut into pieces of LENGTH: the size that piece number `piece` belongs to, and its number there."""
    index = piece * 0
    place = piece
    for i in tl.static_range(len(sizes)):
        pieces = (sizes[i] + (LENGTH - 1)) // LENGTH
        later = (index == i) & (place >= pieces)
        place = tl.where(later, place - pieces, place)
        index = tl.where(later, i + 1, index)
    return index, place


def alignment(sizes: Sequence[int]) -> int:
    """The largest power of two, up to 16, that divides every size."""
    return next(power for power in (16, 8, 4, 2, 1) if all(size % power == 0 for size in sizes))
