"""The script for GPU machines, as far as a machine without one can tell."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from machine import ROOT

SCRIPT = ROOT / "bench" / "gpu.sh"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


def test_syntax() -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPT)], timeout=20).returncode == 0


def test_unknown_option() -> None:
    done = subprocess.run(["bash", str(SCRIPT), "--gpu"], capture_output=True, text=True, timeout=20)
    assert done.returncode == 2
    assert "unknown option --gpu; there are --cpu and --skip-build" in done.stderr


def test_limits_fit_ten_minutes_and_eight_files() -> None:
    text = SCRIPT.read_text()
    limits = [int(limit) for limit in re.findall(r"^\s*(?:\[.*\|\| )?step (\d+) ", text, re.MULTILINE)]
    on_gpu = sum(limits) + 40 - 240  # the sanitizer's step runs twice, the --cpu branch not at all
    assert len(limits) >= 7
    assert on_gpu <= 600
    assert len(set(re.findall(r"(?:step \d+ |/)(\w+\.(?:log|csv|txt))", text))) <= 8
