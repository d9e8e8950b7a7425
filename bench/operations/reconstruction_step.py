"""A whole step of phase 1: rows are drawn, the loss and its gradient, Ranger."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from registry import Case, Operation, Provider, Work, drawing, hyperfast_providers, prepare_compiler
from torch import Tensor, nn

from hyperfast import functional, models, reference, surgery
from hyperfast.nn import WeightPredictor
from hyperfast.recipes import CompressConfig
from hyperfast.recipes.reconstruction import Reconstruction, Targets, new_predictor
from operations import ranger_update

_CHUNK = 4096  # rows of one call in NeRN
_CONFIG = CompressConfig(permutation="identity", min_lr=5e-3, device="cpu")


@dataclass(frozen=True)
class Inputs:
    """A predictor at its start, the network it learns, and the rows that `results` takes instead of drawing some."""

    predictor: WeightPredictor
    state: dict[str, Tensor]
    coverage: surgery.Coverage
    config: CompressConfig
    rows: Tensor

    def targets(self) -> Targets:
        """As the recipe makes them."""
        return Targets.of(self.state, self.coverage, self.config)


def make_inputs(options: Mapping[str, Any], device: torch.device, seed: int) -> Inputs:
    """The kernels of an untrained network."""
    changes = {name: options[name] for name in ("hidden", "batch_rows", "rmse", "precision", "sampling")}
    config = replace(_CONFIG, device=str(device), **changes)
    with drawing(seed):
        network = _network(options["network"])
        coverage = surgery.cover(network, policy="nern")
        rows = torch.randperm(coverage.rows)[: config.batch_rows].to(device)
    return Inputs(new_predictor(coverage, config, seed), dict(network.state_dict()), coverage, config, rows)


def _network(name: str) -> nn.Module:
    """A ResNet-20, or the sixteen 3x3 convolutions of a ResNet-18 for ImageNet, which is all that NeRN covers of it."""
    if name != "resnet18":
        return models.create(name)
    widths = [64] * 5 + [128] * 4 + [256] * 4 + [512] * 4
    pairs = itertools.pairwise(widths)
    return nn.Sequential(*(nn.Conv2d(channels, filters, 3, bias=False) for channels, filters in pairs))


# A step, and what leaves gradients through given rows, or all, and returns the loss.
Built = tuple[Callable[[], Any], Callable[[Tensor | None], Tensor]]


def _work(build: Callable[[Inputs, WeightPredictor], Built]) -> Any:
    def make(inputs: Inputs) -> Work:
        predictor = copy.deepcopy(inputs.predictor)
        move, _ = build(inputs, predictor)

        def step() -> Tensor:
            move()
            return predictor.weights[-1].detach()

        def results() -> dict[str, Tensor]:
            fresh = copy.deepcopy(inputs.predictor)
            loss = build(inputs, fresh)[1](inputs.rows)
            found = {name: p.grad for name, p in fresh.named_parameters() if p.grad is not None}
            return {"loss": loss.detach(), **found}

        return Work(step, results)

    return make


def _fused(inputs: Inputs, predictor: WeightPredictor) -> Built:
    training = Reconstruction(predictor, inputs.targets(), inputs.config, seed=0)
    return training.step, training.gradient


Errors = Callable[[Tensor | None], Tensor]  # rows, or all -> sum of squares


def _plain(
    inputs: Inputs, predictor: WeightPredictor, errors: Errors, update: Callable[[list[nn.Parameter]], Any]
) -> Built:
    """The loss as the recipe has it, whatever computes sums of squares and updates parameters."""
    targets, config = inputs.targets(), inputs.config
    norms, count = targets.rows.norm(dim=1), targets.rows.numel()
    running = targets.rmse(predictor).square()
    move: Callable[[], Any] | None = None

    def gradient(rows: Tensor | None) -> Tensor:
        predictor.zero_grad()
        if rows is None:
            found = (errors(None) / count).sqrt()
            found.backward()
            return found.detach()
        if config.rmse == "full":
            with torch.no_grad():
                loss = (errors(None) / count).sqrt()
        else:
            loss = running.sqrt()
        (errors(rows) / (2 * count * loss)).backward()
        return loss

    def step() -> None:
        nonlocal move
        rows: Tensor | None
        if config.sampling == "all":
            rows = None
        elif torch.rand(()) < config.uniform:
            rows = torch.randperm(len(norms), device=norms.device)[: config.batch_rows]
        else:
            rows = torch.multinomial(norms, config.batch_rows, replacement=True)
        gradient(rows)
        move = move or update(list(predictor.parameters()))
        move()

    return step, gradient


def _nern(inputs: Inputs, predictor: WeightPredictor) -> Built:
    """The embedding of every row in memory, all rows predicted in chunks, those of the batch once more with grad."""
    tables = [table[predictor.indices[:, j]] for j, table in enumerate(predictor.embeddings)]
    embedding, targets = torch.cat(tables, 1), inputs.targets().rows

    def network(x: Tensor) -> Tensor:
        for weight, bias in zip(predictor.weights[:-1], predictor.biases[:-1], strict=True):
            x = F.relu(F.linear(x, weight, bias))
        return F.linear(x, predictor.weights[-1], predictor.biases[-1])

    def errors(rows: Tensor | None) -> Tensor:
        chosen = slice(None) if rows is None else rows
        predicted = torch.vstack([network(x) for x in embedding[chosen].split(_CHUNK)])
        return (predicted - targets[chosen]).square().sum()

    everything = replace(inputs, config=replace(inputs.config, rmse="full"))
    return _plain(everything, predictor, errors, ranger_update._per_tensor)


def _compiled(inputs: Inputs, predictor: WeightPredictor) -> Built:
    """The recipe's own arithmetic in plain PyTorch, through the compiler."""
    error, targets = torch.compile(reference.squared_error, fullgraph=True), inputs.targets().rows

    def errors(rows: Tensor | None) -> Tensor:
        network = (predictor.embeddings, predictor.indices, predictor.weights, predictor.biases)
        found: Tensor = error(*network, targets, None, rows, "concat", "relu", inputs.config.precision)
        return found

    return _plain(inputs, predictor, errors, ranger_update._reference(compiled=True))


def truth(inputs: Inputs) -> dict[str, Tensor]:
    """The reference in float64."""
    double = copy.deepcopy(inputs.predictor).double()
    network = (double.embeddings, double.indices, double.weights, double.biases)
    targets = inputs.targets().rows.double()
    with torch.no_grad():
        everything = functional.squared_error(*network, targets)
    loss = (everything / targets.numel()).sqrt()
    (functional.squared_error(*network, targets, rows=inputs.rows) / (2 * targets.numel() * loss)).backward()
    found = {name: p.grad for name, p in double.named_parameters() if p.grad is not None}
    return {"loss": loss, **found}


def _flops(options: Mapping[str, Any]) -> int:
    """Of the hidden layers and the last, whose backward is two products as large; tables are next to nothing."""
    hidden, rows = options["hidden"], surgery.cover(_network(options["network"]), policy="nern").rows
    differentiated = rows if options["sampling"] == "all" else options["batch_rows"]
    only_predicted = rows if options["rmse"] == "full" and options["sampling"] != "all" else 0
    return 2 * (3 * hidden * hidden + 9 * hidden) * (3 * differentiated + only_predicted)


def _case(name: str, hidden: int, **options: Any) -> Case:
    default = {"network": "resnet20", "batch_rows": 4096, "rmse": "running", "precision": "fp32"}
    flags = {flag: options.pop(flag, False) for flag in ("small", "heavy")}
    return Case(name, {**default, "sampling": "random_weighted", "hidden": hidden, **options}, **flags)


OPERATION = Operation(
    name="reconstruction_step",
    title="A whole reconstruction step: for ResNet-20 draw 4096 of 29,744 rows, loss, gradient, Ranger",
    cases=[
        _case("h=140, running RMSE", 140),
        _case("h=140, full RMSE", 140, rmse="full"),
        _case("h=140, running RMSE, bf16", 140, precision="bf16"),
        _case("ResNet-18, h=1024, all rows", 1024, network="resnet18", sampling="all", rmse="full", heavy=True),
        _case("h=16, 256 rows", 16, batch_rows=256, small=True),
    ],
    providers=[
        *hyperfast_providers(_work(_fused))[:1],
        Provider("eager (NeRN's form)", _work(_nern)),
        Provider("torch.compile", lambda inputs: _work(_compiled)(inputs), prepare=prepare_compiler),
    ],
    inputs=make_inputs,
    truth=truth,
    traffic=lambda _options: 0,  # everything but the targets stays in the caches
    flops=_flops,
    tests="tests/recipes/test_compress.py",
    gpu_tests="predict",
    tolerance=3e-2,  # of bfloat16 products
)
