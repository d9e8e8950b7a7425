"""Orders of the covered rows in which neighbours are alike, so that a smooth predictor fits them better."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hyperfast import functional
from hyperfast.surgery.coverage import Coverage

PERMUTATIONS = ("identity", "in-filter", "cross-filter")
ZEROS = ("error", "last")

# (first value, number of values, bits of each), values being entries of the stored orders.
_Field = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Permutation:
    """A bijection of the rows of every covered tensor, applied to the targets of a predictor.

    The predictor is always evaluated on the natural grid. The row of targets that stands at grid position r is
    `targets[index[r]]`; what the predictor says at r is the kernel of row `index[r]`.

    Attributes:
        kind: `"identity"`, `"in-filter"` or `"cross-filter"`.
        grids: (filters, channels) of each covered tensor.
        orders: the values that define it, int64, tensor after tensor. Cross-filter: the row (f * channels + c) at
            each position. In-filter: the filter at each position, then for each filter (in its natural place) the
            channel at each position. Identity: none.
        index: int64 `[N]`, the natural row at each grid position.
    """

    kind: str
    grids: tuple[tuple[int, int], ...]
    orders: Tensor
    index: Tensor = field(init=False, repr=False)
    _inverse: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        index = _index(self.kind, self.grids, self.orders)
        object.__setattr__(self, "index", index)
        object.__setattr__(self, "_inverse", torch.empty_like(index).scatter_(0, index, torch.arange(len(index))))

    def apply(self, targets: Tensor) -> Tensor:
        """Rows `[N, ...]` of the natural order, each at the grid position that stands for it; done once."""
        return self._moved(targets, self.index)

    def invert(self, rows: Tensor) -> Tensor:
        """Rows `[N, ...]` of the grid in the natural order: the inverse of `apply`, differentiable.

        Of `Coverage.coordinates()` it makes the coordinates whose embedding each kernel gets in NeRN.
        """
        return self._moved(rows, self._inverse)

    def _moved(self, rows: Tensor, index: Tensor) -> Tensor:
        if len(rows) != len(index):
            raise ValueError(f"{len(rows)} rows were given; this permutation has {len(index)}")
        return rows if self.kind == "identity" else rows[index.to(rows.device)]

    @property
    def bits(self) -> int:
        """What the orders take when every entry of n has ceil(log2(n)) bits."""
        return permutation_bits(self.kind, self.grids)

    def packed(self) -> Tensor:
        """The orders as uint8 `[ceil(bits / 8)]`, least significant bit first, without gaps between tensors."""
        pieces = [
            self.orders[first : first + count, None] >> torch.arange(width) & 1
            for first, count, width in _fields(self.kind, self.grids)
        ]
        stream = torch.cat([piece.to(torch.uint8).flatten() for piece in pieces] or [torch.empty(0, dtype=torch.uint8)])
        padded = torch.nn.functional.pad(stream, (0, -len(stream) % 8)).view(-1, 8)
        return (padded << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)

    @classmethod
    def unpack(cls, packed: Tensor, coverage: Coverage, kind: str) -> Permutation:
        """The permutation that `packed` stands for.

        Raises:
            ValueError: `packed` is of another dtype or size, or its entries are no permutations.
        """
        bits = permutation_bits(kind, coverage.grids)
        expected = -(-bits // 8)
        if packed.dtype != torch.uint8 or tuple(packed.shape) != (expected,):
            raise ValueError(
                f"packed is {packed.dtype} {list(packed.shape)}; a {kind} permutation of this coverage is "
                f"torch.uint8 [{expected}]"
            )
        stream = (packed.cpu()[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten()
        pieces, at = [], 0
        for _, count, width in _fields(kind, coverage.grids):
            entries = stream[at : at + count * width].view(count, width).to(torch.int64)
            pieces.append((entries << torch.arange(width)).sum(1))
            at += count * width
        if stream[at:].any():
            raise ValueError("packed holds bits behind the last order; it was damaged or belongs to another coverage")
        return cls(kind, coverage.grids, torch.cat([*pieces, torch.empty(0, dtype=torch.int64)]))


def permutation_bits(kind: str, grids: tuple[tuple[int, int], ...]) -> int:
    """Bits of the packed orders, from the shapes alone; see `Permutation.bits`."""
    return sum(count * width for _, count, width in _fields(kind, grids))


def find_permutation(
    coverage: Coverage, targets: Tensor, kind: str = "cross-filter", *, zero: str = "error"
) -> Permutation:
    """The order of `targets` in which each row is followed by the most similar one that is left.

    Similarity is the cosine of two rows. Each chain starts at element 0; ties go to the lowest index.

    Args:
        coverage: says which rows belong to which tensor.
        targets: `[N, K]`, `coverage.gather(state)`.
        kind: - `"cross-filter"`: one chain per tensor over all of its rows.
              - `"in-filter"`: per tensor, one chain over the channels of each filter, then one over the filters so
                ordered, whose similarity is the sum of the cosines at each position. Where rows hold a single value
                (NeRN's 1x1 kernels), channels are compared by the distance of their values.
              - `"identity"`.
        zero: what to do with a row of zeros, whose cosine is not defined (NeRN computes NaN): `"error"`, or
            `"last"`: such rows end their chain, in natural order.

    Raises:
        ValueError: an unknown option; `targets` of another shape; NaN or infinity, or under `"error"` a row of zeros:
            the message names the tensor and the row's filter and channel.

    Notes:
        O(n^2 K) for a tensor of n rows, on all threads; see `functional.greedy_chain` for rounding.

    Source: NeRN (arXiv 2212.13554), as github.com/maorash/NeRN computes it. There the permutation is applied to the
    embeddings of every step; applied to the targets once it is the same.
    """
    for name, given, choices in (("kind", kind, PERMUTATIONS), ("zero", zero, ZEROS)):
        if given not in choices:
            raise ValueError(f"{name} is {given!r}; choose one of {', '.join(map(repr, choices))}")
    if tuple(targets.shape) != (coverage.rows, coverage.outputs):
        raise ValueError(f"targets are {list(targets.shape)}; this coverage has [{coverage.rows}, {coverage.outputs}]")
    if kind == "identity":
        return Permutation(kind, coverage.grids, torch.empty(0, dtype=torch.int64))
    rows = targets.detach().cpu().double()
    _check_rows(coverage, rows, zero)
    chains = _cross_filter(coverage, rows) if kind == "cross-filter" else _in_filter(coverage, rows)
    return Permutation(kind, coverage.grids, torch.cat([chain.flatten() for chain in chains]))


def _cross_filter(coverage: Coverage, rows: Tensor) -> list[Tensor]:
    units = _units(rows)
    return functional.greedy_chain([units[piece] for piece in coverage.slices()])


def _in_filter(coverage: Coverage, rows: Tensor) -> list[Tensor]:
    units = _units(rows)
    grids = [units[piece].view(*grid, -1) for piece, grid in zip(coverage.slices(), coverage.grids, strict=True)]
    channel_orders = _channel_orders(coverage, rows, grids)
    ordered = [
        grid.gather(1, order.unsqueeze(2).expand_as(grid)).flatten(1)
        for grid, order in zip(grids, channel_orders, strict=True)
    ]
    filter_orders = functional.greedy_chain(ordered)
    return [order for pair in zip(filter_orders, channel_orders, strict=True) for order in pair]


def _channel_orders(coverage: Coverage, rows: Tensor, grids: list[Tensor]) -> list[Tensor]:
    """Per tensor `[filters, channels]`: one launch for the cosines, one for the distances of single values."""
    single = [tensor.single_tap for tensor in coverage.tensors]
    by_cosine = iter(functional.greedy_chain([g for g, s in zip(grids, single, strict=True) if not s]))
    values = []
    for tensor, piece in zip(coverage.tensors, coverage.slices(), strict=True):
        if tensor.single_tap:
            # The only element of a row is its sum. Divided by the filter's norm, as NeRN does, in its precision.
            filters = rows[piece].sum(1).view(tensor.filters, tensor.channels)
            scale = torch.linalg.vector_norm(filters, dim=1, keepdim=True).clamp_min(torch.finfo(filters.dtype).tiny)
            values.append((filters / scale).float().unsqueeze(2))
    by_distance = iter(functional.greedy_chain(values, similarity="distance"))
    return [next(by_distance if s else by_cosine) for s in single]


def _units(rows: Tensor) -> Tensor:
    """Rows of norm 1; zeros stay zero."""
    scale = rows.abs().amax(1, keepdim=True)
    scaled = rows / torch.where(scale == 0, 1, scale)  # so that no square underflows
    norms = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    return scaled / torch.where(norms == 0, 1, norms)


def _check_rows(coverage: Coverage, rows: Tensor, zero: str) -> None:
    bad = ~rows.isfinite().all(1)
    if bad.any():
        raise ValueError(f"{_first_row(coverage, bad)} has NaN or infinite weights, which no order can place")
    zeros = (rows == 0).all(1)
    if zero == "error" and zeros.any():
        raise ValueError(
            f"{_first_row(coverage, zeros)} is all zero ({int(zeros.sum())} such rows): its cosine with another is "
            "not defined. Use zero='last' to put such rows at the end of their chains"
        )


def _first_row(coverage: Coverage, marked: Tensor) -> str:
    layer, filter_, channel = coverage.coordinates()[marked.int().argmax()].tolist()
    return f"the row of filter {filter_}, channel {channel} of {coverage.tensors[layer].name}"


def _fields(kind: str, grids: tuple[tuple[int, int], ...]) -> Iterator[_Field]:
    """Runs of equally wide entries of `Permutation.orders`."""
    first = 0
    for filters, channels in grids if kind != "identity" else ():
        runs = [(filters, filters), (filters * channels, channels)]
        for count, size in runs if kind == "in-filter" else [(filters * channels, filters * channels)]:
            yield first, count, (size - 1).bit_length()
            first += count


def _index(kind: str, grids: tuple[tuple[int, int], ...], orders: Tensor) -> Tensor:
    """The natural row at each grid position; ValueError unless `orders` are permutations."""
    rows = sum(filters * channels for filters, channels in grids)
    if kind == "identity":
        return torch.arange(rows)
    pieces, first, at = [], 0, 0
    for filters, channels in grids:
        count = filters * channels
        if kind == "cross-filter":
            local = _checked(orders[at : at + count])
        else:
            by_filter = _checked(orders[at : at + filters])
            by_channel = _checked(orders[at + filters : at + filters + count].view(filters, channels))
            local = (by_filter[:, None] * channels + by_channel[by_filter]).flatten()
        at += count if kind == "cross-filter" else filters + count
        pieces.append(local + first)
        first += count
    return torch.cat(pieces)


def _checked(order: Tensor) -> Tensor:
    if not torch.equal(order.sort(-1).values, torch.arange(order.shape[-1]).expand_as(order)):
        raise ValueError("an order is no permutation: it was damaged, or belongs to another coverage")
    return order
