"""Truncated singular value decompositions of the weights of a layer, also with regard to what the layer sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Split = Literal["balanced", "up", "down"]
SPLITS = ("balanced", "up", "down")
_FULL_PATCHES = 256  # largest second moment of the patches of a convolution
_FULL_LINEAR = 512
_SHRINKAGE = 0.01
_RIDGE = 1e-5
_SAMPLES = 4096  # vectors of a layer's input per batch


def as_matrix(weight: Tensor) -> Tensor:
    """A weight `[out, in, *kernel]` as `[out, in * kernel]`."""
    return weight.flatten(1)


@dataclass(frozen=True, eq=False)
class Spectrum:
    r"""The singular value decomposition of a layer's weight, times what its inputs weigh.

    With M the second moment of the inputs and :math:`C C^T = M`, :math:`W C = U \Sigma V^T` minimises
    :math:`E \| (W - \hat W) x \|^2` over matrices of one rank; without inputs C is the identity.

    Attributes:
        left: U, float64 `[out, q]`; the entry of largest size in each column is positive.
        values: :math:`\Sigma`, float64 `[q]`, falling.
        right: :math:`V^T C^{-1}`, float64 `[q, in * kernel]`.
        shape: of the weight.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    shape: torch.Size

    @classmethod
    def of(cls, weight: Tensor, moment: Moment | None = None) -> Spectrum:
        """Of a weight `[out, in, *kernel]`; float64, on the CPU.

        Raises:
            ValueError: weights that are not finite.
        """
        matrix = as_matrix(weight.detach()).to("cpu", torch.float64)
        if not matrix.isfinite().all():
            raise ValueError("the weights are not all finite")
        whitened = matrix if moment is None else moment.apply(matrix)
        left, values, right = torch.linalg.svd(whitened, full_matrices=False)
        signs = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()
        left, right = left * signs, right * signs.T
        return cls(left, values, right if moment is None else moment.solve(right), weight.shape)

    @property
    def full_rank(self) -> int:
        """min(out, in * kernel)."""
        return len(self.values)

    def energy(self, rank: int) -> float:
        """Share of the squared singular values among the first `rank`."""
        total = float(self.values.square().sum())
        return 1.0 if total == 0 else float(self.values[:rank].square().sum()) / total

    def rank_for(self, energy: float) -> int:
        """The smallest rank, at least 1, that keeps `energy`."""
        squared = self.values.square()
        kept = squared.cumsum(0) >= energy * squared.sum() * (1 - 1e-12)
        return int(kept.to(torch.uint8).argmax()) + 1 if bool(kept.any()) else self.full_rank

    def factors(self, rank: int, split: Split = "balanced") -> tuple[Tensor, Tensor]:
        r"""E `[out, r]` and D `[r, in, *kernel]` with E D the best approximation of rank r.

        Args:
            rank: r.
            split: where the singular values go: `"balanced"`, :math:`\sqrt \Sigma` to both, so that each has the
                condition number :math:`\sqrt{\sigma_1 / \sigma_r}`; `"up"`, to E; `"down"`, to D.
        """
        share = {"balanced": 0.5, "up": 1.0, "down": 0.0}[split]
        values = self.values[:rank]
        up = self.left[:, :rank] * values.pow(share)
        down = self.right[:rank] * values.pow(1 - share)[:, None]
        return up, down.view(rank, *self.shape[1:])


@dataclass(frozen=True, eq=False)
class Moment:
    r"""The second moment M of a layer's inputs as a factor C.

    .. math::
        C C^T = (1 - \lambda) M + \lambda \mu I + \epsilon I

    with :math:`\mu` the mean of M's diagonal, :math:`\lambda = 0.01` and :math:`\epsilon = 10^{-5}`.

    Attributes:
        factor: lower triangular `[n, n]` over the whole input of an output (n = in * kernel), or over the channels
            alone, one for all positions of the kernel; or the diagonal `[n]`.
        channels: of the layer's input.
    """

    factor: Tensor
    channels: int

    @classmethod
    def of(cls, moment: Tensor, channels: int) -> Moment:
        """Of M `[n, n]`, or its diagonal `[n]`."""
        moment = moment.to("cpu", torch.float64)
        diagonal = moment if moment.ndim == 1 else moment.diagonal()
        ridge = _SHRINKAGE * diagonal.mean() + _RIDGE
        if moment.ndim == 1:
            return cls(((1 - _SHRINKAGE) * moment + ridge).sqrt(), channels)
        shrunk = (1 - _SHRINKAGE) * moment + ridge * torch.eye(len(moment), dtype=torch.float64)
        return cls(torch.linalg.cholesky(shrunk), channels)

    def apply(self, matrix: Tensor) -> Tensor:
        """W C for W `[rows, in * kernel]`."""
        if self.factor.ndim == 1:
            return self._by_channel(matrix, lambda rows: rows * self.factor)
        return self._by_channel(matrix, lambda rows: rows @ self.factor)

    def solve(self, matrix: Tensor) -> Tensor:
        """W C^-1."""
        if self.factor.ndim == 1:
            return self._by_channel(matrix, lambda rows: rows / self.factor)
        return self._by_channel(
            matrix, lambda rows: torch.linalg.solve_triangular(self.factor, rows, upper=False, left=False)
        )

    def _by_channel(self, matrix: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """`function` of rows as long as the factor: the whole input, or the channels at each position."""
        if matrix.shape[1] == len(self.factor):
            return function(matrix)
        positions = matrix.shape[1] // self.channels
        by_position = matrix.view(-1, self.channels, positions).transpose(1, 2)
        changed = function(by_position.reshape(-1, self.channels))
        return changed.view(-1, positions, self.channels).transpose(1, 2).reshape(matrix.shape)


class MomentMeter:
    """Adds up the second moment of what a layer sees, uncentred, from at most 4096 vectors per batch.

    Patches of a convolution as a whole where they have up to 256 numbers, else its channels; a linear layer's inputs as
    a whole up to 512, else their squares.

    Args:
        layer: a convolution or linear layer.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear) -> None:
        self.layer = layer
        self.count = 0
        self._sum: Tensor | None = None

    def add(self, inputs: Tensor) -> None:
        """Count a batch of the layer's inputs."""
        vectors = _spread(self._vectors(inputs.detach().float())).double()
        moment = vectors.square().sum(0) if self._diagonal else vectors.T @ vectors
        self._sum = moment if self._sum is None else self._sum + moment
        self.count += len(vectors)

    def moment(self) -> Moment | None:
        """None where nothing was seen."""
        if self._sum is None:
            return None
        return Moment.of(self._sum / self.count, self.layer.weight.shape[1])

    @property
    def _diagonal(self) -> bool:
        return isinstance(self.layer, nn.Linear) and self.layer.in_features > _FULL_LINEAR

    def _vectors(self, inputs: Tensor) -> Tensor:
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return inputs.flatten(0, -2)
        if layer.weight[0].numel() <= _FULL_PATCHES and not isinstance(layer.padding, str):
            padding: tuple[int, ...] = layer.padding
            if layer.padding_mode != "zeros":
                inputs, padding = F.pad(inputs, layer._reversed_padding_repeated_twice, layer.padding_mode), (0, 0)
            patches = F.unfold(inputs, layer.kernel_size, layer.dilation, padding, layer.stride)
            return patches.transpose(1, 2).flatten(0, 1)
        return inputs.flatten(2).transpose(1, 2).flatten(0, 1)


def _spread(vectors: Tensor) -> Tensor:
    """At most `_SAMPLES` of the rows, evenly spread."""
    step = math.ceil(len(vectors) / _SAMPLES)
    return vectors[::step]


def budget_ranks(spectra: Sequence[Spectrum], sizes: Sequence[tuple[int, int]], budget: int) -> list[int]:
    """Ranks that keep one share of energy in all layers, the largest with which they fit a budget.

    Args:
        spectra: of the layers.
        sizes: parameters of each layer per rank, and whatever the rank.
        budget: parameters of all of them together.

    Raises:
        ValueError: at rank 1 they have more.
    """

    def ranks(energy: float) -> list[int]:
        return [spectrum.rank_for(energy) for spectrum in spectra]

    def total(chosen: Sequence[int]) -> int:
        return sum(rank * per_rank + fixed for rank, (per_rank, fixed) in zip(chosen, sizes, strict=True))

    low, high = 0.0, 1.0
    if total(ranks(high)) <= budget:
        return ranks(high)
    if total(ranks(low)) > budget:
        raise ValueError(
            f"budget is {budget:,} parameters, but the layers have {total(ranks(low)):,} at rank 1; give more, or "
            "replace fewer layers"
        )
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if total(ranks(middle)) <= budget else (low, middle)
    return ranks(low)
