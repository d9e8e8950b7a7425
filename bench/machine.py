"""The machine: what it is, and how fast it copies and multiplies."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import hyperfast

ROOT = Path(__file__).resolve().parent.parent

# What a benchmark run writes does not make the code that it measured another one.
_GENERATED = (":(exclude)bench/results", ":(exclude)README.md", ":(exclude)docs/assets")


@dataclass(frozen=True)
class Ceilings:
    """Measured limits: bytes read plus bytes written per second by a copy, float32 operations per second."""

    copy_gbps: float
    matmul_gflops: float


def environment(device: torch.device) -> dict[str, str]:
    """Columns that say where, when and with which versions a row was measured. No names of hosts or folders."""
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda or "",
        "hyperfast": hyperfast.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        name = found.group(1) if found else name
    name = re.sub(r"\(R\)|\(TM\)|\bCPU\b|@.*|\d+-Core Processor", "", name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{' '.join(name.split())}, {cores} cores"


def _commit() -> str:
    """The short hash, `+` behind it where tracked files differ from it; `HYPERFAST_COMMIT` where there is no git."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *_GENERATED)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("HYPERFAST_COMMIT", "unknown")
    return head + ("+" if changed else "")


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True, timeout=20
    ).stdout.strip()


def measure_ceilings(device: torch.device, repeats: int = 10, scale: float = 1.0) -> Ceilings:
    """The best of `repeats` copies and float32 matrix products at sizes that leave the caches.

    The best, not the median: what disturbs a measurement only ever lowers it.

    Args:
        device: the device to measure.
        repeats: of each.
        scale: of the sizes; 1 is 512 MiB (GPU: 2 GiB) a copy and n = 2048 (GPU: 8192) a product.
    """
    gpu = device.type == "cuda"
    copy = int((2**29 if gpu else 2**27) * scale)
    matmul = int((8192 if gpu else 2048) * scale**0.5)
    return Ceilings(_copy_gbps(max(1, copy), device, repeats), _matmul_gflops(max(8, matmul), device, repeats))


def _copy_gbps(elements: int, device: torch.device, repeats: int) -> float:
    source = torch.rand(elements, device=device)
    target = torch.empty_like(source)
    return 8 * elements / _best(lambda: target.copy_(source), device, repeats) / 1e9


def _matmul_gflops(n: int, device: torch.device, repeats: int) -> float:
    a, b = torch.rand(n, n, device=device), torch.rand(n, n, device=device)
    product = torch.empty_like(a)
    return 2 * n**3 / _best(lambda: torch.mm(a, b, out=product), device, repeats) / 1e9


def _best(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds of the fastest call."""
    function()
    seconds = []
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        function()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
