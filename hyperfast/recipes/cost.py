"""What a run costs: time per step, peak memory, kernel launches."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import profiler


class Stopwatch:
    """Wall time per step, without what happens in `paused` blocks.

    It does not wait for a GPU: read it where the loop has just done so.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = time.perf_counter()
        self._steps = 0

    def tick(self) -> None:
        """Count a step."""
        self._steps += 1

    def lap(self) -> float | None:
        """Milliseconds per step since the last lap, or None if there was no step; starts the next one."""
        now = time.perf_counter()
        per_step = 1e3 * (now - self._start) / self._steps if self._steps else None
        self._start, self._steps = now, 0
        return per_step

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time spent inside does not count."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        before = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - before


def reset_peak_memory(device: torch.device) -> None:
    """Start measuring peak memory anew, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # Linux forgets the peak of this process on this request; without permission the peak is that of its life.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes since `reset_peak_memory`.

    CUDA: what torch allocated on the device. CPU: resident set of the whole process; on systems other than Linux the
    peak since the process started, and 0 where it cannot be read (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return 0
    # macOS counts bytes, the others kilobytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class LaunchCounter:
    """Counts the GPU kernels of one training step, copies and fills of memory apart. Give it to a run as `on_step`.

    Args:
        device: of the run; on a CPU nothing is counted.

    Attributes:
        launches: the count, from the batch to the optimiser's update; None before the step was made, and where torch's
            profiler sees no kernels (it needs CUPTI).
        steps: how many the run must have at least. The first ones choose algorithms and allocate.
    """

    steps = 6

    def __init__(self, device: torch.device) -> None:
        self.launches: int | None = None
        self._device = device
        self._profile: Any = None

    def __call__(self, step: int) -> None:
        """Start before the last step but one, and stop after it."""
        if self._device.type != "cuda" or step not in (self.steps - 2, self.steps - 1):
            return
        torch.cuda.synchronize(self._device)
        if step == self.steps - 2:
            self._profile = profiler.profile(activities=[profiler.ProfilerActivity.CUDA])
            self._profile.start()
            return
        self._profile.stop()
        self.launches = kernels(self._profile.events()) or None
        self._profile = None


def kernels(events: Iterable[Any]) -> int:
    """How many of a profiler's events are kernels on a GPU."""
    return sum(event.device_type.name == "CUDA" and not event.name.startswith("Mem") for event in events)
