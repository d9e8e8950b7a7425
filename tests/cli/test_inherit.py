"""`hyperfast inherit`: tables, files that load without the teacher, sweeps of a few digits, and bad input."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hyperfast.cli import inherit as command
from hyperfast.cli import main
from hyperfast.cli.network import load_run, load_trained
from hyperfast.nn import Hypernetwork, InheritedConv2d, inherited_layers
from hyperfast.recipes import Comparison
from hyperfast.recipes.inherit_plan import load_plans

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

_SHORT = ["--dataset", "digits", "--device", "cpu", "--epochs", "1", "--batch-size", "20", "--limit", "40"]
_IMAGE = ["--image", "1", "8", "8", "--device", "cpu"]


def _sweep(teacher: Path, folder: Path, *more: str) -> list[str]:
    return ["inherit", str(teacher), *_SHORT, "--folder", str(folder), *more]


def _count(teacher: Path) -> int:
    return sum(parameter.numel() for parameter in load_run(teacher)[1].parameters())


@pytest.fixture(scope="module")
def swept(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "sweep"
    sizes = ["--rank", "2", "3", "--heads", "1", "2", "--exclude", "layer3.*"]
    assert main(_sweep(teacher, folder, *sizes, "--balance", "0.01")) == 0
    return folder


@pytest.fixture(scope="module")
def file(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "small.safetensors"
    assert main(["inherit", str(teacher), "--rank", "2", "--heads", "2", "--out", str(path), *_IMAGE]) == 0
    return path


def test_a_table_and_a_file_without_images(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "small.safetensors"
    assert main(["inherit", str(teacher), "--energy", "0.5", "--out", str(path), *_IMAGE]) == 0
    text = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    layers = {row[0]: row for row in rows}
    assert layers["fc"][1] == "as it was: it is the classifier" and layers["fc"][4] == "–"
    assert layers["layer3.0.conv2"][1].startswith("rank ") and 0.5 <= float(layers["layer3.0.conv2"][2]) < 1
    assert layers["whole network"][1].endswith(" of 8 layers")
    assert f"e0.5-h3: {_count(teacher):,} to " in text and f"{path}: resnet8, inherited, " in text.replace("\n", "")
    assert [p.name for p in path.parent.iterdir()] == ["small.safetensors"]


def test_a_file_loads_without_its_teacher(file: Path) -> None:
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["model"] == "resnet8" and json.loads(metadata["options"])["width"] == 4
    trained = load_trained(file, None, {})
    layer = trained.module.get_submodule("layer2.0.conv1")
    assert isinstance(layer, InheritedConv2d) and (layer.rank, layer.heads) == (2, 2)
    assert json.loads(metadata["inherited"]) == inherited_layers(trained.module) == trained.network.inherited
    assert trained.mean is not None and not trained.module.training
    assert trained.module(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("name", ["layer2.0.conv1.gate.weight", "inherited", "options"])
def test_a_file_that_contradicts_itself(
    name: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = dict(opened.metadata())
    damaged = tmp_path / "damaged.safetensors"
    if name in tensors:
        tensors[name] = torch.zeros(2, 3)
        message = (
            "the gate of layer 'layer2.0.conv1' is [2, 3]; rank 2, 2 heads and gate_input='compressed' make it [2, 2]"
        )
    else:
        metadata[name] = "{"
        message = "is damaged: what it says about its inherited layers is unreadable"
    save_file(tensors, damaged, metadata=metadata)
    assert main(["distill", *_SHORT, "--model", "resnet8", "--teacher", str(damaged)]) == 2
    assert message in capsys.readouterr().err.replace("\n", "")


def test_a_sweep_of_digits(swept: Path) -> None:
    comparison = Comparison.load(swept)
    assert list(comparison.methods) == ["r2-h1", "r2-h2", "r3-h1", "r3-h2"]
    assert [run.state for run in comparison.runs] == ["finished"] * 4
    assert comparison.settings["training"]["lr"] == 0.05
    assert comparison.settings["training"]["lr_steps"] == [0.625, 0.75, 0.875]
    for name in comparison.methods:
        run, network = load_run(swept / f"{name}-seed0")
        assert run.network.inherited == inherited_layers(network) and run.settings["command"] == "inherit"
        assert not any(layer.startswith("layer3") for layer in inherited_layers(network))
    assert "Accuracy against size" in (swept / "report.html").read_text()


def test_the_same_command_adds_what_is_new_and_writes_one_file(
    swept: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (swept / "r2-h1-seed0" / "metrics.jsonl").stat().st_mtime_ns
    out = tmp_path / "r2.safetensors"
    more = ["--rank", "2", "--heads", "1", "--exclude", "layer3.*", "--balance", "0.01", "--resume"]
    assert main(_sweep(teacher, swept, *more, "--out", str(out))) == 0
    text = capsys.readouterr().out
    assert (swept / "r2-h1-seed0" / "metrics.jsonl").stat().st_mtime_ns == before
    assert f"r2-h1: {_count(teacher):,} to " in text and "% at once" in text
    assert str(swept / "report.html") in text.replace("\n", "")
    trained, (_, best) = load_trained(out, None, {}), load_run(swept / "r2-h1-seed0")
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(trained.module(x), best(x))


@pytest.mark.parametrize("form", ["safetensors", "pt2"])
def test_one_head_folds_in_export(form: str, swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, run = tmp_path / f"plain.{form}", swept / "r3-h1-seed0"
    assert main(["export", str(run), "--fold", "--out", str(out)]) == 0
    x, (_, best) = torch.rand(3, 1, 8, 8), load_run(run)
    if form == "pt2":
        plain = torch.export.load(out).module()
    else:
        plain = load_trained(out, None, {}).module
        assert inherited_layers(plain) == {} and "layer2.0.conv1.1.weight" in plain.state_dict()
    torch.testing.assert_close(plain(x), best(x))
    assert main(["export", str(swept / "r3-h2-seed0"), "--fold", "--out", str(out)]) == 2
    assert "--fold: layer 'layer1.0.conv1' has 2 heads, which are mixed anew for every image" in capsys.readouterr().err


def test_only_inherited_networks_fold(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(teacher), "--fold", "--out", str(tmp_path / "x.pt2")]) == 2
    assert "--fold is for networks of hyperfast inherit" in capsys.readouterr().err


def test_hypernetised_teachers_are_baked(teacher: Path, tmp_path: Path) -> None:
    hyper, out = tmp_path / "hyper", tmp_path / "small.safetensors"
    network = ["--model", "resnet8", "--option", "width=4", "--hypernetize", "--hidden", "4", "8"]
    assert main(["train", *_SHORT, *network, "--out", str(hyper)]) == 0
    assert isinstance(load_run(hyper)[1], Hypernetwork)
    assert main(["inherit", str(hyper), "--rank", "2", "--out", str(out), *_IMAGE]) == 0
    assert load_trained(out, None, {}).network.hypernet is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "give one of --rank, --energy and --budget; got none"),
        (["--rank", "2", "--budget", "900"], "give one of --rank, --energy and --budget; got rank, budget"),
        (["--rank", "0"], "rank is 0; it must be at least 1"),
        (["--rank", "999"], "no layer was replaced: conv1, rank 999 is its full rank; layer1.0.conv1, rank 999 is its"),
        (
            ["--rank", "9", "--include", "conv1"],
            "layer 'conv1' was asked for by name and cannot be replaced: rank 9 is",
        ),
        (["--rank", "2", "--heads", "0"], "heads is 0; it must be at least 1"),
        (["--budget", "10"], "parameters, but the layers have"),
        (["--rank", "2", "--gate", "zero"], "gate='zero' with equal heads"),
        (["--rank", "2", "--ce", "--kd"], "--ce and --kd: give one of them, or none"),
        (["--rank", "2", "--seeds", "0"], "--seeds is 0; give at least 1"),
        (["--rank", "2", "3", "--out", "x.safetensors"], "--out is one file, but 2 networks were asked for"),
        (["--rank", "2", "--seeds", "2", "--out", "x.safetensors"], "--out is one file, but 2 networks were asked for"),
        (["--rank", "2", "--out", "x.onnx"], "its ending must be .safetensors"),
        (["--rank", "2", "--resume"], "there is no comparison.json in "),
    ],
)
def test_bad_input(
    more: list[str], message: str, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_sweep(teacher, tmp_path / "new", *more)) == 2
    assert message in capsys.readouterr().err.replace("\n", "")
    assert not (tmp_path / "new").exists()


def test_bad_input_without_images(file: Path, teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line, message in (
        ([str(teacher), "--rank", "2", "--data", "x"], "--data is given without --dataset"),
        ([str(teacher), "--rank", "2", "--recalibrate", "3"], "calibration and recalibrate show images to the network"),
        ([str(file), "--rank", "2"], "is inherited itself; give the network that it was made of"),
        ([str(teacher / "last.safetensors"), "--model", "resnet8"], "give one of --rank, --energy and --budget"),
    ):
        assert main(["inherit", *line]) == 2
        assert message in capsys.readouterr().err.replace("\n", "")


def test_depthwise_convolutions_are_skipped_and_the_table_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hyperfast import models

    path = tmp_path / "mobile.safetensors"
    save_file(models.create("mobilenetv2_x0_5", width=4).state_dict(), path)
    assert main(["inherit", str(path), "--model", "mobilenetv2_x0_5", "--rank", "4", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "as it was: a depthwise convolution has rank 1" in text and "rank 4 of" in text


def test_where_nothing_finishes_the_command_fails(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_sweep(teacher, tmp_path / "run", "--rank", "2", "--lr", "1e30", "--ce")) == 2
    captured = capsys.readouterr()
    assert "r2-h3, seed 0 failed: FloatingPointError" in captured.out
    assert "every run has failed, the first with FloatingPointError" in captured.err


def test_ctrl_c_shows_what_is_done(
    swept: Path, teacher: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt("stopped in r2-h1, seed 0")

    monkeypatch.setattr(command, "inherit_sweep", interrupted)
    assert main(_sweep(teacher, swept, "--rank", "2")) == 130
    captured = capsys.readouterr()
    assert "│ r2-h1" in captured.out and "stopped in r2-h1, seed 0" in captured.err


@pytest.mark.parametrize("width", [180, 110, 60])
def test_narrow_terminals_cut_nothing(swept: Path, width: int) -> None:
    text = io.StringIO()
    console = Console(file=text, width=width, force_terminal=True, color_system=None)
    command._print(Comparison.load(swept), console)
    command._say(load_plans(swept)["r2-h2"], True, console)
    assert "…" not in text.getvalue() and "r2-h2" in text.getvalue()
