"""Where the numbers of a run go: a JSONL file, TensorBoard where it is wanted."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

Metrics: TypeAlias = "Mapping[str, float | int | str | Metrics | None]"


METRICS = "metrics.jsonl"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of `folder/metrics.jsonl`, up to one that was cut off; none where there is no such file."""
    path = folder / METRICS
    lines: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


class MetricsWriter:
    """Appends one JSON object per line to `metrics.jsonl`; every line is handed to the system at once.

    Values that JSON cannot hold (NaN, infinity) are written as null.

    Args:
        folder: created if it is not there.
        position: length in bytes at the checkpoint that the run resumes from. What was written after it is cut off,
            so that no line appears twice. 0 starts a new file.
        step: the step of that checkpoint; TensorBoard hides what it logged after it.
        tensorboard: also write TensorBoard events to `folder/tensorboard` (extra `hyperfast[tensorboard]`).

    Raises:
        ModuleNotFoundError: TensorBoard is wanted and not installed.
    """

    def __init__(self, folder: Path, *, position: int = 0, step: int = 0, tensorboard: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / METRICS
        self._file = self.path.open("ab")
        # Not beyond the end: that would fill the gap with zero bytes if the file was removed since.
        self._file.truncate(min(position, self.path.stat().st_size))
        self._file.seek(0, os.SEEK_END)
        self._board = _summary_writer(folder / "tensorboard", step) if tensorboard else None

    def write(self, kind: str, step: int, values: Metrics) -> None:
        """One line: `{"kind": ..., "step": ..., **values}`. Values may be nested."""
        line = json.dumps(_finite({"kind": kind, "step": step, **values}), allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        if self._board is not None:
            for name, value in _flat(values, kind):
                self._board.add_scalar(name, value, step)

    def position(self) -> int:
        """Length of the file in bytes, once everything in it is on the disk. Store it with a checkpoint."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _summary_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError(
            "TensorBoard is not installed: pip install 'hyperfast[tensorboard]', or leave tensorboard off; "
            "metrics.jsonl holds the same numbers"
        ) from error
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(values: Metrics, prefix: str) -> list[tuple[str, float]]:
    pairs: list[tuple[str, float]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}/{key}")
        elif isinstance(value, int | float):
            pairs.append((f"{prefix}/{key}", float(value)))
    return pairs
