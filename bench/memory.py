"""Peak memory of one provider on one case, and the time of the step.

On the processor it is measured in a fresh process, as the growth of the resident set: that also sees memory which
torch's allocator does not hand out. On a GPU it is what torch's allocator says.
"""

from __future__ import annotations

import argparse
import ctypes
import ctypes.util
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from registry import Operation, Work, operation

MIB = 2**20


@dataclass(frozen=True)
class Memory:
    """MiB beyond what the libraries take.

    Attributes:
        state: held before the first step: inputs, parameters.
        peak: the most that was held during a step, the state included.
        milliseconds: of the last step on the processor.
    """

    state: float
    peak: float
    milliseconds: float = 0.0


def measure_on_gpu(build: Callable[[], Work]) -> Memory:
    """Memory of a work built and stepped here, by torch's allocator."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    work = build()
    state = torch.cuda.memory_allocated() - before
    work.step()
    torch.cuda.reset_peak_memory_stats()
    work.step()
    torch.cuda.synchronize()
    return Memory(state / MIB, (torch.cuda.max_memory_allocated() - before) / MIB)


def measure_in_process(op: str, case: str, provider: str, threads: int, timeout: float = 1800.0) -> Memory | None:
    """Memory on the processor, from a process of its own; None where /proc does not tell."""
    command = [sys.executable, __file__, "--op", op, "--case", case, "--provider", provider, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    if done.returncode != 0:
        raise RuntimeError(f"memory of {provider} on {op} could not be measured:\n{done.stderr.strip()}")
    found = json.loads(done.stdout.splitlines()[-1])
    return None if found is None else Memory(**found)


def _measure_here(op: Operation, case: str, provider: str) -> Memory | None:
    if not Path("/proc/self/status").exists():
        return None
    device, chosen = torch.device("cpu"), op.provider(provider)
    chosen.prepare()
    small = next(case for case in op.cases if case.small)
    # Libraries load and threads start on a small case, so that what follows is the work's own.
    warm = chosen.build(op.inputs(small.options, device, 0))
    warm.step()
    del warm
    _release()
    baseline = _resident("VmRSS")
    work = chosen.build(op.inputs(op.case(case).options, device, 0))
    _release()
    state = _resident("VmRSS")
    work.step()  # a compiler's own memory is not the step's
    gc.collect()
    _reset_peak()
    for _ in range(1 if op.case(case).heavy else 2):
        start = time.perf_counter()
        work.step()
        seconds = time.perf_counter() - start
    return Memory((state - baseline) / MIB, (_resident("VmHWM") - baseline) / MIB, 1e3 * seconds)


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _reset_peak() -> None:
    """Let VmHWM begin again at VmRSS. Where that is not allowed, the peak of the first step counts as well."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        print(f"the peak could not be reset: {error}", file=sys.stderr)


def _release() -> None:
    """Give freed memory back to the system."""
    gc.collect()
    library = ctypes.CDLL(ctypes.util.find_library("c") or None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def main() -> None:
    """Measure in this process and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("op", "case", "provider"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = _measure_here(operation(options.op), options.case, options.provider)
    print(json.dumps(None if found is None else vars(found)))


if __name__ == "__main__":
    main()
