"""No ratio without green tests."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import verify
from registry import operation

CPU = torch.device("cpu")


def test_error_is_relative_and_in_float64() -> None:
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert verify.error(torch.tensor([3.0, 4.5]), truth) == pytest.approx(0.1)
    assert verify.error(torch.tensor([3.0, 4.0]), truth) == 0


def test_error_of_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_CHUNK", 3)
    truth = torch.arange(1, 11, dtype=torch.float64)
    assert verify.error(truth * 1.25, truth) == pytest.approx(0.25)


def test_error_never_passes_nan_or_a_wrong_shape() -> None:
    truth = torch.ones(4, dtype=torch.float64)
    assert math.isnan(verify.error(torch.tensor([1.0, math.nan, 1.0, 1.0]), truth))
    assert verify.error(torch.ones(5), truth) == math.inf
    assert verify.error(torch.ones(4), torch.zeros(4, dtype=torch.float64)) == math.inf
    assert verify.error(torch.zeros(4), torch.zeros(4, dtype=torch.float64)) == 0


@pytest.mark.parametrize("bad", [{}, {"x": torch.tensor([math.nan])}])
def test_largest_error_names_the_result(bad: dict[str, torch.Tensor]) -> None:
    truth = {"y": torch.ones(1, dtype=torch.float64), "x": torch.ones(1, dtype=torch.float64)}
    error, name = verify.largest_error({"y": torch.ones(1) * 1.5, **bad}, truth)
    assert name == "x"
    assert not error <= 1


@pytest.mark.parametrize(("body", "green"), [("assert True", True), ("assert False", False)])
def test_run_tests(body: str, green: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_it.py").write_text(f"def test_it():\n    {body}\n")
    monkeypatch.setattr(verify, "ROOT", tmp_path)
    verdict = verify.run_tests(replace(operation("generate"), tests="test_it.py"), CPU)
    assert verdict.green is green
    assert ("1 passed" if green else "1 failed") in verdict.summary


def test_no_tests_are_not_green(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_it.py").write_text("")
    monkeypatch.setattr(verify, "ROOT", tmp_path)
    assert not verify.run_tests(replace(operation("generate"), tests="test_it.py"), CPU).green
    missing = verify.run_tests(replace(operation("generate"), tests="test_that.py"), CPU)
    assert missing == verify.Verdict(False, "test_that.py does not exist")
