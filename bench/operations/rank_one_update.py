"""A step of SGD with momentum, or of AdamW, on a hypernetwork's head, from the factors of its gradient.

The others store the gradient first: the outer product is written by the backward pass, then read by the optimiser.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from registry import Case, Operation, Provider, Work, drawing, on_backend, prepare_compiler
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import hyperfast
from hyperfast import functional
from operations import shapes
from operations.generate import size

_STEPS = 3  # of `results`
Step = Callable[[], object]


@dataclass(frozen=True)
class Inputs:
    """The head before the first step, and the factors of its gradient."""

    weight: Tensor
    left: Tensor
    right: Tensor
    adam: bool


def make_inputs(options: Mapping[str, Any], device: torch.device, seed: int) -> Inputs:
    """A head of standard deviation 0.05."""
    rows, width = options["rows"], options["width"]
    with drawing(seed):
        weight = torch.randn(rows, width, device=device).mul_(0.05)
        return Inputs(weight, torch.randn(rows, device=device), torch.randn(width, device=device), options["adam"])


def _work(build: Callable[[Inputs], tuple[Tensor, Step]]) -> Callable[[Inputs], Work]:
    """`build` returns a copy of the weight and what makes a step on it."""

    def make(inputs: Inputs) -> Work:
        weight, move = build(inputs)

        def step() -> Tensor:
            move()
            return weight.detach()

        def results() -> dict[str, Tensor]:
            moved, again = build(inputs)
            for _ in range(_STEPS):
                again()
            return {"weight": moved.detach()}

        return Work(step, results)

    return make


def _factored(inputs: Inputs) -> tuple[Tensor, Step]:
    weight, count = inputs.weight.clone(), 0
    state = [torch.zeros_like(weight) for _ in range(1 + inputs.adam)]

    def sgd() -> None:
        functional.sgd_rank_one(weight, inputs.left, inputs.right, lr=0.01, momentum_buffer=state[0], momentum=0.9)

    def adam() -> None:
        nonlocal count
        count += 1
        functional.adam_rank_one(
            weight, inputs.left, inputs.right, exp_avg=state[0], exp_avg_sq=state[1], step=count, weight_decay=0.01
        )

    return weight, adam if inputs.adam else sgd


def _optimizer(weight: nn.Parameter, adam: bool, **options: bool) -> Optimizer:
    if adam:
        return AdamW([weight], lr=1e-3, weight_decay=0.01, **options)
    return SGD([weight], lr=0.01, momentum=0.9, **options)


def _stored(**options: bool) -> Callable[[Inputs], tuple[Tensor, Step]]:
    def build(inputs: Inputs) -> tuple[Tensor, Step]:
        weight = nn.Parameter(inputs.weight.clone())
        optimizer = _optimizer(weight, inputs.adam, **options)

        def step() -> None:
            weight.grad = torch.outer(inputs.left, inputs.right)
            optimizer.step()

        return weight, step

    return build


def _compiled(inputs: Inputs) -> tuple[Tensor, Step]:
    weight, step = _stored()(inputs)
    return weight, torch.compile(step)


def truth(inputs: Inputs) -> dict[str, Tensor]:
    """torch's optimiser in float64."""
    doubles = Inputs(inputs.weight.double(), inputs.left.double(), inputs.right.double(), inputs.adam)
    return _work(_stored())(doubles).results()


def _traffic(options: Mapping[str, Any]) -> int:
    """Weight and state are read and written; the factors are next to nothing."""
    tensors = 3 if options["adam"] else 2
    return 4 * 2 * tensors * options["rows"] * options["width"]


_RESNET_56 = {"rows": size(shapes.resnet(56)), "width": 128}

OPERATION = Operation(
    name="rank_one_update",
    title="Optimiser step on a hypernetwork's head, outer product included",
    cases=[
        Case("head of ResNet-56, width 128, SGD with momentum", {**_RESNET_56, "adam": False}),
        Case("head of ResNet-56, width 128, AdamW", {**_RESNET_56, "adam": True}),
        Case("1000 x 16, SGD with momentum", {"rows": 1000, "width": 16, "adam": False}, small=True),
    ],
    providers=[
        Provider("hyperfast", lambda inputs: on_backend(_work(_factored), inputs, hyperfast.Backend.AUTO)),
        Provider("torch.optim, fused", _work(_stored(fused=True))),
        Provider("torch.optim, foreach", _work(_stored(foreach=True))),
        Provider("torch.compile", _work(_compiled), prepare=prepare_compiler),
    ],
    inputs=make_inputs,
    truth=truth,
    traffic=_traffic,
    flops=lambda options: (12 if options["adam"] else 6) * options["rows"] * options["width"],
    tests="tests/ops/test_rank_one_update.py",
    gpu_tests="rank_one_update",
    tolerance=1e-4,
)
