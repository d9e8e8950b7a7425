"""What a bug report needs to know about a machine: `python -m hyperfast.env_report`, or `hyperfast env`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from hyperfast.backends import current_backend
from hyperfast.ops import _native
from hyperfast.version import __version__

__all__ = ["collect", "render"]


def collect() -> dict[str, str]:
    """Versions, processor, GPUs, what the native module was built for, and the HYPERFAST_* variables in force.

    Nothing here fails: what is missing is said to be missing.
    """
    report = {
        "hyperfast": " ".join(filter(None, [__version__, _commit()])),
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "cuda": _cuda(),
        "gpu": _gpus(),
        "hyperfast._C": _native_module(),
        "backend": current_backend().value,
    }
    switches = {name: value for name, value in sorted(os.environ.items()) if name.startswith("HYPERFAST_")}
    if os.environ.get("TRITON_INTERPRET") == "1":
        switches["TRITON_INTERPRET"] = "1"
    report["environment"] = ", ".join(f"{name}={value}" for name, value in switches.items()) or "nothing set"
    return report


def render(report: dict[str, str]) -> str:
    """`report` as aligned lines."""
    width = max(map(len, report))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in report.items())


def _output(*command: str) -> str:
    """What `command` prints, or nothing where it is missing or fails."""
    if not shutil.which(command[0]):
        return ""
    finished = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return finished.stdout.strip() if finished.returncode == 0 else ""


def _commit() -> str:
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return ""
    commit = _output("git", "-C", str(root), "rev-parse", "--short=10", "HEAD")
    changed = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return f"({commit}{' with changes' if changed else ''})" if commit else ""


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cuda() -> str:
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    return f"torch built for {torch.version.cuda or 'no CUDA'}, driver {driver[0] if driver else 'none'}"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none"
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return "; ".join(f"{gpu.name} (sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB)" for gpu in found)


def _native_module() -> str:
    if reason := _native.missing():
        return reason
    module = _native.module()
    cuda = f"CUDA for {module.cuda_archs}" if module.with_cuda else "no CUDA"
    return f"{module.instruction_set()} kernels for the processor, {cuda}"


if __name__ == "__main__":
    print(render(collect()))
