"""How the elements of one weight are laid out as rows of a predictor's outputs, and back."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

HOWS = ("kernel", "chunk", "split", "filters", "block")
CROPS = ("center", "average", "max")
TILES = ("auto", "row", "block")


@dataclass(frozen=True)
class CoveredTensor:
    """A weight as a grid of rows of at most `kernel` squared elements.

    The first dimension of the weight counts filters, the second channels (1 where there is none), the others are
    taps. A transposed convolution's weight therefore counts its inputs as filters.

    Attributes:
        name: dotted name of the parameter, as in the state dict.
        shape: of the parameter.
        how: - `"kernel"`: one filter's taps on one channel are one row. A smaller kernel sits in the middle of the
               square (`crop`); one tap is the centre.
             - `"chunk"`: a filter's channels and taps, in memory order, in runs of kernel^2; the last one is masked.
             - `"split"`: the taps of one channel in runs of kernel^2; the runs are extra channels.
             - `"filters"`: the whole weight in runs of kernel^2, for filters smaller than half a row.
             - `"block"`: squares of kernel x kernel filters and channels, masked at both edges.
        kernel: side of the predictor's output.
        crop: how `"kernel"` gets a smaller kernel from a square: its `"center"`, or pooling with `"average"` or
            `"max"` and stride 1.
    """

    name: str
    shape: tuple[int, ...]
    how: str
    kernel: int
    crop: str = "center"

    def __post_init__(self) -> None:
        if self.how not in HOWS or self.crop not in CROPS or not self.shape or self.kernel < 1:
            raise ValueError(f"no layout of {self.name}: {self.how!r}, {self.crop!r}, {self.shape}, {self.kernel}")

    @property
    def numel(self) -> int:
        """Elements of the weight."""
        return prod(self.shape)

    @property
    def outputs(self) -> int:
        """K, elements of a row."""
        return self.kernel**2

    @property
    def taps(self) -> tuple[int, ...]:
        """The dimensions after filters and channels."""
        return self.shape[2:]

    @property
    def filters(self) -> int:
        """Rows of the grid."""
        if self.how == "filters":
            return 1
        return _ceil(self.shape[0], self.kernel) if self.how == "block" else self.shape[0]

    @property
    def channels(self) -> int:
        """Columns of the grid."""
        channels, taps = prod(self.shape[1:2]), prod(self.taps)
        if self.how == "filters":
            return _ceil(self.numel, self.outputs)
        if self.how == "chunk":
            return _ceil(channels * taps, self.outputs)
        if self.how == "split":
            return channels * _ceil(taps, self.outputs)
        return _ceil(channels, self.kernel) if self.how == "block" else channels

    @property
    def rows(self) -> int:
        """filters x channels."""
        return self.filters * self.channels

    @property
    def single_tap(self) -> bool:
        """Whether a row holds one element, the centre: NeRN's treatment of a 1x1 convolution."""
        return self.how == "kernel" and prod(self.taps) == 1

    def gather(self, weight: Tensor) -> Tensor:
        """`weight` as `[rows, K]`, zero where masked."""
        if self.how == "kernel":
            (top, bottom), (left, right) = self._margins()
            height, width = self._sides()
            square = F.pad(weight.reshape(self.rows, height, width), (left, right, top, bottom))
            return square.reshape(self.rows, self.outputs)
        if self.how == "block":
            k, (f, c) = self.kernel, (self.filters, self.channels)
            matrix = weight.reshape(self.shape[0], -1)
            padded = F.pad(matrix, (0, c * k - matrix.shape[1], 0, f * k - matrix.shape[0]))
            return padded.view(f, k, c, k).transpose(1, 2).reshape(self.rows, self.outputs)
        runs = self._runs()
        missing = -runs[1] % self.outputs
        return F.pad(weight.reshape(runs), (0, missing)).view(self.rows, self.outputs)

    def scatter(self, rows: Tensor) -> Tensor:
        """The weight that `[rows, K]` stand for; what is masked is left out."""
        if self.how == "kernel":
            return self._cropped(rows.reshape(-1, self.kernel, self.kernel)).reshape(self.shape)
        if self.how == "block":
            k, (f, c) = self.kernel, (self.filters, self.channels)
            matrix = rows.reshape(f, c, k, k).transpose(1, 2).reshape(f * k, c * k)
            return matrix[: self.shape[0], : prod(self.shape[1:])].reshape(self.shape)
        groups, length = self._runs()
        return rows.reshape(groups, -1)[:, :length].reshape(self.shape)

    def _runs(self) -> tuple[int, int]:
        """The weight as so many runs of so many consecutive elements; each is cut into rows by itself."""
        groups = {"chunk": self.shape[0], "split": prod(self.shape[:2]), "filters": 1}[self.how]
        return groups, self.numel // groups

    def _sides(self) -> tuple[int, int]:
        return (1, 1, *self.taps)[-2:]  # type: ignore[return-value]

    def _margins(self) -> list[tuple[int, int]]:
        spare = [self.kernel - side for side in self._sides()]
        return [(s // 2, s - s // 2) for s in spare]

    def _cropped(self, squares: Tensor) -> Tensor:
        height, width = self._sides()
        if self.crop == "center" or height == width == self.kernel:
            (top, _), (left, _) = self._margins()
            return squares[:, top : top + height, left : left + width]
        pool: Any = F.avg_pool2d if self.crop == "average" else F.max_pool2d
        window = (self.kernel - height + 1, self.kernel - width + 1)
        pooled: Tensor = pool(squares.unsqueeze(1), window, stride=1)
        return pooled.squeeze(1)


def fits(shape: tuple[int, ...], kernel: int) -> bool:
    """Whether the taps of a weight fit into a square of side `kernel`."""
    return len(shape) <= 4 and all(side <= kernel for side in shape[2:])


def choose_tiling(shape: tuple[int, ...], kernel: int, tile: str) -> str:
    """The layout that wastes least: see `CoveredTensor.how`.

    Kernels of exactly the predictor's size are rows as they are, larger ones are split, smaller ones packed. `tile`
    says how a weight without taps (linear, 1x1) is packed: `"row"`, `"block"`, or `"auto"`, the one of fewer rows,
    runs of channels where both need as many.
    """
    outputs, taps = kernel**2, prod(shape[2:])
    if shape[2:] == (kernel, kernel):
        return "kernel"
    if taps > outputs:
        return "split"
    packed = "filters" if 2 * prod(shape[1:]) <= outputs else "chunk"
    if taps > 1 or tile == "row":
        return packed
    if tile == "block":
        return "block"
    return min((packed, "block"), key=lambda how: CoveredTensor("", shape, how, kernel).rows)


def _ceil(count: int, size: int) -> int:
    return -(-count // size)


def grid_coordinates(layer: int, filters: int, channels: int) -> Tensor:
    """int64 `[filters * channels, 3]`: (layer, filter, channel), row-major."""
    grid = torch.empty(filters, channels, 3, dtype=torch.int64)
    grid[..., 0] = layer
    grid[..., 1] = torch.arange(filters).unsqueeze(1)
    grid[..., 2] = torch.arange(channels)
    return grid.view(-1, 3)
