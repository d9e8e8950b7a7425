"""All weights of a network from one condition, forward and backward.

Every provider turns a condition into the same named tensors and receives the same dense gradient g_k for each of them:
the backward of sum_k <theta_k, g_k> without the passes that computing this sum would add. Gradients go to all
parameters of the hypernetwork; they are None when a step begins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peers import hyperlight_adapter
from registry import Case, Operation, Provider, Work, drawing, hyperfast_providers, needs, prepare_compiler
from torch import Tensor

from hyperfast import functional, reference
from operations import shapes

_STYLE = ("cos|sin", "leaky_relu", 0.01)


@dataclass(frozen=True)
class Inputs:
    """Parameters of a hypernetwork and the gradients of the tensors it generates."""

    shapes: Mapping[str, tuple[int, ...]]
    condition: Tensor
    trunk_weights: list[Tensor]
    trunk_biases: list[Tensor]
    head: Tensor
    theta0: Tensor
    gradients: list[Tensor]


def size(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Numbers of weights together."""
    return sum(math.prod(shape) for shape in shapes.values())


def make_inputs(options: Mapping[str, Any], device: torch.device, seed: int) -> Inputs:
    """Random parameters of the usual sizes: Kaiming trunk, head and theta0 of standard deviation 0.05."""
    widths: Sequence[int] = options["widths"]
    total = size(options["shapes"])
    with drawing(seed):
        sizes = [2, *widths]
        trunk = [
            torch.randn(out, width, device=device) * (2 / out) ** 0.5
            for width, out in zip(sizes[:-1], widths, strict=True)
        ]
        return Inputs(
            options["shapes"],
            torch.rand(1, device=device),
            trunk,
            [torch.randn(out, device=device) * 0.01 for out in widths],
            torch.randn(total, widths[-1], device=device).mul_(0.05),
            torch.randn(total, device=device) * 0.05,
            [torch.randn(shape, device=device) for shape in options["shapes"].values()],
        )


def _work(parameters: Mapping[str, Tensor], forward: Callable[[], Sequence[Tensor]], gradients: list[Tensor]) -> Work:
    def step() -> Sequence[Tensor]:
        for parameter in parameters.values():
            parameter.grad = None
        tensors = forward()
        torch.autograd.backward(tensors, gradients)
        return tensors

    def results() -> dict[str, Tensor]:
        tensors = step()
        found = {"theta": torch.cat([tensor.detach().flatten() for tensor in tensors])}
        for name, parameter in parameters.items():
            assert parameter.grad is not None, f"no gradient for {name}"
            found[f"d_{name}"] = parameter.grad
        return found

    return Work(step, results)


def _leaves(inputs: Inputs) -> dict[str, Tensor]:
    named = {"head": inputs.head, "theta0": inputs.theta0}
    for level, (weight, bias) in enumerate(zip(inputs.trunk_weights, inputs.trunk_biases, strict=True)):
        named |= {f"weight{level}": weight, f"bias{level}": bias}
    return {name: tensor.detach().requires_grad_() for name, tensor in named.items()}


def _functional(inputs: Inputs, generate: Callable[..., Tensor], compiled: bool = False) -> Work:
    parameters = _leaves(inputs)
    levels = range(len(inputs.trunk_weights))
    weights = [parameters[f"weight{level}"] for level in levels]
    biases = [parameters[f"bias{level}"] for level in levels]
    sizes = [math.prod(shape) for shape in inputs.shapes.values()]
    views = list(inputs.shapes.values())

    def forward(
        condition: Tensor, weights: list[Tensor], biases: list[Tensor], head: Tensor, theta0: Tensor
    ) -> list[Tensor]:
        parts = generate(condition, weights, biases, head, theta0).split(sizes)
        return [part.view(shape) for part, shape in zip(parts, views, strict=True)]

    if compiled:
        forward = torch.compile(forward, fullgraph=True)
    head, theta0 = parameters["head"], parameters["theta0"]
    return _work(parameters, lambda: forward(inputs.condition, weights, biases, head, theta0), inputs.gradients)


def _reference(condition: Tensor, weights: Any, biases: Any, head: Tensor, theta0: Tensor) -> Tensor:
    return reference.generate(condition[None, None], weights, biases, head, theta0, None, *_STYLE)[0]


def _hyperlight(inputs: Inputs) -> Work:
    hypernet = hyperlight_adapter.hypernet(
        inputs.shapes, inputs.trunk_weights, inputs.trunk_biases, inputs.head, inputs.theta0
    )
    parameters = hyperlight_adapter.parameters(hypernet)
    return _work(parameters, lambda: list(hypernet(h=inputs.condition).values()), inputs.gradients)


def truth(inputs: Inputs) -> dict[str, Tensor]:
    """The reference in float64."""
    doubles = Inputs(
        inputs.shapes,
        inputs.condition.double(),
        [weight.double() for weight in inputs.trunk_weights],
        [bias.double() for bias in inputs.trunk_biases],
        inputs.head.double(),
        inputs.theta0.double(),
        [gradient.double() for gradient in inputs.gradients],
    )
    return _functional(doubles, _reference).results()


def _traffic(options: Mapping[str, Any]) -> int:
    """Head: read forward, read and its gradient written backward. Vectors [P]: theta0, theta, g and d theta0."""
    width: int = options["widths"][-1]
    return 4 * size(options["shapes"]) * (3 * width + 4)


def _flops(options: Mapping[str, Any]) -> int:
    width: int = options["widths"][-1]
    return 6 * size(options["shapes"]) * width


OPERATION = Operation(
    name="generate",
    title="All weights of a network from one condition, forward and backward",
    cases=[
        Case("ResNet-56, widths 16-64-128", {"shapes": shapes.resnet(56), "widths": (16, 64, 128)}),
        Case("VGG-11-BN, widths 16-16-16", {"shapes": shapes.vgg11_bn(), "widths": (16, 16, 16)}),
        Case("ResNet-8, widths 16-16", {"shapes": shapes.resnet(8, classes=10), "widths": (16, 16)}, small=True),
    ],
    providers=[
        *hyperfast_providers(lambda inputs: _functional(inputs, functional.generate)),
        Provider("HyperLight 0.0.5", _hyperlight, needs("hyperlight"), hyperlight_adapter.prepare),
        Provider("eager", lambda inputs: _functional(inputs, _reference)),
        Provider(
            "torch.compile", lambda inputs: _functional(inputs, _reference, compiled=True), prepare=prepare_compiler
        ),
    ],
    inputs=make_inputs,
    truth=truth,
    traffic=_traffic,
    flops=_flops,
    tests="tests/ops/test_generate.py",
    gpu_tests="generate",
    tolerance=5e-4,  # a sum of ten million products in float32: PyTorch itself is off by 1e-4
)
