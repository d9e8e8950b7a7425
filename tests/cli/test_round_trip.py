"""train, distill and export, one after the other, on a few digits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hyperfast import models
from hyperfast.cli import main
from hyperfast.cli.distill import measure_teacher
from hyperfast.cli.network import load_run
from hyperfast.cli.options import DataOptions
from hyperfast.recipes import TrainConfig, checkpoint

pytest.importorskip("sklearn")

_DIGITS = ["--dataset", "digits", "--model", "resnet8", "--option", "width=4", "--device", "cpu"]
_SHORT = ["--epochs", "1", "--batch-size", "20", "--lr", "0.05"]
_SMALL = ["--hidden", "4", "8"]


@pytest.fixture(scope="module")
def student(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    assert main(_distill(teacher, folder)) == 0
    return folder


def _distill(teacher: Path, folder: Path, *more: str) -> list[str]:
    losses = ["--loss", "at=50", "--loss", "kd=0.9"]
    options = ["--limit", "100", "--teacher", str(teacher), "--out", str(folder)]
    return ["distill", *_DIGITS, *_SHORT, *_SMALL, *losses, *options, *more]


def test_runs_write_what_they_say(teacher: Path, student: Path) -> None:
    for folder in (teacher, student):
        names = {path.name for path in folder.iterdir()}
        assert names == {"run.json", "metrics.jsonl", *(f"{n}.safetensors" for n in ("best", "last", "checkpoint"))}
    notes = json.loads((student / "run.json").read_text())
    assert notes["network"]["hypernet"]["hidden"] == [4, 8]
    assert notes["settings"]["distillation"]["kd_weight"] == 0.9
    assert notes["settings"]["distillation"]["losses"]["at"]["beta"] == 50
    terms = json.loads((student / "metrics.jsonl").read_text().splitlines()[0])
    assert set(terms["at"]) == {"layer1", "layer2", "layer3"} and terms["kd"] > 0


def test_the_same_command_goes_on_and_another_does_not(
    teacher: Path, student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_distill(teacher, student, "--resume")) == 0
    assert "going on with the run in" in capsys.readouterr().out
    assert main(_distill(teacher, student, "--temperature", "2")) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "settings.distillation.temperature was 4.0 and is now 2.0" in error and "another --out" in error


def test_safetensors_is_an_ordinary_network(student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plain.safetensors"
    assert main(["export", str(student), "--out", str(out)]) == 0
    with safe_open(out, framework="pt") as file:
        assert file.metadata()["model"] == "resnet8"
        assert len(file.metadata()["mean"].split(",")) == 1
    plain = models.create("resnet8", in_channels=1, width=4).eval()
    models.load_weights(plain, out)
    _, hypernetwork = load_run(student)
    images = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(plain(images), hypernetwork(images))


def test_condition_is_baked_in(student: Path, tmp_path: Path) -> None:
    out = tmp_path / "plain.safetensors"
    assert main(["export", str(student / "last.safetensors"), "--out", str(out), "--condition", "0.3"]) == 0
    plain = models.create("resnet8", in_channels=1, width=4).eval()
    models.load_weights(plain, out)
    _, hypernetwork = load_run(student / "last.safetensors")
    images = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(plain(images), hypernetwork(images, condition=torch.tensor([0.3])))
        assert not torch.allclose(plain(images), hypernetwork(images))


def test_exported_program_takes_any_batch(student: Path, tmp_path: Path) -> None:
    out = tmp_path / "plain.pt2"
    assert main(["export", str(student / "checkpoint.safetensors"), "--out", str(out)]) == 0
    program = torch.export.load(out).module()
    _, hypernetwork = load_run(student)
    for batch in (1, 7):
        images = torch.randn(batch, 1, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(program(images), hypernetwork(images))
    assert [path.name for path in tmp_path.iterdir()] == ["plain.pt2"]


def test_onnx(student: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    out = tmp_path / "plain.onnx"
    assert main(["export", str(student), "--out", str(out)]) == 0
    model = onnx.load(out)
    onnx.checker.check_model(model)
    assert [value.name for value in model.graph.input] == ["images"]
    assert [value.name for value in model.graph.output] == ["logits"]


def test_onnx_without_its_packages(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["export", str(student), "--out", str(tmp_path / "plain.onnx")]) == 2
    assert "try `pip install onnx onnxscript`" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_transformer_learns_from_a_convolutional_network(teacher: Path, tmp_path: Path) -> None:
    options = ("image_size=8", "patch=2", "width=16", "depth=4")
    student = ["--model", "vit_tiny32", *(word for option in options for word in ("--option", option))]
    teaching = ["--teacher", str(teacher), "--teacher-model", "resnet8", "--no-hypernetize"]
    losses = [word for loss in ("ofa", "sinkd=0.001", "infonce@0:0.5", "kd") for word in ("--loss", loss)]
    run = ["--dataset", "digits", "--limit", "100", "--device", "cpu", *_SHORT, "--out", str(tmp_path / "run")]
    assert main(["distill", *run, *student, *teaching, *losses]) == 0
    terms = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert set(terms["ofa"]) == {"stages.0", "stages.1", "stages.2", "stages.3", "logits"}
    assert set(terms["sinkd"]) == {"fc"} and set(terms["infonce"]) == {"fc:input"}
    _, network = load_run(tmp_path / "run")
    assert isinstance(network, models.VisionTransformer)


def test_exported_network_is_a_teacher(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also one with another width than the student, whose options are read off its weights."""
    weights = tmp_path / "teacher.safetensors"
    assert main(["export", str(teacher), "--out", str(weights)]) == 0
    assert main(_distill(weights, tmp_path / "run", "--no-hypernetize", "--option", "width=8")) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "images are normalised as the teacher's file says: mean 0.30" in text
    notes = json.loads((tmp_path / "run" / "run.json").read_text())
    assert notes["network"]["hypernet"] is None and notes["network"]["options"]["width"] == 8
    assert notes["settings"]["teacher"]["network"]["options"]["width"] == 4


def test_guessing_teacher_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.save(tmp_path / "t.safetensors", models.create("resnet8", in_channels=1, width=4).state_dict())
    assert main(_distill(tmp_path / "t.safetensors", tmp_path / "run")) == 2
    assert "where guessing has" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("classes", "channels", "message"),
    [
        (4, 1, "the teacher tells 4 classes apart; the images have 10"),
        (10, 3, "the teacher takes images of 3 channels; these have 1"),
    ],
)
def test_teacher_of_other_images_is_refused(
    classes: int, channels: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = models.create("resnet8", classes, in_channels=channels, width=4)
    checkpoint.save(tmp_path / "t.safetensors", model.state_dict())
    assert main(_distill(tmp_path / "t.safetensors", tmp_path / "run")) == 2
    assert message in capsys.readouterr().err


def test_teacher_is_measured_on_test_images_where_there_are_no_others(teacher: Path) -> None:
    splits = DataOptions("digits", val_fraction=0).load()
    _, model = load_run(teacher)
    images = (splits.test.images / 255 - splits.test.mean[0]) / splits.test.std[0]
    with torch.no_grad():
        expected = (model(images).argmax(1) == splits.test.labels).float().mean()
    images_of, accuracy = measure_teacher(model, splits, TrainConfig(device="cpu"))
    assert images_of == "test"
    assert accuracy == pytest.approx(float(expected), abs=0.005)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--dataset", "digit", "--model", "resnet8"], "unknown set 'digit' (did you mean digits?)"),
        (["train", "--dataset", "digits", "--model", "resnet9"], "unknown model 'resnet9' (did you mean"),
        (["train", "--dataset", "cifar10", "--model", "resnet8", "--data", "nowhere"], "nowhere"),
        (["train", "--dataset", "cifar10", "--model", "resnet8"], "CIFAR-10"),
        (["distill", *_DIGITS, "--teacher", "none.pt"], "no checkpoint at none.pt"),
        (
            ["distill", *_DIGITS, "--teacher", "none.pt", "--loss", "rdk"],
            "unknown loss 'rdk' (did you mean rkd or wcord?)",
        ),
        (["train", *_DIGITS, "--epochs", "0"], "epochs is 0; expected at least 1"),
        (["export", "nowhere", "--out", "x.pt2"], "there is no checkpoint at nowhere"),
    ],
)
def test_bad_input(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments)
    except SystemExit as end:  # tyro's, for values that a dataclass refuses
        code = int(end.code or 0)
    assert code == 2
    captured = capsys.readouterr()
    assert message in " ".join((captured.out + captured.err).replace("│", " ").split())
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_exported(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (student / "best.safetensors").read_bytes()
    (tmp_path / "best.safetensors").write_bytes(whole[: len(whole) // 2])
    foreign, plain = tmp_path / "foreign.safetensors", tmp_path / "x.safetensors"
    assert main(["export", str(student), "--out", str(foreign)]) == 0
    (tmp_path / "alone.safetensors").write_bytes(whole)
    for name, message in (
        ("best.safetensors", "is cut short or is not a safetensors file"),
        ("foreign.safetensors", "hyperfast did not write it"),
        ("alone.safetensors", "there is no run.json in"),
    ):
        capsys.readouterr()
        assert main(["export", str(tmp_path / name), "--out", str(plain)]) == 2
        assert message in capsys.readouterr().err
    assert not plain.exists()
    assert main(["export", str(student), "--out", str(tmp_path / "x.bin")]) == 2
    assert "its ending chooses the form: .safetensors, .pt2, .onnx" in capsys.readouterr().err
    assert main(["export", str(student), "--out", str(plain), "--condition", "1.5"]) == 2
    assert "outside [0, 1]" in capsys.readouterr().err


def test_ordinary_network_has_no_condition(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(teacher), "--out", str(tmp_path / "x.pt2"), "--condition", "0.5"]) == 2
    assert "it has no --condition" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT cannot be sent to another process")
def test_ctrl_c_leaves_a_checkpoint_to_export(tmp_path: Path) -> None:
    """In a process of its own."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "hyperfast", "train", *_DIGITS, *_SHORT[2:], "--hypernetize", *_SMALL]
    command += ["--limit", "100", "--log-every", "1", "--out", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "--epochs", "100000"], stderr=subprocess.PIPE, text=True, env=environment)
    try:
        deadline = time.monotonic() + 240  # of a busy machine
        while not (folder / "best.safetensors").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "stopped after step" in errors and "resume from" in errors and "Traceback" not in errors
    saved = checkpoint.load(folder / "checkpoint.safetensors")
    assert saved.metadata["kind"] == "training"
    export = [sys.executable, "-m", "hyperfast", "export", str(folder), "--out", str(tmp_path / "m.pt2")]
    done = subprocess.run(export, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
