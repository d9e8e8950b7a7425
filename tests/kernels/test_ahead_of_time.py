"""Every kernel, in every shipped configuration and dtype, compiled for three generations of GPUs. Needs no GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from compile_kernels import compile_kernel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hyperfast.kernels.config import Configuration

MODULES = ("generate", "attention_transfer", "predict", "gram", "similarity_preserving", "relational_distance_angle")
MODULES += ("flow_of_solution", "gated_experts")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CAPABILITIES = (80, 90, 100)
SHARED_MEMORY = 99 * 1024  # what consumer GPUs allow a program; A100 163 KiB, H100 227 KiB
REGISTERS = 65536  # of a multiprocessor
# sm_80 sets two registers aside before a loop and fetches them after it, in one configuration: not a spill in a loop.
STACK = {80: 8, 90: 0, 100: 0}
# `predict` is tuned for sm_90. Elsewhere some forms set addresses aside before a loop over layers.
STACK_OF_PREDICT = {80: 96, 90: 0, 100: 112}
# Sizes that allow one element per access only, and kernels that read neither maps nor heads.
ODD = re.compile(r"align=1 |widths=\(\)|widths=\(100, 50\)|^matrices")

MISSING = None
if find_spec("triton") is None:
    MISSING = "Triton is not installed"
elif os.environ.get("TRITON_INTERPRET") == "1":
    MISSING = "TRITON_INTERPRET=1 decorates kernels for the interpreter; they cannot be compiled"
needs_triton = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def _forms() -> Iterator[Configuration]:
    """Each once: some kernels are the same for several dtypes."""
    seen = set()
    for module in MODULES if MISSING is None else ():
        for dtype in DTYPES:
            for form in import_module(f"hyperfast.kernels.triton.{module}").configurations(dtype):
                key = (form.kernel.__name__, repr(form.signature), repr(form.constants), repr(form.options))
                if key not in seen:
                    seen.add(key)
                    yield form


FORMS = list(_forms())


@needs_triton
def test_every_kernel_of_every_module_is_compiled() -> None:
    names = {form.kernel.__name__ for form in FORMS}
    for module in MODULES:
        kernels = import_module(f"hyperfast.kernels.triton.{module}")
        assert {name for name in vars(kernels) if name.endswith("_kernel")} <= names
    files = Path(import_module("hyperfast.kernels.triton").__file__ or "").parent.glob("*.py")
    written = {name for file in files for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE)}
    assert written == names


@needs_triton
@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda capability: f"sm_{capability}")
@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.kernel.__name__} {form.label}")
def test_compiles_to_what_every_gpu_can_run_without_spills(form: Configuration, capability: int) -> None:
    compiled = compile_kernel(form, capability)
    assert compiled.shared <= SHARED_MEMORY
    assert compiled.local == 0
    assert compiled.stack <= (STACK_OF_PREDICT if form.kernel.__name__.startswith("predict_") else STACK)[capability]
    assert compiled.registers * 32 * form.options["num_warps"] <= REGISTERS
    assert compiled.vector_loads or ODD.search(form.label)


def test_importing_the_package_imports_no_triton() -> None:
    code = "import sys, hyperfast.kernels.config, hyperfast.kernels.triton; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
