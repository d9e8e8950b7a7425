"""Tests may import `compressed`, share a teacher, and run on one thread: networks this small are faster so."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hyperfast.cli import main

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Restores the number of threads afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trained teacher; three epochs are enough to be better than guessing."""
    pytest.importorskip("sklearn")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("teacher")
    digits = ["--dataset", "digits", "--model", "resnet8", "--option", "width=4", "--device", "cpu"]
    assert main(["train", *digits, "--epochs", "3", "--batch-size", "32", "--out", str(folder)]) == 0
    torch.set_num_threads(threads)
    return folder
