"""Coordinates and the order of a network's kernels: what is done once before a reconstruction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from registry import Case, Operation, Provider, Work, drawing
from torch import Tensor

from hyperfast import models, surgery


@dataclass(frozen=True)
class Inputs:
    """A network's kernels `[N, 9]`, and how many filters and channels each tensor has."""

    coverage: surgery.Coverage
    rows: Tensor
    kind: str


Orders = list[Tensor]  # of the rows of each tensor: the one at every position


def make_inputs(options: Mapping[str, Any], device: torch.device, seed: int) -> Inputs:
    """The layout of a CIFAR ResNet; kernels without ties."""
    network = models.create(options["model"])
    coverage = surgery.cover(network, policy="nern")
    with drawing(seed):
        rows = torch.randn(coverage.rows, coverage.outputs)
    return Inputs(coverage, rows.to(device), "cross-filter")


def _work(build: Callable[[Inputs], tuple[Tensor, Orders]]) -> Callable[[Inputs], Work]:
    """`build` returns the coordinates of every row and the orders."""

    def make(inputs: Inputs) -> Work:
        def step() -> list[Tensor]:
            coordinates, orders = build(inputs)
            return [coordinates, *orders]

        def results() -> dict[str, Tensor]:
            coordinates, orders = build(inputs)
            return {"coordinates": coordinates, "smoothness": smoothness(inputs, orders)}

        return Work(step, results)

    return make


def smoothness(inputs: Inputs, orders: Orders) -> Tensor:
    """Mean cosine of neighbours, per tensor, in float64: of two nearest ones a float32 product may take the other."""
    found = []
    for piece, order in zip(inputs.coverage.slices(), orders, strict=True):
        rows = inputs.rows[piece].double()[order]
        found.append(torch.cosine_similarity(rows[1:], rows[:-1]).mean())
    return torch.stack(found)


def _ours(inputs: Inputs) -> tuple[Tensor, Orders]:
    permutation = surgery.find_permutation(inputs.coverage, inputs.rows, inputs.kind)
    sizes = [filters * channels for filters, channels in inputs.coverage.grids]
    return inputs.coverage.coordinates(), list(permutation.orders.split(sizes))


def _eager(inputs: Inputs) -> tuple[Tensor, Orders]:
    """A matrix of similarities per tensor, and a loop that always goes to the nearest row that is left."""
    grids = [
        torch.cartesian_prod(torch.tensor([layer]), torch.arange(filters), torch.arange(channels))
        for layer, (filters, channels) in enumerate(inputs.coverage.grids)
    ]
    return torch.cat(grids), [_chain(inputs.rows[piece]) for piece in inputs.coverage.slices()]


def _chain(rows: Tensor) -> Tensor:
    units = torch.nn.functional.normalize(rows, dim=1)
    similarity = units @ units.T
    order, current = torch.empty(len(rows), dtype=torch.int64), 0
    for position in range(len(rows)):
        order[position] = current
        similarity[:, current] = -torch.inf
        current = int(similarity[current].argmax())
    return order


def truth(inputs: Inputs) -> dict[str, Tensor]:
    """The loop in float64."""
    coordinates, orders = _eager(Inputs(inputs.coverage, inputs.rows.double(), inputs.kind))
    return {"coordinates": coordinates.double(), "smoothness": smoothness(inputs, orders)}


def _flops(options: Mapping[str, Any]) -> int:
    """Cosines of all pairs of a tensor."""
    grids = surgery.cover(models.create(options["model"]), policy="nern").grids
    return sum(2 * 9 * (filters * channels) ** 2 for filters, channels in grids)


OPERATION = Operation(
    name="permutation",
    title="Coordinates and cross-filter order of all kernels of a network",
    cases=[
        Case("ResNet-20", {"model": "resnet20"}),
        Case("ResNet-56", {"model": "resnet56"}),
        Case("ResNet-8", {"model": "resnet8"}, small=True),
    ],
    providers=[Provider("hyperfast", _work(_ours)), Provider("eager (NeRN's form)", _work(_eager))],
    inputs=make_inputs,
    truth=truth,
    traffic=lambda _options: 0,  # similarities are compared, and need not be stored
    flops=_flops,
    tests="tests/surgery/test_permutation.py",
    gpu_tests="predict",
    tolerance=1e-2,
)
