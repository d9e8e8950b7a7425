"""The demo, in small: does it run, and are its table and its page what the runs came to?"""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

import pytest
import torch
from rich.console import Console

from hyperfast.recipes.demo import DemoConfig, MethodRuns, demo
from hyperfast.recipes.result import EpochRecord, TrainResult

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

_METHODS = ("teacher", "MIP alone", "MIP + AT", "MIP + logit KD")


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[MethodRuns], str, Path]:
    folder, text = tmp_path_factory.mktemp("demo"), io.StringIO()
    config = DemoConfig(folder, seeds=2, epochs=2, train_images=25, teacher_epochs=1)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    runs = demo(config, console=Console(file=text, width=120))
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    return runs, text.getvalue(), folder / "report.html"


def test_table_has_the_numbers_of_the_runs(outcome: tuple[list[MethodRuns], str, Path]) -> None:
    runs, text, page = outcome
    assert tuple(method.name for method in runs) == _METHODS
    assert [len(method.results) for method in runs] == [1, 2, 2, 2]
    markup = page.read_text(encoding="utf-8")
    for method in runs:
        accuracies = [100 * (result.test_accuracy_best or 0) for result in method.results]
        mean = f"{sum(accuracies) / len(accuracies):.1f}"
        assert re.search(rf"{re.escape(method.name)} +│ +{mean}( ± \d+\.\d)? %", text)
        assert f"<td>{method.name}</td><td>{mean}" in markup


def test_page_has_curves_maps_and_the_command_but_no_place(outcome: tuple[list[MethodRuns], str, Path]) -> None:
    _, _, page = outcome
    markup = page.read_text(encoding="utf-8")
    assert "hyperfast demo --seeds 2 --epochs 2 --train-images 25 --teacher-epochs 1" in markup
    assert markup.count("<svg") == 2
    assert markup.count("<img") == 5 * (1 + 3 * len(_METHODS))
    assert str(page.parent) not in markup
    assert not re.search(r"https?://(?!www\.w3\.org/)|<script|/home/|/root/", markup)


def test_methods_differ_in_their_loss_only(outcome: tuple[list[MethodRuns], str, Path]) -> None:
    runs, _, _ = outcome
    students = runs[1:]
    assert len({result.steps for method in students for result in method.results}) == 1
    losses = {method.results[0].history[0].train_loss for method in students}
    assert len(losses) == len(students)
    assert not any(result.best_weights for method in students for result in method.results)


def _result(accuracies: list[float]) -> TrainResult:
    history = tuple(EpochRecord(e, 1.0, 0.5, 1.0, a) for e, a in enumerate(accuracies, start=1))
    return TrainResult(history, 1, accuracies[0], accuracies[-1], 5, (2.0, 4.0, 3.0), 2**20, {})


def test_row() -> None:
    both = MethodRuns("m", [_result([0.5, 0.9]), _result([0.7, 0.8])], {})
    assert both.row(0.8) == ("m", "60.0 ± 14.1 %", "2.0", "3.0", "1 MiB")
    assert both.row(0.85)[2] == "2.0 (1 of 2 runs)"
    assert both.row(0.95)[2] == "not reached"
    assert MethodRuns("m", [_result([0.5])], {}).row(0.5)[1:3] == ("50.0 %", "1.0")


@pytest.mark.parametrize("name", ["seeds", "epochs", "train_images", "teacher_epochs"])
def test_settings_that_cannot_be(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} is 0; expected at least"):
        DemoConfig(**{name: 0})
