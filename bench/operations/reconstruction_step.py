"""A whole step of phase 1 for ResNet-20: rows are drawn, the loss and its gradient, Ranger."""

from __future__ import annotations

import copy
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
from operations import predict, ranger_update

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
    """The kernels of an untrained ResNet-20 (N = 29,744)."""
    changes = {name: options[name] for name in ("hidden", "batch_rows", "rmse", "precision")}
    config = replace(_CONFIG, device=str(device), **changes)
    with drawing(seed):
        state = models.create("resnet20").state_dict()
        rows = torch.randperm(29_744)[: config.batch_rows].to(device)
    coverage = surgery.cover(models.create("resnet20"), policy="nern")
    return Inputs(new_predictor(coverage, config, seed), dict(state), coverage, config, rows)


def _work(build: Callable[[Inputs, WeightPredictor], tuple[Callable[[], Any], Callable[[Tensor], Tensor]]]) -> Any:
    """`build` returns the step, and what leaves gradients through given rows and returns the loss."""

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


def _fused(inputs: Inputs, predictor: WeightPredictor) -> tuple[Callable[[], Any], Callable[[Tensor], Tensor]]:
    training = Reconstruction(predictor, inputs.targets(), inputs.config, seed=0)
    return training.step, training.gradient


Errors = Callable[[Tensor | None], Tensor]  # rows, or all -> sum of squares


def _plain(
    inputs: Inputs, predictor: WeightPredictor, errors: Errors, update: Callable[[list[nn.Parameter]], Any]
) -> tuple[Callable[[], Any], Callable[[Tensor], Tensor]]:
    """The loss as the recipe has it, whatever computes sums of squares and updates parameters."""
    targets, config = inputs.targets(), inputs.config
    norms, count = targets.rows.norm(dim=1), targets.rows.numel()
    running = targets.rmse(predictor).square()
    move: Callable[[], Any] | None = None

    def gradient(rows: Tensor) -> Tensor:
        predictor.zero_grad()
        if config.rmse == "full":
            with torch.no_grad():
                loss = (errors(None) / count).sqrt()
        else:
            loss = running.sqrt()
        (errors(rows) / (2 * count * loss)).backward()
        return loss

    def step() -> None:
        nonlocal move
        if torch.rand(()) < config.uniform:
            rows = torch.randperm(len(norms), device=norms.device)[: config.batch_rows]
        else:
            rows = torch.multinomial(norms, config.batch_rows, replacement=True)
        gradient(rows)
        move = move or update(list(predictor.parameters()))
        move()

    return step, gradient


def _nern(inputs: Inputs, predictor: WeightPredictor) -> tuple[Callable[[], Any], Callable[[Tensor], Tensor]]:
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


def _compiled(inputs: Inputs, predictor: WeightPredictor) -> tuple[Callable[[], Any], Callable[[Tensor], Tensor]]:
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
    rmse = options["rmse"] == "full"
    return predict._flops({"depth": 20, "hidden": options["hidden"], "batch": options["batch_rows"], "rmse": rmse})


def _case(name: str, hidden: int, rmse: str, precision: str, batch_rows: int = 4096, small: bool = False) -> Case:
    options = {"hidden": hidden, "batch_rows": batch_rows, "rmse": rmse, "precision": precision}
    return Case(name, options, small)


OPERATION = Operation(
    name="reconstruction_step",
    title="A whole reconstruction step for ResNet-20: draw 4096 of 29,744 rows, loss, gradient, Ranger",
    cases=[
        _case("h=140, running RMSE", 140, "running", "fp32"),
        _case("h=140, full RMSE", 140, "full", "fp32"),
        _case("h=140, running RMSE, bf16", 140, "running", "bf16"),
        _case("h=16, 256 rows", 16, "running", "fp32", 256, small=True),
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
