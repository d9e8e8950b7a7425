"""A whole comparison of an untrained network with two that differ from it a little."""

from __future__ import annotations

import copy
import csv
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from hyperfast import models
from hyperfast.analysis import StudyConfig, mcnemar, network_report, rmse, s_ratio, study_steps
from hyperfast.analysis.answers import LabelledImages, answers
from hyperfast.analysis.network_study import study

pytest.importorskip("matplotlib")

_CONFIG = StudyConfig(
    images=20,
    plane_images=8,
    alphas=3,
    grid=3,
    epsilon=2 / 255,
    steps=2,
    corruptions=("contrast", "snow"),
    severities=(1, 5),
    blocks=("layer1.0",),
    cutoffs=(1.0, 4.0),
    factors=(0.0, 1.0),
    last=3,
    batch_size=16,
)


def _networks() -> tuple[nn.Module, dict[str, nn.Module]]:
    torch.manual_seed(1)
    original = models.create("resnet8", num_classes=4)
    others: dict[str, nn.Module] = {}
    for name, share in (("round 1", 0.5), ("round <2>", 1.0)):
        others[name] = copy.deepcopy(original)
        with torch.no_grad():
            for parameter in others[name].parameters():
                if parameter.ndim == 4:
                    parameter += share * parameter.std() * torch.randn_like(parameter)
    return original, others


def _data(count: int = 30) -> LabelledImages:
    images = torch.randint(256, (count, 3, 16, 16), dtype=torch.uint8)
    return LabelledImages(images, torch.arange(count) % 4, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_report_has_every_picture_and_its_numbers_are_right(tmp_path: Path) -> None:
    original, others = _networks()
    data = _data()
    seen: list[int] = []
    result = network_report(
        original,
        others,
        data,
        out=tmp_path / "new",
        train=_data(10),
        config=_CONFIG,
        facts={"command": "by <hand>"},
        progress=lambda step, text: seen.append(step),
    )
    assert seen == list(range(1, study_steps(2, _CONFIG, with_data=True, sets=2) + 1))
    files = {path.stem: _rows(path) for path in (tmp_path / "new").glob("*.csv")}
    # layers x networks, places x networks, places x sets, settings of both kinds, attacks, corruptions x severities
    layers = [name for name, parameter in original.named_parameters() if parameter.ndim == 4]
    assert {name: len(rows) for name, rows in files.items()} == {
        "summary": 3, "layers": 2 * len(layers), "interpolation": 6, "landscape": 18, "modulation": 4, "attacks": 6,
        "corruptions": 12,
    }  # fmt: skip

    assert result.layers == layers  # the classifier is the same everywhere
    every = torch.arange(20) * 30 // 20
    chosen = LabelledImages(data.images[every], data.labels[every], data.mean, data.std)
    first, second = (answers(network, chosen) for network in (original, others["round 1"]))
    row = files["summary"][1]
    assert row["network"] == "round 1"
    assert float(row["rmse"]) == pytest.approx(rmse(original, others["round 1"], layers))
    assert float(row["accuracy"]) == second.accuracy
    test = mcnemar(first.correct, second.correct)
    assert (int(row["only_first"]), int(row["only_second"]), float(row["p_value"])) == test
    assert float(files["layers"][0]["s_ratio"]) == s_ratio(others["round 1"].get_parameter(layers[0]))
    # Both ends of a line are networks that were measured, and no two have the same accuracy.
    line = [float(row["accuracy"]) for row in files["interpolation"]]
    assert line[::3] == [first.accuracy] * 2
    assert line[2::3] == [second.accuracy, result.answers["round <2>"].accuracy]
    assert len({first.accuracy, second.accuracy, result.answers["round <2>"].accuracy}) == 3
    unchanged = [row for row in files["modulation"] if row["kind"] == "singular_values" and row["value"] == "1.0"]
    assert float(unchanged[0]["accuracy"]) == first.accuracy

    text = (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    assert text.count("<svg") == 4 + 1 + 2 + 4 + 2 + 1
    assert text.count("data:image/png;base64,") == 2 * 3
    for heading in ("Summary", "Weights", "Lines between", "Loss landscape", "Modulated spectra", "Robustness"):
        assert f"<h2>{heading}" in text
    assert "round &lt;2&gt;" in text and "by &lt;hand&gt;" in text
    assert "nan" not in re.sub(r"base64,[^\"]*", "", text).lower().replace("finance", "")


def test_weights_alone_need_no_data(tmp_path: Path) -> None:
    original, others = _networks()
    del others["round <2>"]
    seen: list[int] = []
    result = network_report(original, others, out=tmp_path, progress=lambda step, text: seen.append(step))
    assert len(seen) == study_steps(1, StudyConfig(), with_data=False)
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "summary.csv", "layers.csv"}
    assert not result.answers
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Robustness" not in text and text.count("<svg") == 4


def test_bound_is_calibrated_on_the_original() -> None:
    original, others = _networks()
    data, config = _data(), StudyConfig(
        images=30, alphas=0, grid=0, corruptions=(), steps=1, fgsm_accuracy=0.1, batch_size=30
    )  # fmt: skip
    steps: list[int] = []
    result = study(original, others, data, config=config, progress=lambda step, text: steps.append(step))
    assert len(steps) == study_steps(2, config, with_data=True)
    assert 0 < result.epsilon < 16 / 255
    assert result.attacks["FGSM"]["original"] == pytest.approx(0.1, abs=1 / 30)
    assert result.attacks["FGSM"] == result.attacks["I-FGSM"]
    assert not result.lines and not result.planes and not result.corruptions


def test_two_studies_are_the_same() -> None:
    original, others = _networks()
    data = _data(12)
    first, second = (study(original, others, data, config=_CONFIG).tables() for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 0}, "images is 0; expected at least 1"),
        ({"epsilon": -1.0}, "epsilon is -1.0; expected at least 0"),
        ({"grid": 1}, "grid is 1; expected 0, or at least 2"),
        ({"corruptions": ("rain",)}, "corruptions has 'rain'; choose from gaussian_noise"),
    ],
)
def test_messages_of_the_settings(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StudyConfig(**options)


def test_networks_that_cannot_be_compared() -> None:
    original, others = _networks()
    with pytest.raises(ValueError, match="reconstructed has no network; expected at least one, none of them called"):
        study(original, {})
    with pytest.raises(ValueError, match="reconstructed has original; expected at least one"):
        study(original, {"original": original})
    with pytest.raises(ValueError, match=r"conv1.weight is \[8, 3, 3, 3\] in one network and \[8, 1, 3, 3\]"):
        study(original, {"other": models.create("resnet8", num_classes=4, in_channels=1)})
    with torch.no_grad():
        others["round 1"].conv1.weight[0] = torch.nan
    with pytest.raises(ValueError, match="conv1.weight: the weight has values that are not finite"):
        study(original, others)


def test_tables_of_an_earlier_study_do_not_stay(tmp_path: Path) -> None:
    original, others = _networks()
    (tmp_path / "attacks.csv").write_text("old")
    (tmp_path / "mine.csv").write_text("kept")
    paths = study(original, others).write_csv(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in paths} | {"mine.csv"}
