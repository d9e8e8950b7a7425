"""Compiles one form of a Triton kernel for one GPU, and reads off what it needs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hyperfast.kernels.config import Configuration


class Compiled(NamedTuple):
    """Bytes of shared memory, stack and local memory; registers per thread; accesses of several elements at once."""

    registers: int
    stack: int
    local: int
    shared: int
    vector_loads: int


def compile_kernel(form: Configuration, capability: int) -> Compiled:
    """Nothing is taken from an earlier compilation, and nothing of this one is left."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(form.kernel, form.signature, form.constants, dict(_aligned(form.signature)))
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=form.options)
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        report = subprocess.run(
            [cuobjdump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
        ).stdout
    usage = {name: int(re.search(rf"\b{name}:(\d+)", report)[1]) for name in ("REG", "STACK", "LOCAL")}  # type: ignore[index]
    return Compiled(
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
