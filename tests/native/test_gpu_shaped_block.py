"""The bodies that CUDA runs, on a block of several lane groups, where there is no GPU."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which(os.environ.get("CXX", "c++"))


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_several_lane_groups_give_what_one_gives(tmp_path):
    program = tmp_path / "gpu_shaped_block"
    source = ROOT / "tests" / "native" / "gpu_shaped_block.cpp"
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
    # Without optimisation it compiles in half the time, and runs in a moment all the same.
    command = [COMPILER, "-std=c++17", "-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run([*command, "-Wno-psabi", *includes, str(source), "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "DIFFERENT" not in result.stdout
    assert result.stdout.count("same") == 184
