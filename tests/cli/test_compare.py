"""`hyperfast compare`: how methods are written, and a comparison of a few digits."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from hyperfast.cli import compare as command
from hyperfast.cli import main
from hyperfast.cli.compare import LAYER_WISE, Method, parse_methods
from hyperfast.cli.network import load_run
from hyperfast.nn import Hypernetwork
from hyperfast.recipes import Comparison

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

_DIGITS = ["--dataset", "digits", "--model", "resnet8", "--option", "width=4", "--device", "cpu"]
_SHORT = ["--epochs", "1", "--batch-size", "20", "--lr", "0.05", "--limit", "40", "--hidden", "4", "8"]


def _compare(teacher: Path, folder: Path, *more: str) -> list[str]:
    return ["compare", *_DIGITS, *_SHORT, "--teacher", str(teacher), "--out", str(folder), *more]


def _methods(*names: str) -> list[str]:
    return [word for name in names for word in ("--method", name)]


@pytest.mark.parametrize(
    ("text", "method", "name"),
    [
        ("plain", Method("plain"), "plain"),
        ("mip", Method(), "mip"),
        ("hyperfan_out", Method("hyperfan_out"), "hyperfan_out"),
        ("bias_hyperinit", Method("bias_hyperinit"), "bias_hyperinit"),
        ("at", Method(losses=("at",)), "at"),
        ("kd", Method(losses=("kd",)), "kd"),
        ("at=500.0+kd=0.9", Method(losses=("at=500", "kd=0.9")), "at=500+kd=0.9"),
        ("mip+at", Method(losses=("at",)), "at"),
        ("ab@0:0.3+at=9@:0.5", Method(losses=("ab@0:0.3", "at=9@0:0.5")), "ab@0:0.3+at=9@0:0.5"),
        ("noce:ab@0:0.3+kd", Method(losses=("ab@0:0.3", "kd"), labels=False), "noce:ab@0:0.3+kd"),
        ("at=1e4+plain", Method("plain", ("at=10000",)), "plain+at=10000"),
        ("hyperfan_in+kd", Method("hyperfan_in", ("kd",)), "hyperfan_in+kd"),
        ("noce:at+kd", Method(losses=("at", "kd"), labels=False), "noce:at+kd"),
    ],
)
def test_methods_as_they_are_written(text: str, method: Method, name: str) -> None:
    assert Method.parse(text) == method
    assert method.name == name and Method.parse(name) == method


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("att", "--method 'att': unknown name 'att' (did you mean at?); choose from plain, mip, bias_hyperinit,"),
        ("at+hyperfan", "unknown name 'hyperfan' (did you mean hyperfan_"),
        ("", "--method '': unknown name ''; choose from"),
        ("at+", "--method 'at+': unknown name ''"),
        ("mip=2", "--method 'mip=2': mip is no loss and has no weight"),
        ("mip+plain", "a student starts from mip or from plain, not from both"),
        ("noce:mip", "--method 'noce:mip': nothing to learn from; add a loss, such as noce:mip+kd"),
        ("nce:at", "--method 'nce:at': only noce: may stand in front, not nce:"),
        ("at=x+kd", "--method 'at=x+kd': at=x: 'x' is no number"),
        ("at=-1", "--method 'at=-1': at=-1: the weight must be a positive number"),
        ("at+at=3", "--method 'at+at=3': at is given more than once"),
        ("noce:at+hcd", "--method 'noce:at+hcd': hcd has the labels in it; leave noce: out"),
    ],
)
def test_methods_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Method.parse(text)


def test_without_methods_all_losses_are_compared() -> None:
    assert [*parse_methods((), hypernetize=True)] == ["mip", *LAYER_WISE]
    assert [*parse_methods((), hypernetize=False)] == ["plain", *LAYER_WISE]
    assert [*parse_methods(("plain", "at", "plain+kd"), hypernetize=False)] == ["plain", "at", "plain+kd"]
    with pytest.raises(ValueError, match="--method at=500 is given more than once"):
        parse_methods(("at=500", "at=5e2"), hypernetize=True)
    for name in ("mip", "hyperfan_in", "hyperfan_in+at"):
        message = f"--method {name} needs a hypernetwork; leave --no-hypernetize out, or give plain"
        with pytest.raises(ValueError, match=re.escape(message)):
            parse_methods((name,), hypernetize=False)


@pytest.fixture(scope="module")
def compared(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "compare"
    methods = _methods("plain", "mip", "hyperfan_in+at=9", "noce:kd=2")
    assert main(_compare(teacher, folder, *methods, "--seeds", "1", "--seed", "3")) == 0
    return folder


def test_a_comparison_of_digits(compared: Path) -> None:
    comparison = Comparison.load(compared)
    names = ["plain", "mip", "hyperfan_in+at=9", "noce:kd=2"]
    assert [(run.method, run.seed) for run in comparison.runs] == [(name, 3) for name in names]
    assert comparison.methods["noce:kd=2"]["weights"] == {"kd": 2.0}
    assert comparison.methods["hyperfan_in+at=9"]["weights"] == {"labels": 1.0, "at": 9.0}
    folders = ["plain-seed3", "mip-seed3", "hyperfan_in+at=9-seed3", "noce-kd=2-seed3"]
    for folder, name in zip(folders, names, strict=True):
        run, network = load_run(compared / folder)
        assert isinstance(network, Hypernetwork) is (name != "plain")
        assert run.settings["method"] == name and run.settings["training"]["seed"] == 3
        assert {"run.json", "best.safetensors"} <= {path.name for path in (compared / folder).iterdir()}
    inits = [load_run(compared / folder)[0].network.hypernet for folder in folders[1:]]
    assert [options and options.init for options in inits] == ["hyperlight", "hyperfan_in", "hyperlight"]


def test_the_same_command_adds_what_is_new(
    compared: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (compared / "mip-seed3" / "metrics.jsonl").stat().st_mtime_ns
    assert main(_compare(teacher, compared, *_methods("mip", "plain"), "--seeds", "2", "--seed", "3", "--resume")) == 0
    text = capsys.readouterr().out
    assert (compared / "mip-seed3" / "metrics.jsonl").stat().st_mtime_ns == before
    assert re.findall(r"^(\S+), seed (\d): validation", text, re.M) == [("mip", "4"), ("plain", "4")]
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert [line[:2] for line in lines[:5]] == [
        ["teacher", "–"], ["plain", "2"], ["mip", "2"], ["hyperfan_in+at=9", "1"], ["noce:kd=2", "1"]
    ]  # fmt: skip
    assert lines[5][0] == "plain" and lines[5][2] == "2" and "accuracy against mip, seed by seed" in text
    assert text.rstrip().endswith(str(compared / "report.html"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--temperature", "2", *_methods("noce:kd=2")], "method noce:kd=2.temperature was 4.0 and is now 2.0"),
        (["--hidden", "4", *_methods("mip")], "student.hypernet.hidden was [4, 8] and is now [4]"),
        (["--limit", "50", *_methods("mip")], "data.limit was 40 and is now 50"),
    ],
)
def test_other_settings_are_refused(
    more: list[str], message: str, compared: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(compared.iterdir())
    assert main(_compare(teacher, compared, *more)) == 2
    assert message in capsys.readouterr().err
    assert sorted(compared.iterdir()) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "rdk"], "unknown name 'rdk' (did you mean rkd or wcord?)"),
        (["--seeds", "0"], "--seeds is 0; give at least 1"),
        (["--resume"], "there is no comparison.json in "),
        (["--cross-entropy-weight", "0", "--method", "mip"], "--cross-entropy-weight 0 leaves mip nothing to learn"),
        (["--no-hypernetize", "--method", "mip"], "--method mip needs a hypernetwork"),
    ],
)
def test_bad_input(
    more: list[str], message: str, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_compare(teacher, tmp_path / "new", *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_where_nothing_finishes_the_command_fails(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = _compare(teacher, Path("x"), *_methods("at=1e30"), "--seeds", "2")
    del line[line.index("--out") : line.index("--out") + 2]
    assert main(line) == 2
    captured = capsys.readouterr()
    assert "at=1e+30, seeds 0, 1 failed: FloatingPointError: the loss is not finite" in captured.out
    assert "every run has failed, the first with FloatingPointError" in captured.err
    assert Comparison.load("runs/compare-digits-resnet8").runs[0].state == "failed"


def test_ordinary_students(teacher: Path, tmp_path: Path) -> None:
    more = ["--no-hypernetize", *_methods("kd"), "--seeds", "1"]
    assert main(_compare(teacher, tmp_path / "run", *more)) == 0
    assert not isinstance(load_run(tmp_path / "run" / "kd-seed0")[1], Hypernetwork)
    notes = json.loads((tmp_path / "run" / "comparison.json").read_text())
    assert notes["settings"]["student"]["hypernet"] is None


def test_ctrl_c_shows_what_is_done(
    compared: Path, teacher: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt("stopped in mip, seed 4")

    monkeypatch.setattr(command, "compare", interrupted)
    assert main(_compare(teacher, compared, *_methods("mip"))) == 130
    captured = capsys.readouterr()
    assert "│ mip" in captured.out and "stopped in mip, seed 4" in captured.err


@pytest.mark.parametrize(("width", "last"), [(160, True), (100, False), (60, False)])
def test_narrow_terminals_show_less_and_cut_nothing(compared: Path, width: int, last: bool) -> None:
    text = io.StringIO()
    command._print(Comparison.load(compared), Console(file=text, width=width, force_terminal=True, color_system=None))
    table = text.getvalue()
    assert ("last epoch" in table) is last and "…" not in table
    assert max(map(len, table.splitlines()[:-1])) <= width and "hyperfan_in+at=9" in table
