"""The command itself: help, exit codes, errors as one line."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from hyperfast.cli import main
from hyperfast.cli.suggest import nearest

pytest.importorskip("tyro")


def _help(capsys: pytest.CaptureFixture[str], command: str) -> str:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("train", ["--dataset", "--hypernetize", "--epochs", "hyperfast train --dataset digits"]),
        ("distill", ["--teacher", "--loss", "weight 1000", "--no-hypernetize", "--loss at --epochs 3"]),
        ("compare", ["--method", "noce:at+kd", "--seeds", "--temperature", "--retry", "--method hyperfan_in"]),
        (
            "compress",
            ["--hidden", "--phase2", "--rounds", "3 h^2 + 253 h + 9", "OUT.run", "hyperfast compress resnet20"],
        ),
        ("inherit", ["--rank", "--heads", "--kd", "--enough", "--recalibrate", "runs/inherit-DATASET-MODEL"]),
        ("export", ["--fold", "--condition", ".safetensors", ".pt2", ".onnx", "hyperfast export runs/"]),
        ("reconstruct", ["--out", "against convolutions", "hyperfast reconstruct r20.hf.safetensors --out"]),
        ("analyze", ["--dataset", "1000 on the CPU", "--severities", "--force", "hyperfast analyze resnet20"]),
        ("demo", ["--seeds", "runs of each method", "runs/demo", "hyperfast demo --seeds 1"]),
        ("env", ["hyperfast env"]),
    ],
)
def test_help_teaches(capsys: pytest.CaptureFixture[str], command: str, expected: list[str]) -> None:
    text = _help(capsys, command)
    for words in expected:
        assert words in text
    assert "MISSING" not in text


def test_help_of_training_settings_says_units_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    text = _help(capsys, "train")
    assert "passes over the training set" in text and "fractions are allowed" in text and "(default: 40)" in text
    assert "pixels" in text and "runs/train-DATASET-MODEL" in text


def test_overview_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    commands = ("train", "distill", "compare", "compress", "inherit", "export", "reconstruct")
    commands += ("analyze", "demo", "env")
    for command in commands:
        assert f"  {command}" in text
    assert main([]) == 2


def test_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distil"]) == 2
    assert "there is no command 'distil' (did you mean distill?)" in capsys.readouterr().err


def test_env_prints_versions_and_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text and "backend" in text


def test_unknown_option_ends_with_2() -> None:
    with pytest.raises(SystemExit) as end:
        main(["export", "x", "--out", "y.pt2", "--conditoin", "0.5"])
    assert end.value.code == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [(ValueError("bad [number]"), 2), (FileNotFoundError("no such"), 2), (KeyboardInterrupt("stopped there"), 130)],
)
def test_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    from hyperfast.cli.env import Env

    def run(self: Env, console: Any) -> None:
        raise error

    monkeypatch.setattr(Env, "run", run)
    assert main(["env"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and str(error) in captured.err
    if code == 2:
        with pytest.raises(type(error)):
            main(["env", "--debug"])


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from hyperfast.cli.env import Env

    def run(self: Env, console: Any) -> None:
        raise AssertionError("impossible")

    monkeypatch.setattr(Env, "run", run)
    with pytest.raises(AssertionError):
        main(["env"])


def test_module_is_the_command_and_import_stays_light() -> None:
    script = (
        "import sys, hyperfast\n"
        "heavy = {'tyro', 'rich', 'matplotlib', 'sklearn', 'triton'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import runpy\n"
        "sys.argv = ['hyperfast', '--version']\n"
        "runpy.run_module('hyperfast', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("hyperfast 0.")


def test_nearest() -> None:
    assert nearest("resnet21", ["resnet20", "vgg"]) == " (did you mean resnet20?)"
    assert nearest("zzz", ["resnet20"]) == ""
