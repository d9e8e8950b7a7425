"""Flow of the solution procedure between pairs of feature maps, forward and backward to the student's maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peers import repdistiller
from registry import Case, Operation, Provider, hyperfast_providers, prepare_compiler
from torch import Tensor

from hyperfast import functional, reference
from operations.feature_maps import Inputs, doubled, elements, make_inputs, work

PAIRS = [(0, 1), (2, 3)]


def _fused(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """As `losses.FlowOfSolution` calls it: the weights of the sum are known beforehand."""
    return functional.flow_of_solution(student, teacher, pairs=PAIRS, expected_grad=torch.ones(len(PAIRS))).sum()


def _broadcast(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    return repdistiller.flow_loss(student, teacher, PAIRS)


def product_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The same by batched matrix products."""

    def matrix(maps: Sequence[Tensor], i: int, j: int) -> Tensor:
        first, second = maps[i].flatten(2), maps[j].flatten(2)
        return torch.bmm(first, second.transpose(1, 2)) / first.shape[2]

    return torch.stack([(matrix(student, *p) - matrix(teacher, *p)).square().mean() for p in PAIRS]).sum()


def truth(inputs: Inputs) -> dict[str, Tensor]:
    """The reference in float64."""
    flat = [tap for pair in PAIRS for tap in pair]
    loss = reference.flow_of_solution
    return work(doubled(inputs), lambda s, t: loss(s, t, [], flat, "mean", False).sum()).results()


def _flops(options: Mapping[str, Any]) -> int:
    # Four products of every pair: the matrices of both networks, the gradients of both maps.
    return sum(8 * options["maps"][i][1] * elements({"maps": [options["maps"][j]]}) for i, j in PAIRS)


def _case(name: str, first: tuple[int, ...], second: tuple[int, ...], small: bool = False) -> Case:
    return Case(name, {"maps": [first] * 2 + [second] * 2, "relu": True}, small)


OPERATION = Operation(
    name="flow_of_solution",
    title="Flow between two pairs of taps, forward and backward",
    cases=[
        _case("2 of 128x48x16x16, 2 of 128x192x4x4", (128, 48, 16, 16), (128, 192, 4, 4)),
        _case("2 of 9x8x8x8, 2 of 9x16x4x4", (9, 8, 8, 8), (9, 16, 4, 4), small=True),
    ],
    providers=[
        *hyperfast_providers(lambda inputs: work(inputs, _fused)),
        Provider("eager (RepDistiller's form)", lambda inputs: work(inputs, _broadcast)),
        Provider("eager (bmm form)", lambda inputs: work(inputs, product_loss)),
        Provider(
            "torch.compile",
            lambda inputs: work(inputs, torch.compile(product_loss, fullgraph=True)),
            prepare=prepare_compiler,
        ),
    ],
    inputs=make_inputs,
    truth=truth,
    # Both maps are read and the student's gradient is written: what is possible where a sample stays in the cache.
    traffic=lambda options: 3 * 4 * elements(options),
    flops=_flops,
    tests="tests/ops/test_flow_of_solution.py",
    gpu_tests="flow_of_solution",
    tolerance=1e-4,
)
