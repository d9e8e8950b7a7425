"""nvcc compiles every .cu for every architecture that is shipped, and no kernel spills registers."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def test_there_are_sources():
    assert SOURCES


@pytest.mark.parametrize("arch", ["80", "90", "100"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_compiles_without_spills(source, arch, load_setup, tmp_path):
    module, _ = load_setup(HYPERFAST_CUDA="auto")
    if module.NVCC is None:
        pytest.skip("there is no nvcc on this machine")
    flags = [flag for flag in module.nvcc_flags() if not flag.startswith("-gencode")]
    command = [str(module.NVCC), *flags, f"-arch=sm_{arch}", "-Xptxas=-v", "-cubin", str(source), "-o", "kernel.cubin"]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    report = finished.stdout + finished.stderr
    assert "Compiling entry function" in report, "the file holds no kernel"
    pattern = r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    entries = re.findall(pattern, report, re.DOTALL)
    spilling = {name: (int(stores), int(loads)) for name, stores, loads in entries if int(stores) or int(loads)}
    assert not spilling
