"""Two gates without a GPU: Triton's interpreter, and every kernel compiled ahead of time. They exclude each other:
under TRITON_INTERPRET=1 kernels are decorated for the interpreter and cannot be compiled."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = pytest.mark.skip(reason="set TRITON_INTERPRET=1 to run Triton kernels in the interpreter")
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and "interpreter" in item.keywords and not INTERPRET:
            item.add_marker(missing)
