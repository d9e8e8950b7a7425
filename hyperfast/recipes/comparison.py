"""What a comparison of methods has come to, as its folder holds it."""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hyperfast.recipes.checkpoint import as_json, differences, write_json
from hyperfast.recipes.result import TrainResult
from hyperfast.recipes.seed_runs import SeedRuns

RECORD = "comparison.json"
_TARGET = 0.95


def run_folder(method: str, seed: int) -> str:
    """Name of the folder of a run; what not every file system takes becomes a hyphen."""
    return f"{re.sub(r'[^A-Za-z0-9_.=+-]', '-', method)}-seed{seed}"


@dataclass(frozen=True)
class TeacherAccuracy:
    """Shares in [0, 1], None where there are no such images."""

    validation: float | None
    test: float | None


@dataclass(frozen=True)
class ComparedRun:
    """A run of a comparison.

    Attributes:
        method: its name.
        seed: of initialisation, order and augmentation.
        folder: with checkpoint, weights and metrics.
        result: without the weights; None where the run has not finished.
        error: why it failed; None where it did not.
    """

    method: str
    seed: int
    folder: Path
    result: TrainResult | None
    error: str | None

    @property
    def state(self) -> str:
        """`"finished"`, `"failed"` or `"not finished"`."""
        if self.result is not None:
            return "finished"
        return "not finished" if self.error is None else "failed"


@dataclass(frozen=True)
class PairedDifference:
    """How much more a method reaches than another, seed by seed.

    Attributes:
        method: the one.
        baseline: the other.
        differences: accuracy of `method` minus that of `baseline`, by seed; shares.
    """

    method: str
    baseline: str
    differences: Mapping[int, float]

    @property
    def mean(self) -> float:
        """Over the seeds: the difference of the means."""
        return statistics.mean(self.differences.values())

    @property
    def std(self) -> float | None:
        """Standard deviation of the differences; None of a single one."""
        return statistics.stdev(self.differences.values()) if len(self.differences) > 1 else None


@dataclass(frozen=True)
class Comparison:
    """What a comparison has come to.

    Attributes:
        folder: where it is.
        methods: names, in order; each with its settings.
        runs: seed by seed, within a seed method by method.
        teacher: its accuracies.
        launches: kernels per training step by method, counted on a GPU.
        settings: what all runs share.
        environments: of the machines that worked on it, as `hyperfast.env_report` collects them.
    """

    folder: Path
    methods: Mapping[str, Any]
    runs: tuple[ComparedRun, ...]
    teacher: TeacherAccuracy
    launches: Mapping[str, int]
    settings: Mapping[str, Any]
    environments: tuple[Mapping[str, str], ...]

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Comparison:
        """What `folder` holds, also of a comparison that is under way.

        Raises:
            FileNotFoundError: there is no comparison in `folder`.
            ValueError: its record is damaged.
        """
        folder = Path(folder)
        if not (folder / RECORD).exists():
            raise FileNotFoundError(f"there is no {RECORD} in {folder}; hyperfast compare writes it")
        record = Record.load(folder)
        order = sorted(record.runs, key=lambda run: (run["seed"], list(record.methods).index(run["method"])))
        assert record.teacher is not None
        return cls(
            folder=folder,
            methods=record.methods,
            runs=tuple(record.state(run["method"], run["seed"]) for run in order),
            teacher=TeacherAccuracy(**record.teacher),
            launches=record.launches,
            settings=record.settings,
            environments=tuple(record.environments),
        )

    @property
    def target(self) -> float | None:
        """95 % of the teacher's validation accuracy."""
        return None if self.teacher.validation is None else _TARGET * self.teacher.validation

    @property
    def baseline(self) -> str | None:
        """What the other methods are compared with: `"mip"`, or else `"plain"`, where there is one."""
        return next((name for name in ("mip", "plain") if name in self.methods), None)

    def of(self, method: str) -> SeedRuns:
        """The finished runs of a method."""
        results = (run.result for run in self.runs if run.method == method)
        return SeedRuns(method, [result for result in results if result is not None])

    def paired(self, baseline: str) -> list[PairedDifference]:
        """Every other method against `baseline`, on the seeds that both have finished; at least two of them.

        Accuracies are those on the test images, with the weights of the best epoch; without test images, those on the
        validation images.
        """
        reached: dict[str, dict[int, float]] = {method: {} for method in self.methods}
        for run in self.runs:
            if (accuracy := final(run.result)) is not None:
                reached[run.method][run.seed] = accuracy
        pairs = []
        for method, by_seed in reached.items():
            both = sorted(by_seed.keys() & reached[baseline].keys())
            if method != baseline and len(both) > 1:
                differ = {seed: by_seed[seed] - reached[baseline][seed] for seed in both}
                pairs.append(PairedDifference(method, baseline, differ))
        return pairs


def final(result: TrainResult | None) -> float | None:
    """The accuracy that a run is judged by: on the test images; where there are none, on the validation images."""
    if result is None:
        return None
    return result.val_accuracy_best if result.test_accuracy_best is None else result.test_accuracy_best


@dataclass
class Record:
    """The file that holds a comparison together; what the runs came to is in their own folders.

    Attributes:
        folder: of the comparison.
        settings: what all runs share.
        methods: their settings by name, in order.
        runs: `{"method": ..., "seed": ..., "error": ...}` of every run that was asked for.
        teacher: its accuracies.
        launches: kernels per step by method.
        environments: those that were different.
    """

    folder: Path
    settings: dict[str, Any]
    methods: dict[str, Any] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)
    teacher: dict[str, float | None] | None = None
    launches: dict[str, int] = field(default_factory=dict)
    environments: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path, settings: Mapping[str, Any], methods: Mapping[str, Any]) -> Record:
        """The record of `folder`, or a new one; it is not written yet.

        Raises:
            ValueError: the folder holds a comparison with other settings, or a method of the same name and another
                meaning.
        """
        now: Any = as_json({"settings": settings, "methods": methods})
        if not (folder / RECORD).exists():
            return cls(folder, **now)
        record = cls.load(folder)
        changed = differences(record.settings, now["settings"])
        for name in methods:
            if name in record.methods:
                changed += differences(record.methods[name], now["methods"][name], f"method {name}")
        if changed:
            raise ValueError(
                f"{folder} holds a comparison with other settings: {'; '.join(changed[:5])}. Give the same settings to "
                "go on with it, or another folder"
            )
        record.methods.update(now["methods"])
        return record

    @classmethod
    def load(cls, folder: Path) -> Record:
        """Read the record of `folder`."""
        path = folder / RECORD
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(folder, **{key.name: values[key.name] for key in fields(cls) if key.name != "folder"})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged or was not written by this hyperfast ({error!r})") from error

    def save(self) -> None:
        """Write it, all or nothing."""
        values = {key: value for key, value in asdict(self).items() if key != "folder"}
        write_json(self.folder / RECORD, values)

    def add(self, methods: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
        """Note the runs that are asked for; returns them, seed by seed."""
        asked = [(method, seed) for seed in seeds for method in methods]
        known = {(run["method"], run["seed"]) for run in self.runs}
        self.runs += [{"method": m, "seed": s, "error": None} for m, s in asked if (m, s) not in known]
        return asked

    def state(self, method: str, seed: int) -> ComparedRun:
        """What is known of a run."""
        folder = self.folder / run_folder(method, seed)
        return ComparedRun(method, seed, folder, TrainResult.read(folder), self._entry(method, seed)["error"])

    def note(self, method: str, seed: int, error: str | None) -> None:
        """A run has failed, or has not; writes the record."""
        self._entry(method, seed)["error"] = error
        self.save()

    def _entry(self, method: str, seed: int) -> dict[str, Any]:
        return next(run for run in self.runs if (run["method"], run["seed"]) == (method, seed))
