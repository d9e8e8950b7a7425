"""A compression as a run on the disk: several trainings one after the other, metrics, and a checkpoint of it all."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from hyperfast.nn import WeightPredictor
from hyperfast.recipes import checkpoint
from hyperfast.recipes.checkpoint import JSON
from hyperfast.recipes.cost import Stopwatch
from hyperfast.recipes.interrupt import deferred_interrupt
from hyperfast.recipes.metrics import Metrics, MetricsWriter
from hyperfast.recipes.progress import progress_bar
from hyperfast.recipes.trainer import CHECKPOINT

_KIND = "compression"


class Training(Protocol):
    """What `Run.drive` drives.

    Attributes:
        predictor: what is trained.
        made: steps made.
        total: steps of the whole training.
    """

    predictor: WeightPredictor
    made: int
    total: int

    def step(self) -> None:
        """One optimiser step."""

    def read(self) -> dict[str, float]:
        """Numbers for the log, `loss` or `rmse` first; the device may be waited for."""

    def state(self) -> dict[str, Tensor]:
        """Everything that the rest of the training depends on."""

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken."""


class Run:
    """Where a compression stands, and the folder that remembers it.

    Args:
        folder: of `checkpoint.safetensors` and `metrics.jsonl`; None: nothing is written.
        settings: what the result depends on; a run is resumed under the same ones only.
        log_every: steps between two lines of metrics.
        checkpoint_every: steps between two checkpoints.
        resume: go on with the checkpoint in `folder`; where there is none yet, start.
        progress: show a bar on the terminal.
        on_step: called after each step with the number of steps that the training has made.

    Attributes:
        facts: JSON that the caller keeps in the checkpoint.
        tensors: the same for tensors.
        seconds: wall time up to the last `save`, over all parts of the run.
        steps: made in all.

    Raises:
        FileExistsError: `folder` holds a run and `resume` is False.
        ValueError: its checkpoint is damaged, of something else, or was written under other settings.
    """

    def __init__(
        self,
        folder: Path | None,
        settings: Mapping[str, JSON],
        *,
        log_every: int = 100,
        checkpoint_every: int = 5000,
        resume: bool = False,
        progress: bool = False,
        on_step: Callable[[int], object] | None = None,
    ) -> None:
        self.folder, self.settings = folder, settings
        self.log_every, self.checkpoint_every = log_every, checkpoint_every
        self.progress, self.on_step = progress, on_step
        self.facts: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        self.seconds, self.steps = 0.0, 0
        self._clock, self._laps = time.perf_counter(), list[float]()
        self._begun: tuple[str, dict[str, Tensor]] | None = None
        self._position = 0
        self._metrics: MetricsWriter | None = None
        self._interrupted: Callable[[], bool] = lambda: False
        if folder is None and resume:
            raise ValueError("resume needs a folder")
        path = None if folder is None else folder / CHECKPOINT
        if path is not None and path.exists():
            if not resume:
                raise FileExistsError(f"{path} is of another run: resume it (resume=True), or use another folder")
            self._restore(checkpoint.load(path))

    @contextmanager
    def open(self) -> Iterator[None]:
        """Metrics are written and the first Ctrl-C waits for the end of a step, inside the block."""
        with ExitStack() as stack:
            if self.folder is not None:
                writer = MetricsWriter(self.folder, position=self._position, step=self.steps)
                self._metrics = stack.enter_context(writer)
            self._interrupted = stack.enter_context(deferred_interrupt())
            yield

    @property
    def ms_per_step(self) -> float:
        """Median over the last training, of its part since the run was last resumed."""
        return statistics.median(self._laps) if self._laps else float("nan")

    def write(self, kind: str, values: Metrics) -> None:
        """A line of metrics."""
        if self._metrics is not None:
            self._metrics.write(kind, self.steps, values)

    def drive(self, training: Training, name: str) -> None:
        """Make the steps that are left of a training; `name` tells it from the others of the run.

        Raises:
            FloatingPointError: its loss or weights are not finite any more; the checkpoint from before is kept.
            OSError: the checkpoint cannot be written; the one from before is kept.
            KeyboardInterrupt: Ctrl-C, after a checkpoint was written.
        """
        if self._begun is not None and self._begun[0] == name:
            training.restore(self._begun[1])
        self._begun = None
        self._laps = []
        stopwatch = Stopwatch(next(training.predictor.parameters()).device)
        with progress_bar(self.progress, training.total) as show:
            while training.made < training.total:
                training.step()
                stopwatch.tick()
                made = training.made
                self.steps += 1
                if self.on_step is not None:
                    self.on_step(made)
                last = made == training.total
                if made % self.log_every == 0 or last:
                    show(made, self._log(training, name, stopwatch))
                if made % self.checkpoint_every == 0 or last or self._interrupted():
                    with stopwatch.paused():
                        self.save(training, name)
                        self.stop_if_interrupted()

    def _log(self, training: Training, name: str, stopwatch: Stopwatch) -> str:
        """Read the numbers and write a line; returns a headline."""
        numbers = training.read()
        self._require_finite(name, training.made, all(map(math.isfinite, numbers.values())))
        lap = stopwatch.lap()
        if lap is not None:
            self._laps.append(lap)
        self.write("train", {"training": name, "of_training": training.made, **numbers, "ms_per_step": lap})
        key, value = next(iter(numbers.items()))
        return f"{name}: {key} {value:.5f}"

    def stop_if_interrupted(self) -> None:
        """Raise the KeyboardInterrupt that Ctrl-C asked for."""
        if self._interrupted():
            where = "" if self.folder is None else f"; resume from {self.folder / CHECKPOINT}"
            raise KeyboardInterrupt(f"stopped after step {self.steps}{where}")

    def save(self, training: Training | None = None, name: str = "") -> None:
        """Write the checkpoint: `facts`, `tensors`, and the training that is under way."""
        if training is not None:
            norm = nn.utils.get_total_norm([p.detach() for p in training.predictor.parameters()])
            self._require_finite(name, training.made, math.isfinite(float(norm)))
        now = time.perf_counter()
        self.seconds, self._clock = self.seconds + now - self._clock, now
        if self.folder is None:
            return
        under_way = {} if training is None else checkpoint.section("training", training.state())
        metadata: dict[str, JSON] = {
            "kind": _KIND,
            "settings": self.settings,
            "facts": self.facts,
            "training": name,
            "seconds": self.seconds,
            "steps": self.steps,
            "metrics_position": 0 if self._metrics is None else self._metrics.position(),
        }
        tensors = {**checkpoint.section("kept", self.tensors), **under_way}
        checkpoint.save(self.folder / CHECKPOINT, tensors, metadata)

    def kept(self, name: str) -> dict[str, Tensor]:
        """Those of `tensors` called `name/...`, without that prefix."""
        return {key.removeprefix(f"{name}/"): t for key, t in self.tensors.items() if key.startswith(f"{name}/")}

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Put copies of `tensors` in place of those that are called `name/...`."""
        others = {key: t for key, t in self.tensors.items() if not key.startswith(f"{name}/")}
        copies = {key: t.detach().to("cpu", copy=True) for key, t in tensors.items()}
        self.tensors = {**others, **checkpoint.section(name, copies)}

    def _restore(self, saved: checkpoint.Checkpoint) -> None:
        metadata: Any = saved.metadata
        if metadata.get("kind") != _KIND:
            raise ValueError(f"{saved.path} is not of a compression; it cannot be resumed as one")
        before, now = _flat(metadata["settings"]), _flat(checkpoint.as_json(self.settings))
        changed = [
            f"{key} was {before.get(key)!r} and is now {now.get(key)!r}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        if changed:
            raise ValueError(
                f"{saved.path} was written under other settings: {'; '.join(changed)}. "
                "Resume with the same ones, or start a new run in another folder."
            )
        self.facts, self.tensors = metadata["facts"], saved.section("kept")
        self.seconds, self.steps = metadata["seconds"], metadata["steps"]
        self._position = metadata["metrics_position"]
        if metadata["training"]:
            self._begun = metadata["training"], saved.section("training")

    def _require_finite(self, name: str, made: int, finite: bool) -> None:
        if finite:
            return
        kept = "Nothing was saved."
        if self.folder is not None:
            path = self.folder / CHECKPOINT
            kept = f"The last good checkpoint is {path}." if path.exists() else f"There is no checkpoint at {path} yet."
        raise FloatingPointError(
            f"{name}: the loss or the weights are not finite any more after step {made}. A lower lr may help; where "
            f"precision is 'bf16', so may 'fp32'. {kept}"
        )


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Settings within settings by names such as `guide.epochs`."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
