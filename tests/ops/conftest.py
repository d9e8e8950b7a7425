"""Every test of an operation that asks for `backend` runs on each one that is there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hyperfast.backends import Backend, Dispatcher, use_backend
from hyperfast.ops import _native

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(params=[Backend.REFERENCE, Backend.CPU], ids=lambda backend: backend.value)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The backend that is in force during the test; the test file names its `DISPATCHER`."""
    dispatcher: Dispatcher = request.module.DISPATCHER
    if request.param not in [implementation.backend for implementation in dispatcher.implementations]:
        pytest.skip(f"{dispatcher.operation} has no {request.param.value} implementation")
    if request.param is Backend.CPU and (reason := _native.missing()):
        pytest.skip(reason)
    with use_backend(request.param):
        yield request.param


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`options` of a test in a class runs through the `cases` of the class, `batch` through its `batches`."""
    for argument, attribute in (("options", "cases"), ("batch", "batches")):
        if argument in metafunc.fixturenames and hasattr(metafunc.cls, attribute):
            metafunc.parametrize(argument, getattr(metafunc.cls, attribute), ids=_identifier)


def _identifier(value: int | dict[str, object]) -> str:
    return "-".join(map(str, value.values())) if isinstance(value, dict) else str(value)
