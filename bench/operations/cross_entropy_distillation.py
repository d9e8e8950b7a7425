"""Cross-entropy with labels and distillation of a teacher's logits, forward and backward to the student's logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from registry import Case, Operation, Provider, Work, drawing, hyperfast_providers, prepare_compiler
from torch import Tensor

from hyperfast import losses, reference

_TEMPERATURE = 4.0


@dataclass(frozen=True)
class Inputs:
    """Logits `[B, C]` of the student and the teacher, and labels `[B]`."""

    student: Tensor
    teacher: Tensor
    labels: Tensor


def make_inputs(options: Mapping[str, Any], device: torch.device, seed: int) -> Inputs:
    """Logits of trained networks: spread by a few units."""
    rows, classes = options["rows"], options["classes"]
    with drawing(seed):
        student, teacher = (3 * torch.randn(rows, classes, device=device) for _ in range(2))
        return Inputs(student, teacher, torch.randint(classes, (rows,), device=device))


def _work(inputs: Inputs, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Work:
    student = inputs.student.detach().requires_grad_()

    def step() -> Tensor:
        student.grad = None
        total = loss(student, inputs.labels, inputs.teacher)
        total.backward()
        return total

    def results() -> dict[str, Tensor]:
        total = step().detach()
        assert student.grad is not None
        return {"loss": total, "d_student": student.grad}

    return Work(step, results)


def _peers(student: Tensor, labels: Tensor, teacher: Tensor) -> Tensor:
    """As RepDistiller and most repositories write it."""
    p = F.softmax(teacher / _TEMPERATURE, dim=1)
    divergence = F.kl_div(F.log_softmax(student / _TEMPERATURE, dim=1), p, reduction="batchmean")
    return F.cross_entropy(student, labels) + divergence * _TEMPERATURE**2


def _log_target(student: Tensor, labels: Tensor, teacher: Tensor) -> Tensor:
    """The strongest eager form: no logarithm of the teacher's probabilities."""
    log_p = F.log_softmax(teacher / _TEMPERATURE, dim=1)
    log_q = F.log_softmax(student / _TEMPERATURE, dim=1)
    divergence = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return F.cross_entropy(student, labels) + divergence * _TEMPERATURE**2


def _fused(inputs: Inputs) -> Work:
    return _work(inputs, losses.CrossEntropyDistillation(temperature=_TEMPERATURE))


def truth(inputs: Inputs) -> dict[str, Tensor]:
    """The reference in float64."""
    doubles = Inputs(inputs.student.double(), inputs.teacher.double(), inputs.labels)

    def loss(student: Tensor, labels: Tensor, teacher: Tensor) -> Tensor:
        options = (_TEMPERATURE, "kl", 0.0, -100)
        return reference.cross_entropy_distillation(student, teacher, labels, *options).sum()

    return _work(doubles, loss).results()


def _elements(options: Mapping[str, Any]) -> int:
    elements: int = options["rows"] * options["classes"]
    return elements


OPERATION = Operation(
    name="cross_entropy_distillation",
    title="Cross-entropy and logit distillation, forward and backward",
    cases=[
        Case("1024 x 1000", {"rows": 1024, "classes": 1000}),
        Case("128 x 100", {"rows": 128, "classes": 100}),
        Case("128 x 50,257", {"rows": 128, "classes": 50_257}),
        Case("8 x 10", {"rows": 8, "classes": 10}, small=True),
    ],
    providers=[
        *hyperfast_providers(_fused)[:1],
        Provider("eager (RepDistiller's form)", lambda inputs: _work(inputs, _peers)),
        Provider("eager, log_target", lambda inputs: _work(inputs, _log_target)),
        Provider(
            "torch.compile",
            lambda inputs: _work(inputs, torch.compile(_log_target, fullgraph=True)),
            prepare=prepare_compiler,
        ),
    ],
    inputs=make_inputs,
    truth=truth,
    # Both networks' logits are read and the student's gradient is written.
    traffic=lambda options: 3 * 4 * _elements(options),
    # Three exponentials and what surrounds them, once for the losses and once for the gradient.
    flops=lambda options: 2 * 3 * 15 * _elements(options),
    tests="tests/ops/test_cross_entropy_distillation.py",
    gpu_tests="cross_entropy_distillation",
    tolerance=1e-5,
)
