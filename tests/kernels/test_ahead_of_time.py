"""Every kernel, in every shipped configuration and dtype, compiled for three generations of GPUs. Needs no GPU."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from compile_kernels import Compiled, compile_kernel

if TYPE_CHECKING:
    pass

MODULES = ("generate", "attention_transfer", "predict", "gram", "similarity_preserving", "relational_distance_angle")
MODULES += ("flow_of_solution",)
DTYPES = ("float32", "float16", "bfloat16")
CAPABILITIES = (80, 90, 100)
SHARED_MEMORY = 99 * 1024  # what consumer GPUs allow a program; A100 163 KiB, H100 227 KiB
REGISTERS = 65536  # of a multiprocessor
# sm_80 sets two registers aside before a loop and fetches them after it, in one configuration: not a spill in a loop.
STACK_SM_80 = 8
# `predict` is tuned for sm_90. Elsewhere some forms set addresses aside before a loop over layers.
STACK_OF_PREDICT = {80: 96, 90: 0, 100: 112}


def _count(module: str, dtype: str) -> int:
    return sum(1 for _ in import_module(f"hyperfast.kernels.triton.{module}").configurations(getattr(torch, dtype)))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    pytest.importorskip("triton", reason="Triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1 decorates kernels for the interpreter; they cannot be compiled")
    cache = str(tmp_path_factory.mktemp("triton"))
    jobs = [
        (module, dtype, index, capability, cache)
        for module in MODULES
        for dtype in DTYPES
        for index in range(_count(module, dtype))
        for capability in CAPABILITIES
    ]
    workers = max(1, min(8, len(os.sched_getaffinity(0))))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(compile_kernel, *zip(*jobs, strict=True)))


def test_every_kernel_of_every_module_is_compiled(compiled: list[Compiled]) -> None:
    names = {form.kernel for form in compiled}
    for module in MODULES:
        kernels = import_module(f"hyperfast.kernels.triton.{module}")
        assert {name for name in vars(kernels) if name.endswith("_kernel")} <= names
    files = Path(import_module("hyperfast.kernels.triton").__file__ or "").parent.glob("*.py")
    written = {name for file in files for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE)}
    assert written == names
    assert set(Counter(form.capability for form in compiled).values()) == {len(compiled) // len(CAPABILITIES)}


def test_shared_memory_fits_every_gpu(compiled: list[Compiled]) -> None:
    assert not [f"{form}: {form.shared} bytes" for form in compiled if form.shared > SHARED_MEMORY]


def test_nothing_spills(compiled: list[Compiled]) -> None:
    allowed = {80: STACK_SM_80, 90: 0, 100: 0}
    spilled = [
        form
        for form in compiled
        if form.local
        or form.stack > (STACK_OF_PREDICT if form.kernel.startswith("predict_") else allowed)[form.capability]
    ]
    assert not [f"{form}: stack {form.stack}, local {form.local}" for form in spilled]


def test_a_program_fits_a_multiprocessor(compiled: list[Compiled]) -> None:
    assert not [f"{form}: {form.registers}" for form in compiled if form.registers * 32 * form.warps > REGISTERS]


def test_maps_and_heads_are_read_in_vectors(compiled: list[Compiled]) -> None:
    """Several elements per access on every configuration but those whose sizes allow none, or that read neither."""
    odd = re.compile(r"align=1 |widths=\(\)|widths=\(100, 50\)|^matrices")
    assert not [str(form) for form in compiled if not form.vector_loads and not odd.search(form.label)]


def test_importing_the_package_imports_no_triton() -> None:
    code = "import sys, hyperfast.kernels.config, hyperfast.kernels.triton; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
