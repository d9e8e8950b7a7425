"""No ratio without a green test: the operation's own pytest file, and every provider against float64."""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from machine import ROOT
from registry import NAMES, Operation, operation
from torch import Tensor

_CHUNK = 1 << 24


@dataclass(frozen=True)
class Verdict:
    """Whether the tests of an operation passed.

    Attributes:
        green: all that ran passed, and something ran.
        summary: pytest's last line, or why it did not get there.
    """

    green: bool
    summary: str


def run_tests(op: Operation, device: torch.device, timeout: float = 600.0) -> Verdict:
    """Run the operation's tests, unmodified, in a process of its own: its pytest file, or its part of the GPU suite."""
    if not (ROOT / op.tests).exists():
        return Verdict(False, f"{op.tests} does not exist")
    selected = [op.tests] if device.type != "cuda" else ["tests", "-m", "gpu", "-k", op.gpu_tests]
    environment = {name: value for name, value in os.environ.items() if name != "HYPERFAST_BACKEND"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *selected]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return Verdict(False, f"{' '.join(selected)} ran longer than {timeout:.0f} s")
    lines = [line.strip("= ") for line in done.stdout.splitlines()]
    counts = [line for line in lines if re.search(r"\d+ (passed|failed|error|skipped)", line)]
    return Verdict(done.returncode == 0, counts[-1] if counts else (done.stderr or done.stdout).strip()[-300:])


def error(found: Tensor, truth: Tensor) -> float:
    """||found - truth|| / ||truth|| in float64; infinite where the shapes differ, NaN where a value is NaN."""
    if found.shape != truth.shape:
        return math.inf
    difference = size = 0.0
    for a, b in zip(found.reshape(-1).split(_CHUNK), truth.reshape(-1).split(_CHUNK), strict=True):
        b = b.to(dtype=torch.float64)
        difference += float((a.detach().to(b) - b).square().sum())
        size += float(b.square().sum())
    if size == 0:
        return 0.0 if difference == 0 else math.inf
    return math.sqrt(difference / size)


def largest_error(found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest `error` and the result it is of. A result that is missing has an infinite one."""
    errors = {name: error(found[name], value) if name in found else math.inf for name, value in truth.items()}
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    return errors[worst], worst


def main() -> int:
    """Run the tests of the chosen operations; the exit status says whether all are green."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", action="append", choices=NAMES, help="may be repeated; default: all")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    verdicts = {name: run_tests(operation(name), torch.device(options.device)) for name in options.op or NAMES}
    for name, verdict in verdicts.items():
        print(f"{name}: {'green' if verdict.green else 'RED'}: {verdict.summary}")
    return 0 if all(verdict.green for verdict in verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
