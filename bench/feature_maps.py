"""Feature maps of two networks, and a loss between them as work to be measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from registry import Work, drawing
from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """Feature maps of the student and the teacher, `[B, ...]` each."""

    student: list[Tensor]
    teacher: list[Tensor]


def make_inputs(options: Mapping[str, Any], device: torch.device, seed: int) -> Inputs:
    """Maps of the shapes `options["maps"]`, as a ReLU leaves them: half of the elements are zero."""
    with drawing(seed):
        student, teacher = ([torch.randn(shape, device=device).relu_() for shape in options["maps"]] for _ in range(2))
    return Inputs(student, teacher)


def doubled(inputs: Inputs) -> Inputs:
    """The same in float64."""
    return Inputs([s.double() for s in inputs.student], [t.double() for t in inputs.teacher])


def feature_work(inputs: Inputs, loss: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]) -> Work:
    """Forward and backward to the student's maps; `loss` is the sum over the taps."""
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
    """Elements of one network's maps."""
    return sum(math.prod(shape) for shape in options["maps"])
