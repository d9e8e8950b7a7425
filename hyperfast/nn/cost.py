"""What a hypernetwork costs: parameters, bytes and time of every part."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from hyperfast.nn.hypernetwork import Hypernetwork


@dataclass(frozen=True)
class CostRow:
    """One part of a hypernetwork.

    Attributes:
        part: its name.
        parameters: number of values.
        bytes: of those values.
        gradient_bytes: of the gradients of those that are trained.
        momentum_bytes: state of SGD with momentum.
        adam_bytes: state of Adam.
    """

    part: str
    parameters: int
    bytes: int
    gradient_bytes: int = 0
    momentum_bytes: int = 0
    adam_bytes: int = 0


@dataclass(frozen=True)
class CostReport:
    """Costs by part; `str()` gives a table.

    Attributes:
        rows: condition, trunk, head, theta0, what stays in the primary, their total; then the generated weights,
            which are computed, not trained, and not part of the total.
        milliseconds: medians of `generate` (forward), `primary forward` (under weights already generated) and
            `whole step` (generate, forward and backward); empty without example inputs.
    """

    rows: tuple[CostRow, ...]
    milliseconds: dict[str, float]

    def __str__(self) -> str:
        lines: list[tuple[str, ...]] = [("part", "parameters", "bytes", "gradients", "SGD momentum", "Adam")]
        for row in self.rows:
            memory = (row.bytes, row.gradient_bytes, row.momentum_bytes, row.adam_bytes)
            lines.append((row.part, f"{row.parameters:,}", *map(_binary, memory)))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = [
            "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(pairs))
            for pairs in (list(zip(line, widths, strict=True)) for line in lines)
        ]
        longest = max(map(len, self.milliseconds), default=0)
        times = [f"{name.ljust(longest)}  {value:10.3f} ms" for name, value in self.milliseconds.items()]
        return "\n".join([*table, *([""] if times else []), *times])


def cost_report(hypernetwork: Hypernetwork, example_inputs: Sequence[Any] = (), repeats: int = 5) -> CostReport:
    """Count the parts of `hypernetwork` and, with example inputs of its primary, time them.

    Timing runs the model in its present mode and puts buffers and random state back afterwards.
    """
    parts: dict[str, Sequence[Tensor]] = {
        "condition": list(hypernetwork.condition.parameters()),
        "trunk": list(hypernetwork.trunk.parameters()),
        "head": [hypernetwork.head.weight],
        "theta0": [hypernetwork.theta0],
        "primary (kept)": list(hypernetwork.primary.parameters()),
    }
    rows = [_row(part, parameters) for part, parameters in parts.items()]
    total = _row("total", hypernetwork.parameters())
    theta = hypernetwork.theta0
    generated = CostRow("generated weights", theta.numel(), theta.nbytes, gradient_bytes=theta.nbytes)
    times = _times(hypernetwork, tuple(example_inputs), repeats) if example_inputs else {}
    return CostReport((*rows, total, generated), times)


def _row(part: str, parameters: Iterable[Tensor]) -> CostRow:
    parameters = list(parameters)
    trained = sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)
    count = sum(parameter.numel() for parameter in parameters)
    return CostRow(part, count, sum(parameter.nbytes for parameter in parameters), trained, trained, 2 * trained)


def _times(hypernetwork: Hypernetwork, inputs: tuple[Any, ...], repeats: int) -> dict[str, float]:
    parameters = [parameter for parameter in hypernetwork.parameters() if parameter.requires_grad]
    row = hypernetwork.condition.typical()
    # A condition that must be given from outside: any row does. Others choose their own.
    own = row[len(row) // 2].to(hypernetwork.theta0) if hypernetwork.condition.kind == "external" else None

    def generate() -> None:
        with torch.no_grad():
            hypernetwork.generate(own)

    def step() -> None:
        outputs = tree_leaves(hypernetwork(*inputs, condition=own))
        losses = [x.sum() for x in outputs if isinstance(x, Tensor) and x.requires_grad]
        torch.autograd.grad(sum(losses[1:], losses[0]), parameters, allow_unused=True)

    buffers = [(buffer, buffer.clone()) for buffer in hypernetwork.buffers()]
    plain = hypernetwork.materialize(own)
    device = hypernetwork.theta0.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        times = {
            "generate": median_ms(generate, device, repeats),
            "primary forward": median_ms(lambda: plain(*inputs), device, repeats),
            "whole step": median_ms(step, device, repeats),
        }
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
    return times


def median_ms(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median milliseconds of `run` after one call that is not counted."""
    run()
    samples = []
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        samples.append(1000 * (time.perf_counter() - start))
    return statistics.median(samples)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _binary(count: int) -> str:
    amount, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
