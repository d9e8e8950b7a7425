"""Comparisons of methods: what is run, what is not run again, and what the tables and the page say."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_task
import torch
from torch import nn

import hyperfast
from hyperfast.recipes import CHECKPOINT, Comparison, DistillConfig, LossTerm, checkpoint, compare, train
from hyperfast.recipes import cost as cost_module
from hyperfast.recipes.compare import _launches
from hyperfast.recipes.compare_report import failed, page, paired_table, table
from hyperfast.recipes.comparison import ComparedRun, TeacherAccuracy, run_folder
from hyperfast.recipes.cost import LaunchCounter, kernels
from hyperfast.recipes.result import EpochRecord, TrainResult

pytest.importorskip("matplotlib")

METHODS: Mapping[str, DistillConfig | None] = {
    "mip": None,
    "noce:at": DistillConfig(cross_entropy_weight=0.0),
    "at=1e30": DistillConfig({"at": LossTerm(1e30)}),
    "plain": None,
}
CONFIG = tiny_task.config(epochs=2, log_every=2)
WEIGHTS = (CHECKPOINT, "best.safetensors", "last.safetensors")


def student(method: str, seed: int) -> nn.Module:
    """Draws from the global state, which the recipe seeds."""
    network = tiny_task.Network(width=4)
    return network if method == "plain" else hyperfast.hypernetize(network, hidden=(4, 8))


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    torch.set_num_threads(1)
    model = tiny_task.network(seed=9)
    train(model, tiny_task.splits(), tiny_task.config(epochs=4))
    return model


def run(
    folder: Path, teacher: nn.Module, methods: Mapping[str, DistillConfig | None] = METHODS, **more: Any
) -> tuple[Comparison, list[str]]:
    """The comparison, and the folders of the runs that it made."""
    made: list[str] = []
    settings = {"student": student, "config": CONFIG, "seeds": (0, 1), **more}
    comparison = compare(
        methods,
        settings.pop("student"),
        teacher,
        settings.pop("data", tiny_task.splits()),
        settings.pop("config"),
        folder=folder,
        on_run=lambda run: made.append(run.folder.name),
        **settings,
    )
    return comparison, made


@pytest.fixture(scope="module")
def whole(teacher: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, list[str]]:
    """A comparison that nothing interrupted."""
    torch.set_num_threads(1)
    state = torch.get_rng_state()
    outcome = run(tmp_path_factory.mktemp("whole"), teacher)
    assert torch.equal(torch.get_rng_state(), state)
    return outcome


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{name}:{key}": tensor for name in WEIGHTS for key, tensor in checkpoint.load(folder / name).tensors.items()
    }


def assert_same(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_runs_go_seed_by_seed_and_a_failure_stops_none(whole: tuple[Comparison, list[str]]) -> None:
    comparison, made = whole
    names = ["mip", "noce-at", "at=1e30", "plain"]
    assert made == [f"{name}-seed{seed}" for seed in (0, 1) for name in names]
    assert [run.folder.name for run in comparison.runs] == made
    assert [run.state for run in comparison.runs] == ["finished", "finished", "failed", "finished"] * 2
    failure = comparison.runs[2]
    assert failure.result is None and failure.error is not None
    assert failure.error.startswith("FloatingPointError: the loss is not finite any more after step")
    for run_made in comparison.runs:
        if run_made.state == "finished":
            assert {*WEIGHTS, "metrics.jsonl"} == {path.name for path in run_made.folder.iterdir()}


def test_a_run_is_what_the_recipes_alone_make(
    whole: tuple[Comparison, list[str]], teacher: nn.Module, tmp_path: Path
) -> None:
    comparison, _ = whole
    torch.manual_seed(1)
    result = train(student("mip", 1), tiny_task.splits(), replace(CONFIG, seed=1), folder=tmp_path)
    found = next(run for run in comparison.runs if (run.method, run.seed) == ("mip", 1))
    assert found.result is not None
    assert found.result.history == result.history
    assert {**found.result.numbers(), "ms_per_step": 0, "peak_memory": 0} == {
        **result.numbers(), "ms_per_step": 0, "peak_memory": 0
    }  # fmt: skip
    best = checkpoint.load(found.folder / "best.safetensors").tensors
    assert all(torch.equal(best[name], tensor) for name, tensor in result.best_weights.items())
    assert comparison.teacher.test == pytest.approx(1.0, abs=0.1)
    assert comparison.target == pytest.approx(0.95 * (comparison.teacher.validation or 0))


def test_the_folder_holds_the_comparison(whole: tuple[Comparison, list[str]]) -> None:
    comparison, _ = whole
    assert Comparison.load(comparison.folder) == comparison
    with (comparison.folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["teacher", *(run.method for run in comparison.runs)]
    for row, compared in zip(rows[1:], comparison.runs, strict=True):
        assert row["folder"] == compared.folder.name and row["state"] == compared.state
        if compared.result is not None:
            assert float(row["test_accuracy_best"]) == compared.result.test_accuracy_best
            assert float(row["ms_per_step"]) == compared.result.ms_per_step and row["error"] == ""
        else:
            assert row["test_accuracy_best"] == "" and "FloatingPointError" in row["error"]
    values = json.loads((comparison.folder / "results.json").read_text())
    assert [entry["seed"] for entry in values["runs"]] == [0] * 4 + [1] * 4
    assert [entry["n"] for entry in values["paired"]] == [2, 2]
    assert values["methods"]["noce:at"]["weights"] == {"at": 1000.0} and values["methods"]["mip"] is None


def test_page_needs_nothing_else(whole: tuple[Comparison, list[str]]) -> None:
    comparison, _ = whole
    markup = (comparison.folder / "report.html").read_text(encoding="utf-8")
    assert markup.count("<svg") == 4
    assert "Against mip, seed by seed" in markup and "1000 × at" in markup
    assert "<dt>at=1e30, seeds 0, 1</dt><dd>failed: FloatingPointError" in markup
    assert not re.search(r"https?://(?!www\.w3\.org/)|<script|nan", markup)


def test_the_same_again_runs_nothing(whole: tuple[Comparison, list[str]], teacher: nn.Module) -> None:
    comparison, _ = whole
    before = {path: path.stat().st_mtime_ns for path in comparison.folder.glob("*/*")}

    def none(method: str, seed: int) -> nn.Module:
        raise AssertionError("no student is wanted")

    again, made = run(comparison.folder, teacher, student=none, config=replace(CONFIG, checkpoint_every=1))
    assert made == [] and again.runs == comparison.runs
    assert before == {path: path.stat().st_mtime_ns for path in comparison.folder.glob("*/*")}


def test_methods_and_seeds_can_be_added_and_failures_tried_again(teacher: nn.Module, tmp_path: Path) -> None:
    def fails(method: str, seed: int) -> nn.Module:
        raise RuntimeError("out of luck")

    first, made = run(tmp_path, teacher, {"plain": None}, seeds=(1,), student=fails)
    assert made == ["plain-seed1"] and first.runs[0].error == "RuntimeError: out of luck"
    assert not any(run.result for run in first.runs)
    assert "<svg" not in (tmp_path / "report.html").read_text()
    more, made = run(tmp_path, teacher, {"kd": DistillConfig({}, kd_weight=1.0)}, seeds=(0,))
    assert made == ["kd-seed0"] and [*more.methods] == ["plain", "kd"]
    _, made = run(tmp_path, teacher, {"kd": DistillConfig({}, kd_weight=1.0), "plain": None})
    assert made == ["plain-seed0", "kd-seed1"]

    def stops(method: str, seed: int) -> nn.Module:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="stopped in plain, seed 1, after 1 of 2 runs"):
        run(tmp_path, teacher, {"plain": None}, student=stops, retry=True)
    last, made = run(tmp_path, teacher, {"plain": None})
    assert made == ["plain-seed1"] and {run.state for run in last.runs} == {"finished"}
    assert [run.folder.name for run in last.runs] == ["plain-seed0", "kd-seed0", "plain-seed1", "kd-seed1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": replace(CONFIG, lr=0.5)}, "training.lr was 0.02 and is now 0.5"),
        ({"methods": {"noce:at": DistillConfig({"at": LossTerm(5.0)})}}, "method noce:at.losses.at.beta was None and"),
        ({"methods": {"mip": DistillConfig()}}, "method mip was None and is now"),
        ({"settings": {"student": {"width": 4}}}, "student was None and is now {'width': 4}"),
        ({"data": tiny_task.splits(val=20)}, "images.val was 24 and is now 20"),
        ({"teacher": tiny_task.network(seed=3)}, "teacher_sha256 was"),
    ],
)
def test_other_settings_are_refused(
    changes: dict[str, Any], message: str, whole: tuple[Comparison, list[str]], teacher: nn.Module
) -> None:
    folder = whole[0].folder
    before = (folder / "comparison.json").read_bytes()
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        run(folder, changes.pop("teacher", teacher), changes.pop("methods", METHODS), **changes)
    assert "holds a comparison with other settings" in str(error.value) and "another folder" in str(error.value)
    assert (folder / "comparison.json").read_bytes() == before


def once(action: Callable[[], object], call: int) -> Callable[..., None]:
    """A hook that does something at its so-many-th call."""
    calls = iter(range(1, 1000))

    def hook(*_: object) -> None:
        if next(calls) == call:
            action()

    return hook


def test_ctrl_c_leaves_a_checkpoint_and_the_tables(
    whole: tuple[Comparison, list[str]], teacher: nn.Module, tmp_path: Path
) -> None:
    two = {name: METHODS[name] for name in ("plain", "mip")}

    def interrupted(method: str, seed: int) -> nn.Module:
        network = student(method, seed)
        if (method, seed) == ("mip", 0):
            network.register_forward_pre_hook(once(lambda: signal.raise_signal(signal.SIGINT), 4))
        return network

    with pytest.raises(KeyboardInterrupt, match=r"stopped in mip, seed 0, after 1 of 4 runs; the same again goes on"):
        run(tmp_path, teacher, two, student=interrupted)
    stopped = Comparison.load(tmp_path)
    assert [run.state for run in stopped.runs] == ["finished", "not finished", "not finished", "not finished"]
    assert table(stopped)[1][2][:2] == ["mip", "0 of 2"]
    assert "1 of 4 runs finished" in (tmp_path / "report.html").read_text()
    comparison, made = run(tmp_path, teacher, two)
    assert made == ["mip-seed0", "plain-seed1", "mip-seed1"]
    for name in (*made, "plain-seed0"):
        assert_same(tmp_path / name, whole[0].folder / name)
    assert comparison.of("mip").values("test_accuracy_last") == whole[0].of("mip").values("test_accuracy_last")


PROGRAM = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import tiny_task, test_compare
from hyperfast.recipes import checkpoint

teacher = tiny_task.network(seed=9)
checkpoint.load_module(teacher, checkpoint.load(sys.argv[3]).tensors, "teacher")
def student(method, seed):
    network = test_compare.student(method, seed)
    if (method, seed) == ("noce:at", 0):
        # Call 10 is step 7: the first shows the shapes of the maps; five steps, two batches of validation are an epoch.
        network.register_forward_pre_hook(test_compare.once(lambda: os.kill(os.getpid(), signal.SIGKILL), 10))
    return network

methods = {name: test_compare.METHODS[name] for name in ("mip", "noce:at")}
config = test_compare.replace(test_compare.CONFIG, checkpoint_every=1)
test_compare.run(Path(sys.argv[2]), teacher, methods, student=student, config=config)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_comparison_killed_in_mid_run_ends_with_the_same_bits(
    whole: tuple[Comparison, list[str]], teacher: nn.Module, tmp_path: Path
) -> None:
    checkpoint.save(tmp_path / "teacher.safetensors", teacher.state_dict())
    folder = tmp_path / "killed"
    command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), str(folder)]
    command.append(str(tmp_path / "teacher.safetensors"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    saved: Any = checkpoint.load(folder / "noce-at-seed0" / CHECKPOINT).metadata
    assert saved["state"]["step"] == 6
    with (folder / "noce-at-seed0" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "resu')  # as if the line had been cut off
    assert [run.state for run in Comparison.load(folder).runs][:2] == ["finished", "not finished"]
    _, made = run(folder, teacher, {name: METHODS[name] for name in ("mip", "noce:at")})
    assert made == ["noce-at-seed0", "mip-seed1", "noce-at-seed1"]
    for name in (*made, "mip-seed0"):
        assert_same(folder / name, whole[0].folder / name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {}}, "methods is empty; give at least one"),
        ({"seeds": ()}, "seeds is empty; give at least one"),
        ({"seeds": (0, 1, 0)}, "seeds has 0 twice"),
        ({"methods": {"a b": None, "A:b": None}}, "methods 'a b' and 'A:b' would share a folder; rename one of them"),
        ({"settings": {"images": 1}}, "settings has 'images', which is the recipe's own; give it another name"),
        ({"config": replace(CONFIG, batch_size=81)}, "batch_size is 81 but the set has 80 images"),
        ({"config": replace(CONFIG, device="gpu")}, "device is 'gpu'; use"),
    ],
)
def test_input_that_cannot_be(changes: dict[str, Any], message: str, teacher: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        run(tmp_path / "new", teacher, changes.pop("methods", METHODS), **changes)
    assert not (tmp_path / "new").exists()


def test_folders_without_a_comparison(tmp_path: Path, teacher: nn.Module) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no comparison.json in .*; hyperfast compare writes it"):
        Comparison.load(tmp_path)
    (tmp_path / "comparison.json").write_text('{"settings": {}')
    for call in (Comparison.load, lambda folder: run(folder, teacher)):
        with pytest.raises(ValueError, match=r"comparison.json is damaged or was not written by this hyperfast"):
            call(tmp_path)


def test_missing_packages_are_told_before_anything_is_run(
    monkeypatch: pytest.MonkeyPatch, teacher: nn.Module, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r"hyperfast\[tensorboard\]"):
        run(tmp_path / "a", teacher, tensorboard=True)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'hyperfast\[demo\]'"):
        run(tmp_path / "b", teacher)
    assert not (tmp_path / "b").exists()


def test_a_full_disk_stops_everything(monkeypatch: pytest.MonkeyPatch, teacher: nn.Module, tmp_path: Path) -> None:
    def full(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(OSError, match="disk full"):
        run(tmp_path, teacher)


# What the tables make of numbers.


TEACHER = TeacherAccuracy(0.8, 0.7)


def result(accuracies: list[float], test: float | None, val: bool = True) -> TrainResult:
    history = tuple(EpochRecord(e, 1.0, 0.5, 1.0, a if val else None) for e, a in enumerate(accuracies, start=1))
    return TrainResult(history, 1, test, test, 5, (2.0, 4.0, 3.0), 3 * 2**20, {})


def comparison_of(
    results: Mapping[tuple[str, int], TrainResult | str | None],
    teacher: TeacherAccuracy = TEACHER,
    launches: Mapping[str, int] | None = None,
) -> Comparison:
    runs = tuple(
        ComparedRun(
            method,
            seed,
            Path(run_folder(method, seed)),
            value if isinstance(value, TrainResult) else None,
            value if isinstance(value, str) else None,
        )
        for (method, seed), value in results.items()
    )
    images = {"train": 1, "val": 20, "test": 30}
    environments = ({"torch": "1", "processor": "x"}, {"torch": "2", "processor": "x"})
    return Comparison(
        Path(),
        dict.fromkeys(run.method for run in runs),
        runs,
        teacher,
        launches or {},
        {"images": images, "student": {"model": "net", "hidden": [4, 8], "none": None}},
        environments,
    )


def test_table_and_pairs() -> None:
    comparison = comparison_of(
        {
            ("mip", 0): result([0.7, 0.9], 0.5),
            ("at", 0): result([0.8, 0.7], 0.6),
            ("mip", 1): result([0.7, 0.75], 0.7),
            ("at", 1): result([0.9, 0.9], 0.9),
            ("mip", 2): None,
            ("at", 2): "ValueError: no",
            ("kd", 0): result([0.1, 0.1], 0.1),
        },
        launches={"at": 1234},
    )
    columns, rows = table(comparison)
    assert [" ".join(column.split()) for column in columns] == [
        "method", "runs", "validation %, best epoch", "validation %, last epoch", "test %, best epoch",
        "test %, last epoch", "epochs to 95 % of teacher", "ms per step", "peak MiB", "launches",
    ]  # fmt: skip
    assert rows == [
        ["teacher", None, "80.00", None, "70.00", None, None, None, None, None],
        ["mip", "2 of 3", "70.00 ± 0.00", "82.50 ± 10.61", "60.00 ± 14.14", "60.00 ± 14.14", "2.0 (1 of 2 runs)",
         "3.0", "3", None],
        ["at", "2 of 3", "85.00 ± 7.07", "80.00 ± 14.14", "75.00 ± 21.21", "75.00 ± 21.21", "1.0", "3.0", "3", "1,234"],
        ["kd", "1", "10.00", "10.00", "10.00", "10.00", "not reached", "3.0", "3", None],
    ]  # fmt: skip
    brief = table(comparison, brief=True)
    assert len(brief[0]) == 8 and brief[1][2][:4] == ["at", "2 of 3", "85.00 ± 7.07", "75.00 ± 21.21"]
    assert comparison.baseline == "mip"
    (pair,) = comparison.paired("mip")
    assert pair.method == "at" and pair.differences == pytest.approx({0: 0.1, 1: 0.2})
    assert pair.mean == pytest.approx(0.15) and pair.std == pytest.approx(0.1 / 2**0.5)
    columns, rows = paired_table([pair])
    assert columns == ["method", "minus mip", "n", "seed 0", "seed 1"]
    assert rows == [["at", "+15.00 ± 7.07", "2", "+10.00", "+20.00"]]
    assert failed(comparison) == {"at, seed 2": "failed: ValueError: no"}
    markup = page(comparison).render()
    assert "Methods compared on net" in markup and "<dt>student</dt><dd>model net, hidden 4 8</dd>" in markup
    assert "<dt>torch</dt><dd>1; 2</dd>" in markup and "Launches: kernels of one training step" in markup


def test_without_test_or_validation_images_their_columns_are_left_out() -> None:
    no_test = comparison_of({("plain", s): result([0.6], None) for s in (0, 1)}, TeacherAccuracy(0.8, None))
    assert [column.split(",")[0] for column in table(no_test)[0]][2:4] == ["validation\u00a0%"] * 2
    assert no_test.baseline == "plain" and no_test.paired("plain") == []
    assert "validation accuracy" in page(no_test).render()
    no_val = comparison_of({("at", 0): result([0.6], 0.5, val=False)}, TeacherAccuracy(None, 0.7))
    columns, rows = table(no_val)
    assert len(columns) == 6 and rows[1] == ["at", "1", "50.00", "50.00", "3.0", "3"]
    assert no_val.target is None and no_val.baseline is None
    neither = comparison_of({("at", 0): result([0.6], None, val=False)}, TeacherAccuracy(None, None))
    assert table(neither)[1][1] == ["at", "1", "3.0", "3"]
    assert page(neither).render().count("<svg") == 1


# Launches. The GPU's own test is in tests/gpu.


def test_launches_are_kernels_and_not_copies() -> None:
    def event(kind: str, name: str) -> SimpleNamespace:
        return SimpleNamespace(device_type=SimpleNamespace(name=kind), name=name)

    events = [event("CUDA", "gemm"), event("CUDA", "Memcpy DtoH"), event("CPU", "aten::mm"), event("CUDA", "add")]
    assert kernels(events) == 2


def test_one_step_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    class Profile:
        def __init__(self, activities: object) -> None:
            self.start: Callable[[], None] = lambda: said.append("start")
            self.stop: Callable[[], None] = lambda: said.append("stop")

        def events(self) -> list[SimpleNamespace]:
            return [SimpleNamespace(device_type=SimpleNamespace(name="CUDA"), name="gemm")]

    monkeypatch.setattr(cost_module.profiler, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: said.append("wait"))
    counter = LaunchCounter(torch.device("cuda"))
    for step in range(1, LaunchCounter.steps + 1):
        said.append(str(step))
        counter(step)
    assert said == ["1", "2", "3", "4", "wait", "start", "5", "wait", "stop", "6"]
    assert counter.launches == 1


def test_a_cpu_launches_nothing(teacher: nn.Module) -> None:
    """And the steps that would be counted are made under any settings."""
    settings = replace(CONFIG, batch_size=80, warmup_epochs=2.0, checkpoint_every=1, ema=0.9)
    made = student("mip", 0)
    before = [parameter.clone() for parameter in made.parameters()]
    assert _launches(made, METHODS["noce:at"], teacher, tiny_task.splits(), settings) is None
    pairs = zip(before, made.parameters(), strict=True)
    assert all(torch.allclose(old, new, atol=1e-5) for old, new in pairs)
