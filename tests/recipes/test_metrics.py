from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from hyperfast.recipes.meter import Meter
from hyperfast.recipes.metrics import MetricsWriter, read_metrics


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_line_is_on_file_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "run") as writer:
        writer.write("train", 3, {"loss": 0.5, "at": {"layer1": 0.25}})
        assert lines(tmp_path / "run") == [{"kind": "train", "step": 3, "loss": 0.5, "at": {"layer1": 0.25}}]


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write("train", 1, {"grad_norm": float("inf"), "at": {"layer1": float("nan")}})
    assert lines(tmp_path) == [{"kind": "train", "step": 1, "grad_norm": None, "at": {"layer1": None}}]


def test_resuming_cuts_off_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write("train", 1, {})
        position = writer.position()
        writer.write("train", 2, {})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "tr')  # killed in the middle of a line
    with MetricsWriter(tmp_path, position=position, step=1) as writer:
        writer.write("train", 2, {})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_a_file_removed_since_the_checkpoint_is_not_padded(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, position=1000) as writer:
        writer.write("train", 2, {})
    assert [line["step"] for line in lines(tmp_path)] == [2]


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorboard") is None:
        pytest.skip("tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.write("train", 7, {"loss": 0.5, "at": {"layer1": 0.25}, "grad_norm": None})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["train/at/layer1", "train/loss"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(7, 0.5)]


def test_missing_tensorboard_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'hyperfast\[tensorboard\]'"):
        MetricsWriter(tmp_path, tensorboard=True)


def test_reading_stops_at_a_line_that_was_cut_off(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    with MetricsWriter(tmp_path) as writer:
        writer.write("train", 1, {"loss": float("nan"), "at": {"layer1": 2.0}})
    with writer.path.open("a") as file:
        file.write('{"kind": "resu')
    assert read_metrics(tmp_path) == [{"kind": "train", "step": 1, "loss": None, "at": {"layer1": 2.0}}]


def test_meter_gives_means_and_starts_anew() -> None:
    meter = Meter()
    meter.add({"loss": torch.tensor(1.0), "at": torch.tensor([1.0, 2.0])})
    meter.add({"loss": torch.tensor(3.0), "at": torch.tensor([3.0, 6.0])})
    assert meter.read() == {"loss": [2.0], "at": [2.0, 4.0]}
    assert meter.read() == {} and meter.steps == {}


def test_meter_counts_by_name() -> None:
    meter = Meter()
    meter.add({"loss": torch.tensor(1.0), "ab": torch.tensor(4.0)})
    meter.add({"loss": torch.tensor(3.0)})
    assert meter.read() == {"loss": [2.0], "ab": [4.0]}


def test_meter_continues_from_its_state() -> None:
    meter, resumed = Meter(), Meter()
    meter.add({"loss": torch.tensor(1.0)})
    resumed.restore(meter.state(), meter.steps, torch.device("cpu"))
    resumed.add({"loss": torch.tensor(2.0)})
    assert resumed.read() == {"loss": [1.5]}
    assert meter.read() == {"loss": [1.0]}


def test_meter_keeps_no_graph_and_no_alias() -> None:
    meter = Meter()
    loss = torch.ones(2, requires_grad=True)
    meter.add({"at": loss})
    meter.add({"at": loss})
    assert loss.tolist() == [1.0, 1.0]
    assert not meter.state()["at"].requires_grad
