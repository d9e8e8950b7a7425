"""Times of several providers, taken in turns so that whatever disturbs the machine disturbs all of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

Step = Callable[[], object]


@dataclass(frozen=True)
class Quantiles:
    """Milliseconds."""

    median: float
    p20: float
    p80: float
    repeats: int

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Quantiles:
        """Quantiles of single measurements."""
        p20, median, p80 = np.quantile(milliseconds, (0.2, 0.5, 0.8)).tolist()
        return cls(median, p20, p80, len(milliseconds))


def interleaved(
    steps: Mapping[str, Sequence[Step]],
    device: torch.device,
    repeats: int,
    warmup: int = 3,
    seconds: float = 120.0,
) -> dict[str, Quantiles]:
    """Quantiles of one step of each provider.

    Args:
        steps: by provider: the same step on one or more sets of inputs, used in rotation.
        device: where the steps run.
        repeats: rounds; each times one step of every provider, and begins with another provider than the last.
        warmup: untimed steps of each provider first.
        seconds: no new round begins after this long; three rounds are always made.
    """
    names = list(steps)
    for name in names:
        for round_ in range(max(warmup, len(steps[name]))):
            steps[name][round_ % len(steps[name])]()
    samples: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.monotonic() + seconds
        for round_ in range(repeats):
            if round_ >= 3 and time.monotonic() > end:
                break
            first = round_ % len(names)
            for name in (*names[first:], *names[:first]):
                samples[name].append(_milliseconds(steps[name][round_ % len(steps[name])], device))
    finally:
        if collecting:
            gc.enable()
    return {name: Quantiles.of(found) for name, found in samples.items()}


def _milliseconds(step: Step, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter_ns()
        step()
        return (time.perf_counter_ns() - start) / 1e6
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    before.record()
    step()
    after.record()
    after.synchronize()
    milliseconds: float = before.elapsed_time(after)
    return milliseconds


def captured(step: Step) -> Step:
    """Replay of a CUDA graph of `step`; `RuntimeError` where it cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def sets_needed(bytes_touched: int, device: torch.device) -> int:
    """How many sets of inputs to rotate, so that none is still in the L2 of a GPU when its turn comes; at most 8."""
    if device.type != "cuda" or bytes_touched == 0:
        return 1
    cache: int = torch.cuda.get_device_properties(device).L2_cache_size
    return min(8, max(1, -(-4 * cache // bytes_touched)))


def kernels_launched(step: Step) -> list[str]:
    """Names of the GPU kernels of one step, in the order of their launch; copies and fills of memory count too."""
    from torch.autograd import DeviceType  # type: ignore[attr-defined]
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        step()
        torch.cuda.synchronize()
    launched = [event for event in trace.events() if event.device_type == DeviceType.CUDA]
    return [event.name for event in sorted(launched, key=lambda event: event.time_range.start)]


def profile_table(step: Step, device: torch.device, rows: int = 15) -> str:
    """torch.profiler's table of three steps, the most expensive operators first."""
    from torch.profiler import ProfilerActivity, profile

    gpu = device.type == "cuda"
    step()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as trace:
        for _ in range(3):
            step()
        if gpu:
            torch.cuda.synchronize(device)
    averages = trace.key_averages()
    table: str = averages.table(sort_by="self_device_time_total" if gpu else "self_cpu_time_total", row_limit=rows)
    return table
