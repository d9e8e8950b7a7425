"""What a run came to."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from torch import Tensor

from hyperfast.recipes.metrics import read_metrics

# Fields of a result that its line of metrics has as they are.
_IN_METRICS = ("best_epoch", "test_accuracy_best", "test_accuracy_last", "steps", "peak_memory")


@dataclass(frozen=True)
class EpochRecord:
    """One epoch. Accuracies are shares in [0, 1]; `val_*` are None without a validation split.

    Attributes:
        epoch: 1 for the first.
        train_loss: mean of the total loss over the epoch's steps.
        train_accuracy: on the augmented training images, while the weights changed.
        val_loss: cross-entropy.
        val_accuracy: top-1.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    val_loss: float | None
    val_accuracy: float | None


@dataclass(frozen=True)
class TrainResult:
    """What a run came to. Accuracies are shares in [0, 1], None where there is no such split.

    Attributes:
        history: one record per epoch.
        best_epoch: the one with the highest validation accuracy (the earliest of equals); the last one without a
            validation split. The test set has no say in it.
        test_accuracy_best: measured once, after training, with the weights of `best_epoch`.
        test_accuracy_last: the same with those of the last epoch.
        steps: optimiser steps of the whole run.
        lap_ms: milliseconds per step in each interval between two lines of metrics.
        peak_memory: bytes; CUDA memory on a GPU, resident memory of the process on a CPU. Of the part of the run
            since it was last resumed.
        best_weights: `state_dict` of `best_epoch`, on the CPU; `model.load_state_dict(result.best_weights)`.
    """

    history: tuple[EpochRecord, ...]
    best_epoch: int
    test_accuracy_best: float | None
    test_accuracy_last: float | None
    steps: int
    lap_ms: tuple[float, ...]
    peak_memory: int
    best_weights: Mapping[str, Tensor] = field(repr=False, compare=False)

    @classmethod
    def read(cls, folder: Path) -> TrainResult | None:
        """The result of a finished run from its `metrics.jsonl`, without the weights; None of an unfinished one."""
        lines = read_metrics(folder)
        ends = [line for line in lines if line["kind"] == "result"]
        if not ends:
            return None
        names = [field.name for field in fields(EpochRecord)]
        epochs = [line for line in lines if line["kind"] == "epoch"]
        laps = [line["ms_per_step"] for line in lines if line["kind"] == "train"]
        return cls(
            history=tuple(EpochRecord(**{name: line[name] for name in names}) for line in epochs),
            lap_ms=tuple(lap for lap in laps if lap is not None),
            best_weights={},
            **{name: ends[-1][name] for name in _IN_METRICS},
        )

    @property
    def val_accuracy_best(self) -> float | None:
        """Validation accuracy of `best_epoch`."""
        return self.history[self.best_epoch - 1].val_accuracy

    @property
    def val_accuracy_last(self) -> float | None:
        """Validation accuracy of the last epoch."""
        return self.history[-1].val_accuracy

    @property
    def ms_per_step(self) -> float:
        """Median of `lap_ms`: wall time of a training step, data included, validation and checkpoints not."""
        return statistics.median(self.lap_ms) if self.lap_ms else float("nan")

    def epochs_to_reach(self, accuracy: float) -> int | None:
        """The first epoch (from 1) whose validation accuracy is at least `accuracy`; None if there is none."""
        for record in self.history:
            if record.val_accuracy is not None and record.val_accuracy >= accuracy:
                return record.epoch
        return None

    def numbers(self) -> dict[str, float | int | None]:
        """Everything but the weights and the history, for a table or JSON."""
        return {
            "best_epoch": self.best_epoch,
            "val_accuracy_best": self.val_accuracy_best,
            "val_accuracy_last": self.val_accuracy_last,
            "test_accuracy_best": self.test_accuracy_best,
            "test_accuracy_last": self.test_accuracy_last,
            "steps": self.steps,
            "ms_per_step": self.ms_per_step,
            "peak_memory": self.peak_memory,
        }
