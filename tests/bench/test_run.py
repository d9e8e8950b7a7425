"""The program from the command line to the rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import machine
import memory
import pytest
import registry
import run
import store
import torch
from registry import Work

CPU = torch.device("cpu")
FAST = ["--quick", "--op", "attention_transfer", "--repeats", "2", "--threads", "1"]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_quick_run_writes_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*FAST, "--provider", "hyperfast", "--provider", "eager", "--no-verify", "--csv", str(tmp_path)]
    assert run.main(arguments) == 0
    rows = store.read(tmp_path / "attention_transfer-cpu.csv")
    assert [row["provider"] for row in rows] == ["hyperfast", "eager (RepDistiller's form)"]
    for row in rows:
        assert float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert row["repeats"] == "2"
        assert int(row["bytes"]) == 3 * 4 * (4 * 8 * 64 + 4 * 16 * 16)
        assert float(row["error"]) < 1e-5
        assert row["verified"] == "no"
        assert row["threads"] == "1"
        assert row["torch"] == torch.__version__
    assert store.ratio(rows[1], rows) is None
    assert "measured ceilings: copy" in capsys.readouterr().out


def test_red_tests_print_no_ratio_and_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(run, "run_tests", lambda op, device: run_verdict(False))
    assert run.main([*FAST, "--provider", "hyperfast", "--csv", str(tmp_path / "rows.csv")]) == 1
    assert "tests RED, no ratios: 1 failed" in capsys.readouterr().out
    assert [row["verified"] for row in store.read(tmp_path / "rows.csv")] == ["no"]


def run_verdict(green: bool):
    from verify import Verdict

    return Verdict(green, "1 passed" if green else "1 failed")


def test_a_wrong_provider_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    op = registry.operation("attention_transfer")
    ours = op.provider("hyperfast")

    def off(inputs: object) -> Work:
        work = ours.build(inputs)
        return Work(work.step, lambda: {name: value * 1.01 for name, value in work.results().items()})

    broken = replace(op, providers=[ours, replace(ours, name="peer", build=off)])
    monkeypatch.setattr(run, "operation", lambda name: broken)
    monkeypatch.setattr(run, "run_tests", lambda op, device: run_verdict(True))
    assert run.main([*FAST, "--csv", str(tmp_path)]) == 1
    assert "WRONG: peer is left out" in capsys.readouterr().out
    rows = store.read(tmp_path / "attention_transfer-cpu.csv")
    assert [(row["provider"], row["verified"]) for row in rows] == [("hyperfast", "yes")]


def test_quick_run_writes_nothing_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "RESULTS", tmp_path)
    assert run.main([*FAST, "--provider", "hyperfast", "--no-verify"]) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "nothing"], "invalid choice: 'nothing'"),
        (["--device", "tpu"], "--device is 'tpu'; choose cpu or cuda"),
        (["--graph"], "--graph needs --device cuda"),
        (["--repeats", "0"], "--repeats is 0; expected at least 1"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.parse(arguments)
    assert message in capsys.readouterr().err


def test_cases_and_list(capsys: pytest.CaptureFixture[str]) -> None:
    op = registry.operation("generate")
    assert [case.name for case in run.chosen_cases(op, ["VGG"], small=False)] == ["VGG-11-BN, widths 16-16-16"]
    assert not any(case.small for case in run.chosen_cases(op, None, small=False))
    assert run.main(["--list"]) == 0
    assert "provider HyperLight 0.0.5" in capsys.readouterr().out


def test_profile_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--profile", "--quick", "--op", "attention_transfer"]) == 0
    assert "hyperfast::attention_transfer" in capsys.readouterr().out


def test_ceilings_are_positive() -> None:
    found = machine.measure_ceilings(CPU, repeats=2, scale=0.001)
    assert found.copy_gbps > 0 and found.matmul_gflops > 0


def test_environment_names_no_host_or_folder() -> None:
    import platform

    where = machine.environment(CPU)
    assert where["processor"].endswith("cores")
    text = " ".join(where.values())
    assert str(machine.ROOT) not in text and platform.node() not in where.values()
    assert set(where) <= set(store.FIELDS)


def test_memory_in_a_process_of_its_own() -> None:
    found = memory.measure_in_process("attention_transfer", "4x8x8x8, 4x16x4x4", "hyperfast", threads=1)
    assert found is None or (found.peak >= found.state - 1 and found.peak < 100)


def test_memory_failure_is_told() -> None:
    with pytest.raises(RuntimeError, match="memory of nobody on generate could not be measured"):
        memory.measure_in_process("generate", "x", "nobody", threads=1)
