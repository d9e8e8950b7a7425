"""Triton kernels, imported at the first call that can run them: `import hyperfast` touches no Triton and no driver."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

from hyperfast.kernels import config


@functools.lru_cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def missing(device: Any) -> str | None:
    """Why no Triton kernel runs on `device`, or None."""
    return config.refuse_device(device) or (None if _installed() else "Triton is not installed")


def kernels(operation: str) -> Any:
    """The module of an operation's kernels; call only where `missing()` is None."""
    return importlib.import_module(f"hyperfast.kernels.triton.{operation}")
