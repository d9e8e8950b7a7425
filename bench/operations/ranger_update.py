"""A step of Ranger over the parameters of a predictor of weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from registry import Case, Operation, Provider, Work, drawing, hyperfast_providers, prepare_compiler
from torch import Tensor, nn

from hyperfast import reference
from hyperfast.optim import Ranger

_LR, _BETAS, _EPS, _DECAY, _K, _ALPHA = 5e-3, (0.5, 0.999), 1e-5, 1e-3, 6, 0.5
_STEPS = 12  # of `results`: with and without rectification, and twice Lookahead
Step = Callable[[], object]


@dataclass(frozen=True)
class Inputs:
    """Parameters before the first step, and the gradients of every one."""

    parameters: list[Tensor]
    gradients: list[Tensor]


def make_inputs(options: Mapping[str, Any], device: torch.device, seed: int) -> Inputs:
    """Gradients are as small as a predictor's."""
    with drawing(seed):
        parameters = [torch.randn(shape, device=device) / shape[-1] ** 0.5 for shape in _shapes(options)]
        gradients = [1e-5 * torch.randn(shape, device=device) for shape in _shapes(options)]
    return Inputs(parameters, gradients)


def _shapes(options: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Five layers: 3 h^2 + 253 h + 9 numbers."""
    h = options["hidden"]
    outputs = [h, h, h, h, 9]
    return [shape for out, into in zip(outputs, [240, h, h, h, h], strict=True) for shape in ((out, into), (out,))]


def _work(build: Callable[[list[nn.Parameter]], Step]) -> Callable[[Inputs], Work]:
    """`build` sets an optimiser up on parameters that have gradients, and returns its step."""

    def fresh(inputs: Inputs) -> tuple[list[nn.Parameter], Step]:
        parameters = [nn.Parameter(p.clone()) for p in inputs.parameters]
        for p, gradient in zip(parameters, inputs.gradients, strict=True):
            p.grad = gradient.clone()
        return parameters, build(parameters)

    def make(inputs: Inputs) -> Work:
        parameters, move = fresh(inputs)

        def step() -> Sequence[Tensor]:
            move()
            return [p.detach() for p in parameters]

        def results() -> dict[str, Tensor]:
            moved, again = fresh(inputs)
            for _ in range(_STEPS):
                again()
            return {f"parameter{index}": p.detach() for index, p in enumerate(moved)}

        return Work(step, results)

    return make


def _fused(parameters: list[nn.Parameter]) -> Step:
    # A step outside a graph runs as well with the rate in a tensor; in one it has to.
    return Ranger(parameters, lr=_LR, capturable=parameters[0].is_cuda).step


def _per_tensor(parameters: list[nn.Parameter]) -> Step:
    """About ten kernels for every tensor, and the number of the step in Python."""
    slow = [p.detach().clone() for p in parameters]
    exp_avg = [torch.zeros_like(p) for p in parameters]
    exp_avg_sq = [torch.zeros_like(p) for p in parameters]
    count = 0
    most = 2 / (1 - _BETAS[1]) - 1

    @torch.no_grad()
    def step() -> None:
        nonlocal count
        count += 1
        power = _BETAS[1] ** count
        rho = most - 2 * count * power / (1 - power)
        rate = _LR / (1 - _BETAS[0] ** count)
        if rho > 5:
            rate *= math.sqrt((1 - power) * (rho - 4) / (most - 4) * (rho - 2) / rho * most / (most - 2))
        for p, s, m, v in zip(parameters, slow, exp_avg, exp_avg_sq, strict=True):
            g = p.grad
            assert g is not None
            if g.ndim > 1:
                g = g - g.mean(dim=tuple(range(1, g.ndim)), keepdim=True)
            v.mul_(_BETAS[1]).addcmul_(g, g, value=1 - _BETAS[1])
            m.mul_(_BETAS[0]).add_(g, alpha=1 - _BETAS[0])
            p.add_(p, alpha=-_DECAY * _LR)
            if rho > 5:
                p.addcdiv_(m, v.sqrt().add_(_EPS), value=-rate)
            else:
                p.add_(m, alpha=-rate)
            if count % _K == 0:
                s.add_(p - s, alpha=_ALPHA)
                p.copy_(s)

    return step


def _foreach(parameters: list[nn.Parameter]) -> Step:
    """torch's own RAdam over all tensors at once, with centralisation before and Lookahead after it."""
    optimizer = torch.optim.RAdam(
        parameters, lr=_LR, betas=_BETAS, eps=_EPS, weight_decay=_DECAY, decoupled_weight_decay=True, foreach=True
    )
    gradients = [p.grad for p in parameters]
    slow = [p.detach().clone() for p in parameters]
    count = 0

    @torch.no_grad()
    def step() -> None:
        nonlocal count
        count += 1
        for p, g in zip(parameters, gradients, strict=True):
            assert g is not None
            p.grad = g - g.mean(dim=1, keepdim=True) if g.ndim > 1 else g
        optimizer.step()
        if count % _K == 0:
            torch._foreach_lerp_(slow, parameters, _ALPHA)
            torch._foreach_copy_(parameters, slow)

    return step


def _reference(compiled: bool) -> Callable[[list[nn.Parameter]], Step]:
    update = torch.compile(reference.ranger_update, fullgraph=True) if compiled else reference.ranger_update

    def build(parameters: list[nn.Parameter]) -> Step:
        values = [p.detach() for p in parameters]
        state = ([torch.zeros_like(p) for p in values] for _ in range(2))
        steps = [torch.zeros((), device=p.device) for p in values]
        lr = torch.tensor(_LR, dtype=torch.float64, device=values[0].device)
        arguments = (values, [p.grad for p in parameters], *state, [p.clone() for p in values], steps, lr)
        return lambda: update(*arguments, *_BETAS, _EPS, _DECAY, _K, _ALPHA, True)

    return build


def truth(inputs: Inputs) -> dict[str, Tensor]:
    """The reference in float64."""
    doubles = Inputs([p.double() for p in inputs.parameters], [g.double() for g in inputs.gradients])
    return _work(_reference(compiled=False))(doubles).results()


def _elements(options: Mapping[str, Any]) -> int:
    return sum(math.prod(shape) for shape in _shapes(options))


OPERATION = Operation(
    name="ranger_update",
    title="A step of Ranger over the parameters of a predictor",
    cases=[
        Case("predictor, h=140", {"hidden": 140}),
        Case("predictor, h=1024", {"hidden": 1024}),
        Case("predictor, h=16", {"hidden": 16}, small=True),
    ],
    providers=[
        *hyperfast_providers(_work(_fused))[:1],
        Provider("eager (NeRN's form)", _work(_per_tensor)),
        Provider("torch.optim.RAdam(foreach), centralisation, Lookahead", _work(_foreach)),
        Provider("torch.compile", lambda inputs: _work(_reference(compiled=True))(inputs), prepare=prepare_compiler),
    ],
    inputs=make_inputs,
    truth=truth,
    # Parameter and both moments are read and written, the gradient is read; the slow copy in every k-th step.
    traffic=lambda options: 4 * (7 * _K + 2) * _elements(options) // _K,
    # Centralisation 2, moments 7, decay 1, direction 3, update 2.
    flops=lambda options: 15 * _elements(options),
    tests="tests/ops/test_ranger_update.py",
    gpu_tests="ranger",
    tolerance=1e-5,
)
