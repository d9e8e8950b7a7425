"""nvcc compiles every .cu for every architecture that is shipped, and no kernel spills registers."""

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def test_there_are_sources():
    assert SOURCES


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_compiles_without_spills(source, load_setup):
    """By what ptxas said when the module of this tree was built."""
    switches = ("HYPERFAST_CUDA", "HYPERFAST_CUDA_ARCHS", "HYPERFAST_DEBUG", "HYPERFAST_REQUIRE_NATIVE", "CXX")
    given = {name: os.environ[name] for name in switches if name in os.environ}
    module, _ = load_setup(**given)
    if module.NVCC is None:
        pytest.skip("there is no nvcc on this machine, or CUDA is off")
    log = ROOT / "build" / f"native-{module.build_key()}" / f"{source.stem}.cu.o.log"
    if not log.exists() and given.get("HYPERFAST_REQUIRE_NATIVE") != "1":
        pytest.skip("hyperfast was not built in this tree; make build does it")
    pattern = r"Compiling entry function '(\w+)' for 'sm_(\d+)a?'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    entries = re.findall(pattern, log.read_text(), re.DOTALL)
    assert {arch for _, arch, *_ in entries} == set(module.CUDA_ARCHS), "the file holds no kernel for one of them"
    spilling = {(name, arch): (int(s), int(loads)) for name, arch, s, loads in entries if int(s) or int(loads)}
    assert not spilling
