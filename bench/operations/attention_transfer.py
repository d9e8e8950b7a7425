"""Attention transfer over several feature maps, forward and backward to the student's maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peers import repdistiller
from registry import Case, Operation, Provider, Work, drawing, hyperfast_providers, prepare_compiler
from torch import Tensor

from hyperfast import functional, reference


@dataclass(frozen=True)
class Inputs:
    """Feature maps of the student and the teacher, `[B, C, H, W]` each."""

    student: list[Tensor]
    teacher: list[Tensor]


def make_inputs(options: Mapping[str, Any], device: torch.device, seed: int) -> Inputs:
    """Maps as a ReLU leaves them: half of the elements are zero."""
    with drawing(seed):
        student, teacher = (
            [torch.randn(shape, device=device).relu_() for shape in options["maps"]] for _ in range(2)
        )
    return Inputs(student, teacher)


def _work(inputs: Inputs, loss: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]) -> Work:
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


def _fused(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """As `losses.AttentionTransfer` calls it: the weights of the sum are known beforehand."""
    return functional.attention_transfer(student, teacher, expected_grad=torch.ones(len(student))).sum()


def truth(inputs: Inputs) -> dict[str, Tensor]:
    """The reference in float64."""
    doubles = Inputs([s.double() for s in inputs.student], [t.double() for t in inputs.teacher])
    return _work(doubles, lambda s, t: reference.attention_transfer(s, t, 2, "code", 1e-12).sum()).results()


def _elements(options: Mapping[str, Any]) -> int:
    return sum(math.prod(shape) for shape in options["maps"])


OPERATION = Operation(
    name="attention_transfer",
    title="Attention transfer of three taps, forward and backward",
    cases=[
        Case(
            "128x64x32x32, 128x128x16x16, 128x256x8x8",
            {"maps": [(128, 64, 32, 32), (128, 128, 16, 16), (128, 256, 8, 8)]},
        ),
        Case("4x8x8x8, 4x16x4x4", {"maps": [(4, 8, 8, 8), (4, 16, 4, 4)]}, small=True),
    ],
    providers=[
        *hyperfast_providers(lambda inputs: _work(inputs, _fused)),
        Provider("eager (RepDistiller's form)", lambda inputs: _work(inputs, repdistiller.attention_loss)),
        Provider(
            "torch.compile",
            lambda inputs: _work(inputs, torch.compile(repdistiller.attention_loss, fullgraph=True)),
            prepare=prepare_compiler,
        ),
    ],
    inputs=make_inputs,
    truth=truth,
    # Both maps are read and the student's gradient is written: what is possible where a sample stays in the cache.
    traffic=lambda options: 3 * 4 * _elements(options),
    # Squares and channel sums of both maps, then the student's map times its coefficient.
    flops=lambda options: 5 * _elements(options),
    tests="tests/ops/test_attention_transfer.py",
    gpu_tests="attention_transfer",
    tolerance=1e-5,
)
