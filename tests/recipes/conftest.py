"""Tests run on one thread, and may import `tiny_task`; so may the processes that they start."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import on_threads

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small run faster on one thread; test_resume.py uses as many as a user would."""
    with on_threads(1):
        yield
