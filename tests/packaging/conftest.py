"""What the packaging tests share: the checkout, and its setup.py as a module."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    if not (ROOT / "setup.py").exists():
        pytest.skip("the tests do not run from a checkout")
    return ROOT


@pytest.fixture
def load_setup(root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[ModuleType, dict[str, Any]]]:
    """`load_setup(NAME=value)`: setup.py as a module and what it passes to `setup`, under these variables only."""
    pytest.importorskip("pybind11")
    setuptools = pytest.importorskip("setuptools")

    def load(**variables: str) -> tuple[ModuleType, dict[str, Any]]:
        given: dict[str, Any] = {}
        for name in ("HYPERFAST_CUDA", "HYPERFAST_CUDA_ARCHS", "HYPERFAST_DEBUG", "HYPERFAST_REQUIRE_NATIVE", "CXX"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(setuptools, "setup", given.update)
        spec = importlib.util.spec_from_file_location("hyperfast_setup", root / "setup.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "hyperfast_setup", module)
        spec.loader.exec_module(module)
        return module, given

    return load
