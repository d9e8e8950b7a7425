"""The networks here are tiny: threads would only wait for each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from helpers import on_threads

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with on_threads(1):
        yield
