"""`hyperfast analyze`: a page and tables about a network and its compressed files."""

from __future__ import annotations

import csv
from pathlib import Path

import compressed
import pytest
import torch

from hyperfast import models
from hyperfast.analysis import rmse
from hyperfast.cli import main
from hyperfast.recipes import Artifact, checkpoint

pytest.importorskip("tyro")
pytest.importorskip("matplotlib")

_SHORT = ["--alphas", "2", "--grid", "2", "--steps", "1", "--corruptions", "contrast", "--severities", "1"]
_DIGITS = ["--dataset", "digits", "--images", "30", *_SHORT]


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _printed(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


def test_weights_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = compressed.write(tmp_path)
    paths = [files.compressed(f"{name}.hf.safetensors", seed) for seed, name in enumerate(("small", "large"))]
    out = tmp_path / "report"
    assert main(["analyze", str(files.original), *map(str, paths), "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"report.html", "summary.csv", "layers.csv"}
    rows = _rows(out / "summary.csv")
    assert [row["network"] for row in rows] == ["original", "small", "large"]
    printed = _printed(capsys)
    for row, path in zip(rows[1:], paths, strict=True):
        read = Artifact.load(path)
        expected = rmse(files.module, read.build(), [tensor.name for tensor in read.coverage.tensors])
        assert float(row["rmse"]) == pytest.approx(expected)
        assert f"{row['network']}: RMSE {expected:.5f}" in printed
    page = (out / "report.html").read_text()
    assert f"{paths[0].stat().st_size:,} bytes; predictor of 1,635 parameters in fp32" in page
    assert "with permutations" in page


def test_with_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    files = compressed.write(tmp_path)
    paths = [str(files.compressed(f"{seed}.hf.safetensors", seed, "int8")) for seed in range(2)]
    out = tmp_path / "report"
    assert main(["analyze", str(files.original), *paths, "--out", str(out), *_DIGITS]) == 0
    tables = {"summary", "layers", "interpolation", "landscape", "attacks"}
    assert {path.stem for path in out.iterdir()} == tables | {"report"}
    assert {row["images"] for row in _rows(out / "landscape.csv")} == {"test", "train"}
    for row in _rows(out / "summary.csv"):
        assert float(row["accuracy"]) * 30 == pytest.approx(round(float(row["accuracy"]) * 30))
    printed = _printed(capsys)
    assert ", accuracy " in printed and "the images have no colours: corruptions are left out" in printed


def test_images_are_normalised_as_the_file_of_the_original_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    seen = {}

    def report(original: object, networks: object, data: object, **options: object) -> None:
        seen["mean"], seen["std"] = data.mean, data.std  # type: ignore[attr-defined]
        seen["config"] = options["config"]
        raise KeyboardInterrupt

    monkeypatch.setattr("hyperfast.cli.analyze.network_report", report)
    files = compressed.write(tmp_path)
    command = ["analyze", str(files.original), str(files.compressed("a")), "--out", str(tmp_path / "report")]
    assert main([*command, "--dataset", "digits", "--device", "cpu"]) == 130
    assert seen["mean"] == (0.3,) and seen["std"] == (0.4,)
    assert seen["config"].images == 1000  # type: ignore[attr-defined]
    assert main([*command, "--dataset", "digits", "--images", "50"]) == 130
    assert seen["config"].images == seen["config"].plane_images == 50  # type: ignore[attr-defined]


def test_files_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    files = compressed.write(tmp_path)
    paths = []
    for seed in range(2):
        (tmp_path / str(seed)).mkdir()
        paths.append(str(files.compressed(f"{seed}/net.hf.safetensors", seed)))
    assert main(["analyze", str(files.original), *paths, "--out", str(tmp_path / "report")]) == 0
    assert [row["network"] for row in _rows(tmp_path / "report" / "summary.csv")] == ["original", *paths]


def test_a_report_is_replaced_only_by_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = compressed.write(tmp_path)
    command = ["analyze", str(files.original), str(files.compressed("a")), "--out", str(tmp_path / "report")]
    assert main(command) == 0
    page = tmp_path / "report" / "report.html"
    page.write_text("mine")
    assert main(command) == 2
    assert "report.html is there already; give another --out, or --force to replace it" in _printed(capsys)
    assert page.read_text() == "mine"
    assert main([*command, "--force"]) == 0
    assert page.read_text() != "mine"


def test_what_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = compressed.write(tmp_path)
    file = files.compressed("a.hf.safetensors")
    nameless = files.compressed("nameless.hf.safetensors", model=None, model_options=None)
    wide = tmp_path / "wide.safetensors"
    torch.manual_seed(0)
    checkpoint.write(wide, models.create("resnet8", **(compressed.OPTIONS | {"width": 8})).state_dict(), {})
    before = sorted(tmp_path.iterdir())
    for given, message in (
        ([files.original], "no compressed file is given; name one or more after the network"),
        ([files.original, tmp_path / "none"], "there is no checkpoint at"),
        ([files.original, files.original], "nor a compressed network in it"),
        ([files.original, file, file], "a.hf.safetensors is given twice"),
        ([files.original, nameless], "does not say of which model it is; give --model"),
        ([wide, file, "--model", "resnet8", "--option", "width=8"], "a was not made from this resnet8: the network"),
        ([files.original, file, "--data", tmp_path], "--data is given without --dataset; add --dataset cifar10"),
        ([files.original, file, "--images", "0"], "--images is 0; give at least 1"),
        ([files.original, file, "--device", "tpu"], "device is 'tpu'"),
        ([files.original, file, "--dataset", "digit"], "unknown set 'digit' (did you mean digits?)"),
        ([files.original, file, "--corruptions", "fogg"], "corruptions has 'fogg'"),
    ):
        try:
            code = main(["analyze", *map(str, given), "--out", str(tmp_path / "report")])
        except SystemExit as end:  # tyro's, for values that a dataclass refuses
            code = int(end.code or 0)
        assert code == 2
        assert message in _printed(capsys).replace("│ ", "")
    assert sorted(tmp_path.iterdir()) == before


def test_a_model_can_be_named(tmp_path: Path) -> None:
    files = compressed.write(tmp_path)
    nameless = files.compressed("nameless.hf.safetensors", model=None, model_options=None)
    command = ["analyze", str(files.original), str(nameless), "--model", "resnet8"]
    assert main([*command, "--out", str(tmp_path / "report")]) == 0
