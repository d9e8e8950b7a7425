"""What is measured: operations, their cases, and the ways to do the same work (providers).

An operation lives in `operations/<name>.py` as `OPERATION`. `run.py`, `memory.py` and the pytest-benchmark front ends
know it only through the classes below.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

import hyperfast

_Named = TypeVar("_Named", "Case", "Provider")

NAMES = ("generate", "attention_transfer", "predict", "rank_one_update", "ranger_update", "reconstruction_step")
NAMES += ("permutation", "similarity_preserving", "relational_distance_angle", "flow_of_solution")
NAMES += ("activation_boundary", "channel_wise_distillation", "fitnets", "unit_distance")
NAMES += ("cross_entropy_distillation", "sub_logit_distillation", "gated_experts", "training_step")


@dataclass(frozen=True)
class Case:
    """One size of an operation.

    Attributes:
        name: as it stands in tables.
        options: what `Operation.inputs` builds it from.
        small: a size for tests and for a look whether everything runs; not worth a number in a table.
        heavy: minutes and most of the memory for one step: every provider makes two in a process of its own, of which
            the second is measured. Nothing is compared with float64; the other cases do that.
    """

    name: str
    options: Mapping[str, Any]
    small: bool = False
    heavy: bool = False


@dataclass(frozen=True)
class Work:
    """A provider set up on inputs.

    Attributes:
        step: the whole job once, forward and backward; gradients are None when it begins. Returns its outputs.
        results: the job once more, returning its outputs and gradients by names that all providers share.
    """

    step: Callable[[], Tensor | Sequence[Tensor]]
    results: Callable[[], dict[str, Tensor]]


def _anywhere(_device: torch.device) -> str | None:
    return None


@dataclass(frozen=True)
class Provider:
    """One way to do an operation's work.

    Attributes:
        name: as it stands in tables and on the command line.
        build: inputs -> `Work`. Inputs are shared by all providers and must not be changed.
        unavailable: the reason it cannot run on a device, or None.
        prepare: imports whatever `build` would import, so that memory counted from there on is the work's own.
    """

    name: str
    build: Callable[[Any], Work]
    unavailable: Callable[[torch.device], str | None] = _anywhere
    prepare: Callable[[], object] = field(default=lambda: None)


@dataclass(frozen=True)
class Operation:
    """An operation with everything needed to measure it.

    Attributes:
        name: of the file in `operations/` and of the results.
        title: one line for tables and plots.
        cases: sizes, the small ones last.
        providers: ours is called `hyperfast`; the others are compared with it.
        inputs: (options, device, seed) -> inputs of one case.
        truth: inputs -> outputs and gradients in float64, by the names of `Work.results`.
        traffic: options -> the fewest bytes that must move through memory, each operand read or written once a pass;
            0 where that says nothing about the time.
        flops: options -> floating-point operations.
        tests: the operation's own pytest file; without it green no ratio is printed.
        gpu_tests: which tests of the GPU suite stand for it there, as an expression for `pytest -k`.
        tolerance: largest error of a result, ||x - truth|| / ||truth||, that is measured at all.
    """

    name: str
    title: str
    cases: Sequence[Case]
    providers: Sequence[Provider]
    inputs: Callable[[Mapping[str, Any], torch.device, int], Any]
    truth: Callable[[Any], dict[str, Tensor]]
    traffic: Callable[[Mapping[str, Any]], int]
    flops: Callable[[Mapping[str, Any]], int]
    tests: str
    gpu_tests: str
    tolerance: float

    def case(self, name: str) -> Case:
        """The case called `name`; `ValueError` names the choices."""
        return _named(self.cases, name, f"case of {self.name}")

    def provider(self, name: str) -> Provider:
        """The provider called `name`; `ValueError` names the choices."""
        return _named(self.providers, name, f"provider of {self.name}")


def _named(items: Sequence[_Named], name: str, what: str) -> _Named:
    for item in items:
        if item.name == name:
            return item
    raise ValueError(f"unknown {what} {name!r}; choose one of {', '.join(item.name for item in items)}")


def operation(name: str) -> Operation:
    """The operation called `name`; `ValueError` names the choices."""
    if name not in NAMES:
        raise ValueError(f"unknown operation {name!r}; choose one of {', '.join(NAMES)}")
    found: Operation = importlib.import_module(f"operations.{name}").OPERATION
    return found


def needs(package: str) -> Callable[[torch.device], str | None]:
    """`Provider.unavailable` of a provider that needs an installed package."""

    def unavailable(_device: torch.device) -> str | None:
        found = importlib.util.find_spec(package) is not None
        return None if found else f"{package} is not installed (pip install 'hyperfast[peers]')"

    return unavailable


def prepare_compiler() -> None:
    """Import what torch.compile imports on its first call."""
    importlib.import_module("torch._inductor.compile_fx")


def hyperfast_providers(build: Callable[[Any], Work]) -> list[Provider]:
    """`build` under hyperfast's own choice of backend and, on a GPU, under each backend that has a kernel there."""

    def gpu_only(device: torch.device) -> str | None:
        return None if device.type == "cuda" else "it runs on a GPU"

    named = [Provider("hyperfast", lambda inputs: on_backend(build, inputs, hyperfast.Backend.AUTO))]
    for backend in (hyperfast.Backend.TRITON, hyperfast.Backend.CUDA):
        named.append(
            Provider(
                f"hyperfast-{backend.value}",
                lambda inputs, backend=backend: on_backend(build, inputs, backend),  # type: ignore[misc]
                gpu_only,
            )
        )
    return named


def on_backend(build: Callable[[Any], Work], inputs: Any, backend: hyperfast.Backend) -> Work:
    """`build(inputs)`, every call of which runs on `backend`."""

    def bind(function: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            with hyperfast.use_backend(backend):
                return function()

        return call

    with hyperfast.use_backend(backend):
        work = build(inputs)
    return Work(bind(work.step), bind(work.results))


@contextlib.contextmanager
def drawing(seed: int) -> Any:
    """Random numbers from `seed` inside the block; the global generator is left as it was."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
