"""exp, log and half precision of vectors, on every instruction set that this processor has."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
PROCESSOR = Path("/proc/cpuinfo").read_text() if platform.system() == "Linux" else ""
FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512f": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("instructions", FLAGS)
def test_the_whole_range(instructions, tmp_path):
    if instructions != "baseline" and instructions not in PROCESSOR:
        pytest.skip(f"the processor has no {instructions}")
    program = tmp_path / "vector_math"
    source = ROOT / "tests" / "native" / "vector_math.cpp"
    flags = [*FLAGS[instructions], "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
    subprocess.run([COMPILER, "-std=c++17", "-O1", *flags, *includes, str(source), "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("right") == 16
