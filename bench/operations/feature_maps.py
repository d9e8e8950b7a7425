"""Losses over pairs of feature maps: inputs, the work of a step, and an operation around them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from registry import Case, Operation, Provider, Work, drawing, hyperfast_providers, prepare_compiler
from torch import Tensor

Loss = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Inputs:
    """Feature maps of the student and the teacher, of equal shapes in pairs."""

    student: list[Tensor]
    teacher: list[Tensor]


def make_inputs(options: Mapping[str, Any], device: torch.device, seed: int) -> Inputs:
    """Normal maps; with the option `relu` as a ReLU leaves them: half of the elements are zero."""
    with drawing(seed):
        student, teacher = ([torch.randn(shape, device=device) for shape in options["maps"]] for _ in range(2))
    if options.get("relu"):
        student, teacher = [s.relu_() for s in student], [t.relu_() for t in teacher]
    return Inputs(student, teacher)


def doubled(inputs: Inputs) -> Inputs:
    """The same in float64."""
    return Inputs([s.double() for s in inputs.student], [t.double() for t in inputs.teacher])


def work(inputs: Inputs, loss: Loss) -> Work:
    """`loss` is the sum over the taps."""
    student = [features.detach().requires_grad_() for features in inputs.student]

    def step() -> Tensor:
        for features in student:
            features.grad = None
        total = loss(student, inputs.teacher)
        total.backward()
        return total

    def results() -> dict[str, Tensor]:
        total = step().detach()
        gradients = {f"d_map{index}": features.grad for index, features in enumerate(student)}
        return {"loss": total, **{name: g for name, g in gradients.items() if g is not None}}

    return Work(step, results)


def elements(options: Mapping[str, Any]) -> int:
    """Of the student's maps together."""
    return sum(math.prod(shape) for shape in options["maps"])


def sum_of_taps(tap: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """The sum of `tap` over all pairs, one after the other, as the projects write it."""

    def loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        losses = [tap(s, t) for s, t in zip(student, teacher, strict=True)]
        total = losses[0]
        for loss in losses[1:]:
            total = total + loss
        return total

    return loss


def feature_operation(
    name: str,
    title: str,
    cases: Sequence[Case],
    fused: Callable[..., Tensor],
    truth: Loss,
    eager: Mapping[str, Loss],
    flops: int,
) -> Operation:
    """An operation over pairs of maps.

    Args:
        name: of the operation.
        title: of its table.
        cases: with the option `maps`.
        fused: (student, teacher, expected_grad) -> losses `[L]` of hyperfast, called as the loss module calls it.
        truth: the reference, summed over the taps; called in float64.
        eager: peers' forms by name; the last one, which must be the best of them, is also compiled.
        flops: per element of a map.
    """

    def ours(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        # The weights of the sum are known beforehand.
        return fused(student, teacher, expected_grad=torch.ones(len(student))).sum()

    def exact(inputs: Inputs) -> dict[str, Tensor]:
        return work(doubled(inputs), truth).results()

    best = list(eager.values())[-1]
    return Operation(
        name=name,
        title=title,
        cases=cases,
        providers=[
            *hyperfast_providers(lambda inputs: work(inputs, ours)),
            *(
                Provider(f"eager ({form})", lambda inputs, loss=loss: work(inputs, loss))
                for form, loss in eager.items()
            ),
            Provider(
                "torch.compile",
                lambda inputs: work(inputs, torch.compile(best, fullgraph=True)),
                prepare=prepare_compiler,
            ),
        ],
        inputs=make_inputs,
        truth=exact,
        # Both maps are read and the student's gradient is written.
        traffic=lambda options: 3 * 4 * elements(options),
        flops=lambda options: flops * elements(options),
        tests=f"tests/ops/test_{name}.py",
        gpu_tests=name,
        tolerance=1e-5,
    )


# Two stages of a network, and small ones.
STAGES = Case("128x48x16x16, 128x192x4x4", {"maps": [(128, 48, 16, 16), (128, 192, 4, 4)]})
SMALL = Case("4x8x8x8, 4x16x4x4", {"maps": [(4, 8, 8, 8), (4, 16, 4, 4)]}, small=True)
