"""A whole training step: a hypernetised CIFAR ResNet learns from labels and from a teacher's attention maps.

Teacher forward, student forward, cross-entropy + 1000 x attention transfer at the three stages, backward, SGD with
momentum over everything that learns: trunk, head, theta0 and the batch norms that stay in the network. Ours updates the
head from the factors of its gradient, as the recipes do; "stored head gradient" is without that. Images lie on the
device, data loading is no part of it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peers import hyperlight_adapter, repdistiller
from registry import Case, Operation, Provider, Work, drawing, hyperfast_providers, needs, on_backend
from torch import Tensor, nn

import hyperfast
from hyperfast import models, surgery
from hyperfast.backends import current_backend

_BETA = 1000.0
_STAGES = ("layer1", "layer2", "layer3")


@dataclass(frozen=True)
class Inputs:
    """A batch, the network before it is hypernetised, its teacher and the hypernetwork's first parameters."""

    model: nn.Module
    teacher: nn.Module
    parameters: Mapping[str, Tensor]
    images: Tensor
    labels: Tensor


def make_inputs(options: Mapping[str, Any], device: torch.device, seed: int) -> Inputs:
    """Random images and networks as they are initialised for training."""
    with drawing(seed):
        model, teacher = (models.create(options["model"]).to(device) for _ in range(2))
        initial = hyperfast.hypernetize(model, hidden=options["hidden"])
        images = torch.randn(options["batch"], 3, options["size"], options["size"], device=device)
        labels = torch.randint(10, (options["batch"],), device=device)
    layout = options["memory_format"]
    return Inputs(
        model.to(memory_format=layout),  # type: ignore[call-overload]
        teacher.eval().to(memory_format=layout),  # type: ignore[call-overload]
        {name: parameter.detach() for name, parameter in _parameters(initial).items()},
        images.contiguous(memory_format=layout),
        labels,
    )


def _parameters(student: hyperfast.Hypernetwork) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {"head": student.head.weight, "theta0": student.theta0}
    for level, layer in enumerate(student.trunk):
        assert isinstance(layer, nn.Linear)
        named |= {f"weight{level}": layer.weight, f"bias{level}": layer.bias}
    return named


def _work(
    losses: Callable[[], tuple[Tensor, Tensor]],
    generator: Mapping[str, Tensor],
    primary: nn.Module,
    factored: hyperfast.Hypernetwork | None = None,
) -> Work:
    """`losses` returns logits and loss; `generator` holds the parameters of the hypernetwork, `factored` or not."""
    kept = list(primary.parameters())
    optimizer = torch.optim.SGD([*generator.values(), *kept], lr=0.01, momentum=0.9, fused=True)
    if factored is not None:
        hyperfast.optim.factor_head(factored, optimizer)

    def forward_backward() -> tuple[Tensor, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        logits, loss = losses()
        loss.backward()
        return logits, loss

    def step() -> Tensor:
        loss = forward_backward()[1]
        optimizer.step()
        return loss

    def results() -> dict[str, Tensor]:
        logits, loss = forward_backward()
        gradients = {f"d_{name}": parameter.grad for name, parameter in generator.items()}
        if factored is not None and factored.theta0.grad is not None:
            h = factored.features(factored.condition.typical())
            gradients["d_head"] = torch.outer(factored.theta0.grad, h[0].detach())
        gradients["d_norm"] = torch.cat([p.grad.flatten() for p in kept if p.grad is not None])
        found = {"logits": logits.detach(), "loss": loss.detach()}
        return found | {name: gradient for name, gradient in gradients.items() if gradient is not None}

    return Work(step, results)


def _factored(inputs: Inputs) -> Work:
    # The update of the head has no Triton kernel.
    return _hyperfast(inputs, factored=current_backend() is not hyperfast.Backend.TRITON)


def _hyperfast(inputs: Inputs, factored: bool) -> Work:
    student = hyperfast.hypernetize(inputs.model, hidden=_hidden(inputs))
    generator = _parameters(student)
    with torch.no_grad():
        for name, parameter in generator.items():
            parameter.copy_(inputs.parameters[name])
    attention = hyperfast.losses.AttentionTransfer(weights=[1.0] * len(_STAGES), beta=_BETA)
    teacher = surgery.freeze(inputs.teacher, keep=_STAGES)  # what the distillation recipe does
    opened = hyperfast.taps(student, teacher, at=_STAGES)
    taps = opened.__enter__()

    # Bound here, the taps stay open as long as the step can be called.
    def losses(_opened: contextlib.AbstractContextManager[Any] = opened) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            teacher(inputs.images)
        logits = student(inputs.images)
        loss = F.cross_entropy(logits, inputs.labels) + attention(taps.student, taps.teacher)
        return logits, loss

    return _work(losses, generator, student.primary, student if factored else None)


def _hidden(inputs: Inputs) -> list[int]:
    levels = sum(name.startswith("bias") for name in inputs.parameters)
    return [inputs.parameters[f"bias{level}"].numel() for level in range(levels)]


def _hyperlight(inputs: Inputs) -> Work:
    student = hyperlight_adapter.hypernetize(copy.deepcopy(inputs.model), (nn.Conv2d, nn.Linear))
    values = {name: tensor.clone() for name, tensor in inputs.parameters.items()}
    levels = range(len(_hidden(inputs)))
    hypernet = hyperlight_adapter.hypernet(
        student.external_shapes(),
        [values[f"weight{level}"] for level in levels],
        [values[f"bias{level}"] for level in levels],
        values["head"],
        values["theta0"],
    ).to(inputs.images.device)
    teacher = copy.deepcopy(inputs.teacher)
    student_maps, teacher_maps = _hooked(student), _hooked(teacher)
    condition = torch.full((1,), 0.5, device=inputs.images.device, dtype=inputs.images.dtype)

    def losses() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            teacher(inputs.images)
        with student.using_externals(hypernet(h=condition)):
            logits = student(inputs.images)
        attention = repdistiller.attention_loss(
            [student_maps[stage] for stage in _STAGES], [teacher_maps[stage] for stage in _STAGES]
        )
        return logits, F.cross_entropy(logits, inputs.labels) + _BETA * attention

    return _work(losses, hyperlight_adapter.parameters(hypernet), student)


def _hooked(model: nn.Module) -> dict[str, Tensor]:
    """A dict that holds the stages' outputs of the last forward."""
    maps: dict[str, Tensor] = {}
    for stage in _STAGES:

        def keep(_module: nn.Module, _args: object, output: Tensor, stage: str = stage) -> None:
            maps[stage] = output

        model.get_submodule(stage).register_forward_hook(keep)
    return maps


def truth(inputs: Inputs) -> dict[str, Tensor]:
    """The hypernetised network on the reference operations, all in float64."""
    doubles = Inputs(
        copy.deepcopy(inputs.model).double(),
        copy.deepcopy(inputs.teacher).double(),
        {name: tensor.double() for name, tensor in inputs.parameters.items()},
        inputs.images.double(),
        inputs.labels,
    )
    return on_backend(_factored, doubles, hyperfast.Backend.REFERENCE).results()


def _flops(options: Mapping[str, Any]) -> int:
    """Teacher forward and three times the student's; convolutions and the classifier only."""
    multiplications = options["multiplications"] * (options["size"] / 32) ** 2
    return int(2 * 4 * options["batch"] * multiplications)


_RESNET_20 = {
    "model": "resnet20",
    "hidden": (16, 64, 128),
    "batch": 128,
    "size": 32,
    "multiplications": 40_551_040,
    "memory_format": torch.contiguous_format,
}

OPERATION = Operation(
    name="training_step",
    title="Training step of a hypernetised network with attention transfer",
    cases=[
        Case("CIFAR ResNet-20, widths 16-64-128, batch 128", _RESNET_20),
        Case(
            "CIFAR ResNet-20, widths 16-64-128, batch 128, channels-last",
            {**_RESNET_20, "memory_format": torch.channels_last},
        ),
        Case(
            "ResNet-8 on 16x16, widths 16-16, batch 8",
            {
                "model": "resnet8",
                "hidden": (16, 16),
                "batch": 8,
                "size": 16,
                "multiplications": 3_170_624,
                "memory_format": torch.contiguous_format,
            },
            small=True,
        ),
    ],
    providers=[
        *hyperfast_providers(_factored),
        Provider("hyperfast, stored head gradient", lambda inputs: _hyperfast(inputs, factored=False)),
        Provider("HyperLight 0.0.5 + eager AT", _hyperlight, needs("hyperlight"), hyperlight_adapter.prepare),
        Provider(
            "hyperfast on plain PyTorch",
            lambda inputs: on_backend(_factored, inputs, hyperfast.Backend.REFERENCE),
        ),
    ],
    inputs=make_inputs,
    truth=truth,
    traffic=lambda _options: 0,  # convolutions dominate: a count of bytes would say nothing
    flops=_flops,
    tests="tests/nn/test_hypernetwork.py",
    gpu_tests="generate or attention_transfer",
    tolerance=1e-2,  # float32 through a network of ReLUs: one that flips changes its gradient
)
