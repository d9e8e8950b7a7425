"""Compiles one Triton kernel for one GPU, in a worker process that imports this file by name."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Compiled(NamedTuple):
    kernel: str
    label: str
    capability: int
    warps: int
    registers: int
    stack: int
    local: int
    shared: int
    vector_loads: int

    def __str__(self) -> str:
        return f"sm_{self.capability} {self.kernel} [{self.label}]"


def compile_kernel(module: str, dtype: str, index: int, capability: int, cache: str) -> Compiled:
    """Compile one configuration in a worker process. It is named, not passed: kernels do not pickle."""
    os.environ["TRITON_CACHE_DIR"] = cache
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernels = import_module(f"hyperfast.kernels.triton.{module}")
    form = list(kernels.configurations(getattr(torch, dtype)))[index]
    source = ASTSource(form.kernel, form.signature, form.constants, dict(_aligned(form.signature)))
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=form.options)
    cubin = Path(cache) / f"{module}.{dtype}.{index}.{capability}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    report = subprocess.run(
        [cuobjdump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    usage = {name: int(re.search(rf"\b{name}:(\d+)", report)[1]) for name in ("REG", "STACK", "LOCAL")}  # type: ignore[index]
    cubin.unlink()
    return Compiled(
        form.kernel.__name__,
        form.label,
        capability,
        form.options["num_warps"],
        usage["REG"],
        usage["STACK"],
        usage["LOCAL"],
        compiled.metadata.shared,
        # What goes to shared memory past the first-level cache, cp.async.cg, is always 16 bytes at a time.
        len(re.findall(r"ld\.global[.\w:]*\.v[248]\.b|cp\.async\.cg\.", compiled.asm["ptx"])),
    )


def _aligned(signature: dict[str, Any]) -> Iterator[tuple[tuple[int, ...], list[Any]]]:
    """What a launch tells Triton about pointers from torch: divisible by 16."""
    for index, kind in enumerate(signature.values()):
        if isinstance(kind, tuple):
            yield from (((index, i), [["tt.divisibility", 16]]) for i, each in enumerate(kind) if each.startswith("*"))
        elif kind.startswith("*"):
            yield (index,), [["tt.divisibility", 16]]
