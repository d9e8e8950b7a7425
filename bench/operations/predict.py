"""A reconstruction step of a predictor of ResNet-20's kernels: the RMSE of all rows, gradients from a batch of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from registry import Case, Operation, Provider, Work, drawing, hyperfast_providers, prepare_compiler
from torch import Tensor

from hyperfast import functional, reference
from operations.shapes import resnet

_LEVELS = 40
_LAYERS = 5
_OUTPUTS = 9
_CHUNK = 4096  # rows of one call in NeRN


@dataclass(frozen=True)
class Inputs:
    """Tables, integer coordinates, layers, and the kernels to reconstruct; `rows` is the batch, None all rows."""

    embeddings: list[Tensor]
    indices: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    targets: Tensor
    rows: Tensor | None
    rmse: bool  # of all rows, beside the gradients of the batch
    precision: str


def _layers(depth: int) -> list[tuple[int, int]]:
    """Filters and channels of the 3x3 convolutions, those that NeRN covers with parameter-free shortcuts."""
    return [(shape[0], shape[1]) for shape in resnet(depth).values() if shape[2:] == (3, 3)]


def make_inputs(options: Mapping[str, Any], device: torch.device, seed: int) -> Inputs:
    """A predictor as PyTorch initialises linear layers, and random kernels as large as trained ones."""
    layers, hidden = _layers(options["depth"]), options["hidden"]
    counts = (len(layers), max(f for f, _ in layers), max(c for _, c in layers))
    ranges = [(torch.tensor([i]), torch.arange(f), torch.arange(c)) for i, (f, c) in enumerate(layers)]
    indices = torch.cat([torch.cartesian_prod(*r) for r in ranges]).to(device)
    embeddings = [functional.positional_embedding(count, 0.76, _LEVELS).to(device) for count in counts]
    sizes = [2 * _LEVELS * len(counts), *[hidden] * (_LAYERS - 1), _OUTPUTS]
    with drawing(seed):
        linear = [torch.nn.Linear(a, b, device=device) for a, b in itertools.pairwise(sizes)]
        targets = 0.05 * torch.randn(len(indices), _OUTPUTS, device=device)
        batch = options["batch"]
        rows = None if batch is None else torch.randperm(len(indices), device=device)[:batch]
    weights, biases = [m.weight.detach() for m in linear], [m.bias.detach() for m in linear]
    return Inputs(embeddings, indices, weights, biases, targets, rows, options["rmse"], options["precision"])


# (inputs, weights, biases) -> squared error of the batch, with a gradient, and of all rows or None.
Errors = Callable[[Inputs, list[Tensor], list[Tensor]], tuple[Tensor, Tensor | None]]


def _work(inputs: Inputs, errors: Errors) -> Work:
    weights, biases = ([p.detach().clone().requires_grad_() for p in g] for g in (inputs.weights, inputs.biases))
    parameters = [*weights, *biases]
    count = inputs.targets.numel()

    def step() -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        batch, everything = errors(inputs, weights, biases)
        loss = ((batch.detach() if everything is None else everything) / count).sqrt()
        # d sqrt(E / P) = dE / (2 P sqrt(E / P))
        (batch / (2 * count * loss)).backward()
        return loss

    def results() -> dict[str, Tensor]:
        found = {"loss": step().detach()}
        names = [f"{kind}{i}" for kind in ("d_weight", "d_bias") for i in range(_LAYERS)]
        return found | {n: p.grad for n, p in zip(names, parameters, strict=True) if p.grad is not None}

    return Work(step, results)


def _fused(inputs: Inputs, weights: list[Tensor], biases: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    arguments = (inputs.embeddings, inputs.indices, weights, biases, inputs.targets)
    everything = None
    if inputs.rmse:
        with torch.no_grad():
            everything = functional.squared_error(*arguments, precision=inputs.precision)
    return functional.squared_error(*arguments, rows=inputs.rows, precision=inputs.precision), everything


def _nern(inputs: Inputs) -> Work:
    """NeRN's form: the embedding of every row in memory, all rows predicted in chunks, those of the batch with grad."""
    embedding = torch.cat([e[inputs.indices[:, j]] for j, e in enumerate(inputs.embeddings)], 1)

    def network(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            x = F.relu(F.linear(x, weight, bias))
        return F.linear(x, weights[-1], biases[-1])

    def errors(inputs: Inputs, weights: list[Tensor], biases: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        chunks, targets = embedding, inputs.targets
        everything = None
        if inputs.rmse:
            with torch.no_grad():
                predicted = torch.vstack([network(x, weights, biases) for x in chunks.split(_CHUNK)])
                everything = (predicted - targets).square().sum()
        rows = slice(None) if inputs.rows is None else inputs.rows
        predicted = torch.vstack([network(x, weights, biases) for x in embedding[rows].split(_CHUNK)])
        return (predicted - targets[rows]).square().sum(), everything

    return _work(inputs, errors)


def _compiled(inputs: Inputs) -> Work:
    error = torch.compile(reference.squared_error, fullgraph=True)

    def errors(inputs: Inputs, weights: list[Tensor], biases: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        network = (inputs.embeddings, inputs.indices, weights, biases, inputs.targets, None)
        options = ("concat", "relu", "fp32")
        everything = None
        if inputs.rmse:
            with torch.no_grad():
                everything = error(*network, None, *options)
        return error(*network, inputs.rows, *options), everything

    return _work(inputs, errors)


def truth(inputs: Inputs) -> dict[str, Tensor]:
    """The reference in float64."""
    groups = (inputs.embeddings, inputs.weights, inputs.biases)
    embeddings, weights, biases = ([t.double() for t in group] for group in groups)
    targets = inputs.targets.double()
    doubles = Inputs(embeddings, inputs.indices, weights, biases, targets, inputs.rows, inputs.rmse, "fp32")

    def errors(inputs: Inputs, weights: list[Tensor], biases: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        network = (inputs.embeddings, inputs.indices, weights, biases, inputs.targets, None)
        options = ("concat", "relu", "fp32")
        everything = reference.squared_error(*network, None, *options).detach() if inputs.rmse else None
        return reference.squared_error(*network, inputs.rows, *options), everything

    return _work(doubles, errors).results()


def _flops(options: Mapping[str, Any]) -> int:
    """Of the hidden layers and the last, whose backward is two products as large; tables are next to nothing."""
    rows, hidden = sum(f * c for f, c in _layers(options["depth"])), options["hidden"]
    per_row = 2 * ((_LAYERS - 2) * hidden * hidden + _OUTPUTS * hidden)
    return per_row * (3 * (options["batch"] or rows) + (rows if options["rmse"] else 0))


def _case(name: str, hidden: int, batch: int | None, rmse: bool, precision: str = "fp32", small: bool = False) -> Case:
    options = {"depth": 20, "hidden": hidden, "batch": batch, "rmse": rmse, "precision": precision}
    return Case(name, options, small)


OPERATION = Operation(
    name="predict",
    title="Reconstruction step of a predictor of ResNet-20's 29,744 kernels",
    cases=[
        _case("h=140, 4096 rows", 140, 4096, rmse=False),
        _case("h=140, 4096 rows, RMSE of all", 140, 4096, rmse=True),
        _case("h=140, all rows", 140, None, rmse=False),
        _case("h=300, 4096 rows", 300, 4096, rmse=False),
        _case("h=140, 4096 rows, bf16", 140, 4096, rmse=False, precision="bf16"),
        _case("h=140, all rows, bf16", 140, None, rmse=False, precision="bf16"),
        _case("h=16, 256 rows", 16, 256, rmse=True, small=True),
    ],
    providers=[
        *hyperfast_providers(lambda inputs: _work(inputs, _fused)),
        Provider("eager (NeRN's form)", _nern),
        Provider("torch.compile", _compiled, prepare=prepare_compiler),
    ],
    inputs=make_inputs,
    truth=truth,
    traffic=lambda options: 0,  # everything but the targets stays in the caches
    flops=_flops,
    tests="tests/ops/test_predict.py",
    gpu_tests="predict",
    tolerance=3e-2,  # of bfloat16 products
)
