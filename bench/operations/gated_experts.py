"""The part of an inherited convolution behind its projection: gates, mixed heads, and their backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from registry import Case, Operation, Provider, Work, drawing, hyperfast_providers, prepare_compiler
from torch import Tensor

from hyperfast import functional, reference


@dataclass(frozen=True)
class Inputs:
    """z `[B, r, H, W]`, experts `[heads, m, r]`, gate weight and bias, and the gradient by the output."""

    z: Tensor
    experts: Tensor
    gate_weight: Tensor
    gate_bias: Tensor
    d_output: Tensor


# (z, experts, gate weight, gate bias) -> output
Experts = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def make_inputs(options: Mapping[str, Any], device: torch.device, seed: int) -> Inputs:
    """Normal numbers, scaled as the layer scales them."""
    batch, rank, outputs, side, heads = (options[name] for name in ("batch", "rank", "outputs", "side", "heads"))
    with drawing(seed):
        return Inputs(
            torch.randn(batch, rank, side, side, device=device),
            torch.randn(heads, outputs, rank, device=device) / math.sqrt(rank),
            torch.randn(heads, rank, device=device),
            torch.randn(heads, device=device),
            torch.randn(batch, outputs, side, side, device=device),
        )


def _work(experts: Experts) -> Callable[[Inputs], Work]:
    def make(inputs: Inputs) -> Work:
        *tensors, d_output = (getattr(inputs, name) for name in inputs.__dataclass_fields__)
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]

        def step() -> Tensor:
            for leaf in leaves:
                leaf.grad = None
            output = experts(*leaves)
            output.backward(d_output)
            return output

        def results() -> dict[str, Tensor]:
            output = step().detach()
            names = ("d_z", "d_experts", "d_gate_weight", "d_gate_bias")
            found = {name: leaf.grad for name, leaf in zip(names, leaves, strict=True) if leaf.grad is not None}
            return {"output": output, **found}

        return Work(step, results)

    return make


def _fused(z: Tensor, experts: Tensor, gate_weight: Tensor, gate_bias: Tensor) -> Tensor:
    return functional.gated_experts(z, experts, None, gate_weight, gate_bias)[0]


def _reference(z: Tensor, experts: Tensor, gate_weight: Tensor, gate_bias: Tensor) -> Tensor:
    return reference.gated_experts(z, experts, None, gate_weight, gate_bias)[0]


def _stacked(z: Tensor, experts: Tensor, gate_weight: Tensor, gate_bias: Tensor) -> Tensor:
    """One 1x1 convolution per head, stacked and summed under the gates, as the authors' demo has it."""
    gates = F.linear(z.mean((2, 3)), gate_weight, gate_bias).softmax(1)
    outputs = torch.stack([F.conv2d(z, expert[:, :, None, None]) for expert in experts], dim=-1)
    return (outputs * gates[:, None, None, None, :]).sum(-1)


def truth(inputs: Inputs) -> dict[str, Tensor]:
    """The reference in float64."""
    return _work(_reference)(Inputs(*(tensor.double() for tensor in astuple(inputs)))).results()


def _flops(options: Mapping[str, Any]) -> int:
    """Of the three products with the mixed expert, and of mixing."""
    positions = options["side"] ** 2
    matrix = options["outputs"] * options["rank"]
    return int(2 * options["batch"] * matrix * (3 * positions + 4 * options["heads"]))


def _traffic(options: Mapping[str, Any]) -> int:
    """z is read twice and its gradient written, the output written and its gradient read."""
    return int(4 * options["batch"] * options["side"] ** 2 * (3 * options["rank"] + 2 * options["outputs"]))


def _case(name: str, small: bool = False, **options: int) -> Case:
    return Case(name, {"heads": 3, "batch": 128, **options}, small=small)


OPERATION = Operation(
    name="gated_experts",
    title="Three gated heads behind a projection (InherNet), forward and backward",
    cases=[
        _case("16 channels, 32x32, r=8", outputs=16, side=32, rank=8),
        _case("32 channels, 16x16, r=16", outputs=32, side=16, rank=16),
        _case("64 channels, 8x8, r=16", outputs=64, side=8, rank=16),
        _case("8 channels, 4x4, r=4", small=True, batch=4, outputs=8, side=4, rank=4),
    ],
    providers=[
        *hyperfast_providers(_work(_fused))[:1],
        Provider("eager (a convolution per head)", _work(_stacked)),
        Provider("eager (mixed experts)", _work(_reference)),
        Provider(
            "torch.compile",
            lambda inputs: _work(torch.compile(_reference, fullgraph=True))(inputs),
            prepare=prepare_compiler,
        ),
    ],
    inputs=make_inputs,
    truth=truth,
    traffic=_traffic,
    flops=_flops,
    tests="tests/ops/test_gated_experts.py",
    gpu_tests="gated_experts",
    tolerance=1e-5,
)
