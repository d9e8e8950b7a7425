"""Complementary distillation of logits, forward and backward to the student's logits and the sub-logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from registry import Case, Operation, Provider, Work, drawing, hyperfast_providers, prepare_compiler
from torch import Tensor

from hyperfast import functional, reference
from hyperfast.functional.sub_logit_distillation import WEIGHTS

_SMOOTHING, _THETA = 0.1, 0.5


@dataclass(frozen=True)
class Inputs:
    """Logits `[B, C]` of the student and the teacher, sub-logits `[B, S, K, C]`, labels and the four weights."""

    student: Tensor
    teacher: Tensor
    sub_logits: Tensor
    labels: Tensor
    weights: Tensor


def make_inputs(options: Mapping[str, Any], device: torch.device, seed: int) -> Inputs:
    """Logits of trained networks: spread by a few units."""
    rows, stages, count, classes = (options[name] for name in ("rows", "stages", "count", "classes"))
    with drawing(seed):
        student, teacher = (3 * torch.randn(rows, classes, device=device) for _ in range(2))
        sub_logits = 2 * torch.randn(rows, stages, count, classes, device=device)
        labels = torch.randint(classes, (rows,), device=device)
        return Inputs(student, teacher, sub_logits, labels, torch.tensor(WEIGHTS, device=device))


def _work(inputs: Inputs, loss: Callable[..., Tensor]) -> Work:
    student, sub_logits = (x.detach().requires_grad_() for x in (inputs.student, inputs.sub_logits))

    def step() -> Tensor:
        student.grad = sub_logits.grad = None
        total = loss(student, inputs.teacher, sub_logits, inputs.labels, inputs.weights)
        total.backward()
        return total

    def results() -> dict[str, Tensor]:
        total = step().detach()
        assert student.grad is not None and sub_logits.grad is not None
        return {"loss": total, "d_student": student.grad, "d_sub_logits": sub_logits.grad}

    return Work(step, results)


def _loops(student: Tensor, teacher: Tensor, sub_logits: Tensor, labels: Tensor, _weights: Tensor) -> Tensor:
    """As it is written down: stage by stage, sub-logit by sub-logit, pair by pair."""
    gt, kd, sdd, ol = WEIGHTS
    stages, count = sub_logits.shape[1:3]
    keep = F.one_hot(labels, student.shape[1]) == 0
    log_p = F.log_softmax(student, 1)
    total = gt * F.cross_entropy(student, labels, label_smoothing=_SMOOTHING)
    total = total + kd * F.kl_div(log_p, F.softmax(teacher, 1), reduction="batchmean")
    for i in range(stages):
        fused = [sub_logits[:, i, j] + teacher for j in range(count)]
        for f in fused:
            total = total + gt / count * F.cross_entropy(f, labels, label_smoothing=_SMOOTHING)
            total = total + sdd / count * F.kl_div(log_p, F.softmax(f, 1), reduction="batchmean")
        rows = [F.normalize(f * keep, dim=1) for f in fused]
        apart = torch.zeros((), device=student.device)
        for j in range(count):
            for k in range(count):
                if j != k:
                    apart = apart + F.relu((rows[j] * rows[k]).sum(1) - _THETA).square().mean()
        total = total + ol * apart / (count * (count - 1))
    return total


def _vectorised(student: Tensor, teacher: Tensor, sub_logits: Tensor, labels: Tensor, _weights: Tensor) -> Tensor:
    """All stages and sub-logits at once."""
    gt, kd, sdd, ol = WEIGHTS
    rows, stages, count, classes = sub_logits.shape
    fused = sub_logits + teacher[:, None, None]
    log_p = F.log_softmax(student, 1)
    repeated = labels[:, None, None].expand(rows, stages, count).reshape(-1)
    hard = F.cross_entropy(fused.view(-1, classes), repeated, label_smoothing=_SMOOTHING) * stages
    total = gt * (F.cross_entropy(student, labels, label_smoothing=_SMOOTHING) + hard)
    total = total + kd * F.kl_div(log_p, F.softmax(teacher, 1), reduction="batchmean")
    log_q = F.log_softmax(fused, 3)
    distance = F.kl_div(log_p[:, None, None], log_q, reduction="sum", log_target=True)
    total = total + sdd * distance / (rows * count)
    unit = F.normalize(fused * (F.one_hot(labels, classes) == 0)[:, None, None], dim=3)
    over = F.relu(unit @ unit.transpose(2, 3) - _THETA).square()
    apart = over.sum() - over.diagonal(dim1=2, dim2=3).sum()
    return total + ol * apart / (rows * count * (count - 1))


def _fused(inputs: Inputs) -> Work:
    return _work(inputs, lambda *given: functional.sub_logit_distillation(*given).total)


def truth(inputs: Inputs) -> dict[str, Tensor]:
    """The reference in float64."""
    doubles = [x.double() for x in (inputs.student, inputs.teacher, inputs.sub_logits)]

    def loss(*given: Tensor) -> Tensor:
        return reference.sub_logit_distillation(*given, _SMOOTHING, 1.0, 1.0, 1.0, _THETA, False, True, False)[0]

    return _work(Inputs(*doubles, inputs.labels, inputs.weights.double()), loss).results()


def _elements(options: Mapping[str, Any]) -> int:
    elements: int = options["rows"] * options["classes"]
    return elements


def _case(name: str, rows: int, classes: int, stages: int = 4, count: int = 4, **more: bool) -> Case:
    return Case(name, {"rows": rows, "classes": classes, "stages": stages, "count": count}, **more)


OPERATION = Operation(
    name="sub_logit_distillation",
    title="Complementary distillation of logits, forward and backward",
    cases=[
        _case("128 x 100, 4 x 4 sub-logits", 128, 100),
        _case("8 x 10, 2 x 3 sub-logits", 8, 10, 2, 3, small=True),
    ],
    providers=[
        *hyperfast_providers(_fused)[:1],
        Provider("eager, loops", lambda inputs: _work(inputs, _loops)),
        Provider("eager, vectorised", lambda inputs: _work(inputs, _vectorised)),
        Provider(
            "torch.compile",
            lambda inputs: _work(inputs, torch.compile(_vectorised, fullgraph=True)),
            prepare=prepare_compiler,
        ),
    ],
    inputs=make_inputs,
    truth=truth,
    # Logits of both networks and the sub-logits are read; two gradients are written.
    traffic=lambda options: 4 * _elements(options) * (3 + 2 * options["stages"] * options["count"]),
    # About 40 for each element of a sub-logit, and the products of a stage's pairs.
    flops=lambda options: _elements(options) * options["stages"] * options["count"] * (40 + 2 * options["count"]),
    tests="tests/ops/test_sub_logit_distillation.py",
    gpu_tests="sub_logit_distillation",
    tolerance=1e-5,
)
