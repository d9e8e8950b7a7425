"""`pytest bench --benchmark-only`: the registry's small cases under pytest-benchmark."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # the modules here are scripts, not a package

from registry import NAMES, operation


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per provider that runs on a processor."""
    name = metafunc.module.__name__.rpartition("test_")[2]
    if name in NAMES and "measured" in metafunc.fixturenames:
        providers = [p.name for p in operation(name).providers if "GPU" not in (p.unavailable(_CPU) or "")]
        metafunc.parametrize("measured", [(name, provider) for provider in providers], indirect=True, ids=providers)


_CPU = torch.device("cpu")


@pytest.fixture
def measured(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[], torch.Tensor | Sequence[torch.Tensor]]:
    """Measures the provider's step and returns it."""
    op = operation(request.param[0])
    provider = op.provider(request.param[1])
    reason = provider.unavailable(_CPU)
    if reason is not None:
        pytest.skip(reason)
    case = next(case for case in op.cases if case.small)
    torch.compiler.reset()
    step = provider.build(op.inputs(case.options, _CPU, 0)).step
    benchmark.group = f"{op.name}, {case.name}"
    benchmark.pedantic(step, rounds=10, warmup_rounds=3)
    return step
