"""Tests may import `compressed`, share a teacher, and run on one thread: networks this small are faster so."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import on_threads

from hyperfast.cli import main

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Restores the number of threads afterwards."""
    with on_threads(1):
        yield


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trained teacher; three epochs are enough to be better than guessing."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("teacher")
    digits = ["--dataset", "digits", "--model", "resnet8", "--option", "width=4", "--device", "cpu"]
    with on_threads(1):
        assert main(["train", *digits, "--epochs", "3", "--batch-size", "32", "--out", str(folder)]) == 0
    return folder
