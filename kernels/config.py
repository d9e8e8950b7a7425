"""What the kernels' launch functions share: block sizes, grids and the tickets of one-launch reductions.

Imports torch only, so that it may be read (and tested) where Triton is not installed.
"""

from __future__ import annotations

import contextlib
import functools
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's kernels run on the CPU. Triton reads the variable when a kernel is decorated, so it must be set before."""

INT32_MAX = 2**31 - 1
DOT_MINIMUM = 16  # the smallest side of a matrix product that Triton takes for every dtype
REGISTER_FILE = 65536  # per multiprocessor, compute capability 8.0 to 10.0
NUM_WARPS = 8


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n (1 for n <= 1)."""
    return 1 << max(0, n - 1).bit_length()


@functools.lru_cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of `device`; 2 in the interpreter, which runs programs one after another."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def refuse_device(device: torch.device) -> str | None:
    """Why Triton cannot run on `device`, or `None`."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return None if major >= 8 else f"compute capability {major}.{minor} is below 8.0"
    if device.type == "cpu" and INTERPRET:
        return None
    return f"the tensors are on {device.type} (TRITON_INTERPRET=1 runs the kernels on the CPU, for tests)"


def refuse_dtype(dtype: torch.dtype) -> str | None:
    """Why the kernels cannot take `dtype`, or `None`."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{dtype} is not float32, float16 or bfloat16"
    if INTERPRET and dtype == torch.bfloat16:
        return "Triton's interpreter is wrong for bfloat16"
    return None


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the tensor's GPU current: Triton launches on the current device and stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@dataclass(frozen=True)
class Configuration:
    """One compiled form of a kernel, as a launch would ask for it; the ahead-of-time tests compile them all.

    Attributes:
        label: what makes it different from the others.
        kernel: the `@triton.jit` function.
        signature: Triton's type of each argument, `"constexpr"` for the constants; a tuple for a tuple argument.
        constants: the compile-time arguments by name, elements of a tuple argument by (argument, element) index.
        options: `num_warps`, `num_stages`.
    """

    label: str
    kernel: Any
    signature: dict[str, Any]
    constants: dict[Any, Any]
    options: dict[str, int]


TRITON_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def kernel_signature(kernel: Any, types: dict[str, Any], constants: dict[str, Any]) -> dict[str, Any]:
    """`types` and `constants` in the order of the kernel's arguments."""
    return {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}


@dataclass(frozen=True)
class GenerateConfig:
    """Block sizes of the generate kernels.

    Attributes:
        dot: matrix products rather than multiply and sum.
        batch: conditions per tile.
        rows: head rows per tile.
        columns: head columns per tile: the whole (padded) width without, a slice of it with matrix products.
        trunk_rows: condition rows per tile of the trunk's backward.
        registers: the most a thread may have; with 8 warps, 128 let two programs share a multiprocessor.
    """

    dot: bool
    batch: int
    rows: int
    columns: int
    trunk_rows: int
    registers: int

    @property
    def programs_per_multiprocessor(self) -> int:
        return REGISTER_FILE // (32 * NUM_WARPS * self.registers)

    @property
    def options(self) -> dict[str, int]:
        """Triton's launch options."""
        # Only loads that feed a matrix product are pipelined; elsewhere a second stage would just take registers.
        return {"num_warps": NUM_WARPS, "num_stages": 2 if self.dot else 1, "maxnreg": self.registers}


# Elements of a head tile, by conditions per tile. 4096 are 16 KiB in flight per program; with two programs per
# multiprocessor that is about what the latency of device memory needs. More conditions keep more sums in registers.
_TILE_ELEMENTS = {1: 4096, 4: 2048, 8: 1024, 16: 1024}


def generate_config(
    batch: int, segments: int, width: int, dtype: torch.dtype, *, backward: bool
) -> GenerateConfig:
    """Block sizes for `batch` conditions of `segments` rows and a head of `dtype` with `width` columns."""
    total = batch * segments
    trunk_rows = (1 if total == 1 else 4 if total <= 4 else 16 if total <= 16 else 32) if backward else 1
    half = dtype != torch.float32
    # Backward, no sum crosses threads until the end: multiply and sum beats float32 matrix products up to 16.
    if batch <= (16 if backward and not half else 4):
        columns = next_power_of_2(width)
        tile_batch = next(size for size in _TILE_ELEMENTS if size >= batch)
        rows = max(1, min(512, _TILE_ELEMENTS[tile_batch] // columns))
        return GenerateConfig(False, tile_batch, rows, columns, trunk_rows, 128 if tile_batch < 16 else 255)
    tile_batch = 16 if batch <= 16 or (backward and not half) else 32
    columns = max(DOT_MINIMUM, min(64 if half else 32 if backward else 16, next_power_of_2(width)))
    # A float32 product without tensor cores holds whole rows of its operands in registers: its inner side stays short.
    rows = 64 if half or not backward else 16
    return GenerateConfig(True, tile_batch, rows, columns, trunk_rows, 255 if backward else 128)


@dataclass(frozen=True)
class RowPartition:
    """Head rows in contiguous, equal pieces: program i takes `[i * chunk, (i + 1) * chunk)`."""

    programs: int
    chunk: int


def partition_rows(rows: int, config: GenerateConfig, device: torch.device) -> RowPartition:
    """A persistent grid over `rows`, in whole tiles: every program is resident from the start."""
    wanted = min(cdiv(rows, config.rows), config.programs_per_multiprocessor * multiprocessors(device))
    chunk = cdiv(cdiv(rows, wanted), config.rows) * config.rows
    return RowPartition(cdiv(rows, chunk), chunk)


@dataclass(frozen=True)
class PredictConfig:
    """Block sizes of the predict kernels.

    Attributes:
        stride: the hidden width, padded; columns of a row in the workspace.
        pieces: powers of two that add up to `stride`: the accumulators of a tile of rows.
        passes: where each pass over the columns begins, as an index of `pieces`, and the end.
        rows: rows of a tile.
        inner: columns that a step of a product multiplies.
        block: side of a tile of a weight gradient.
        warps: of the row kernel.
        precision: Triton's name for how float32 operands of the hidden products are multiplied.
        exact: the same for the last layer.
        half: the hidden products have bfloat16 operands.
    """

    stride: int
    pieces: tuple[int, ...]
    passes: tuple[int, ...]
    rows: int
    inner: int
    block: int
    warps: int
    precision: str
    exact: str
    half: bool


def _pieces(width: int, largest: int) -> tuple[int, ...]:
    """`width`, a multiple of 16, as powers of two, the large ones first."""
    whole, rest = divmod(width, largest)
    return (largest,) * whole + tuple(1 << bit for bit in reversed(range(4, rest.bit_length())) if rest >> bit & 1)


def _passes(pieces: tuple[int, ...], most: int) -> tuple[int, ...]:
    """Consecutive pieces in groups of at most `most` columns."""
    starts, columns = [0], 0
    for index, piece in enumerate(pieces):
        if columns and columns + piece > most:
            starts.append(index)
            columns = 0
        columns += piece
    return (*starts, len(pieces))


def predict_config(rows: int, width: int, precision: str, multiprocessors: int) -> PredictConfig:
    """Block sizes for `rows` rows of hidden width `width` on so many multiprocessors."""
    stride = cdiv(width, DOT_MINIMUM) * DOT_MINIMUM
    exact = precision == "fp32"
    half = precision == "bf16"
    # Long tiles read the matrices less often, short ones keep every multiprocessor busy.
    largest = 128 if not exact and stride <= 256 else 64
    tile = max(DOT_MINIMUM, min(largest, next_power_of_2(cdiv(rows, multiprocessors))))
    warps = 4 if tile <= 32 and stride <= (256 if half else 128) else 8
    # Columns per pass: as many as leave registers for the operands, which float32 without tensor cores, and short
    # tiles, hold there. A piece leaves through shared memory, 64 KiB at most.
    if exact:
        largest_piece, most = 128, 192 if tile <= 32 else 128
    elif tile <= 32:
        largest_piece, most = 256, 256 if half else 128
    else:
        largest_piece, most = 16384 // tile, (24576 if half else 16384) // tile
    pieces = _pieces(stride, min(largest_piece, most))
    return PredictConfig(
        stride,
        pieces,
        _passes(pieces, most),
        tile,
        32 if half else 16,
        64,
        warps,
        "ieee" if exact else "tf32",
        "ieee" if exact else "tf32x3",
        half,
    )


class Tickets:
    """Counters for "the last program to finish reduces": int32 zeros that every launch leaves zero.

    Zeroed once per device, so that a launch needs no memset. Launches on one stream follow each other and share a
    counter. A launch captured in a CUDA graph may be replayed on any stream: it gets a counter of its own.
    """

    _SIZE = 4096

    def __init__(self) -> None:
        self._free: dict[torch.device, list[Tensor]] = {}
        self._by_stream: dict[tuple[torch.device, int], Tensor] = {}

    def take(self, device: torch.device) -> Tensor:
        """An int32 zero on `device` for one launch on the current stream."""
        if device.type != "cuda":
            return self._by_stream.setdefault((device, 0), torch.zeros(1, dtype=torch.int32))
        capturing = torch.cuda.is_current_stream_capturing()
        if not capturing:
            stream = torch.cuda.current_stream(device).cuda_stream
            if (device, stream) not in self._by_stream:
                self._by_stream[device, stream] = self._next(device)
            return self._by_stream[device, stream]
        if not self._free.get(device):
            # Nothing ran before the capture. Memory of the graph is zeroed by the graph only, so it is not kept.
            return torch.zeros(1, dtype=torch.int32, device=device)
        return self._free[device].pop()

    def _next(self, device: torch.device) -> Tensor:
        if not self._free.get(device):
            zeros = torch.zeros(self._SIZE, dtype=torch.int32, device=device)
            # Other streams may use their counter at once.
            torch.cuda.current_stream(device).synchronize()
            self._free[device] = list(zeros.split(1))
        return self._free[device].pop()


tickets = Tickets()
