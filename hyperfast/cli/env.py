"""`hyperfast env`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hyperfast import env_report

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Env:
    """What a bug report needs to know about this machine."""

    @staticmethod
    def help() -> str:
        return """Print what a bug report needs to know: versions, processor, GPUs, what the native kernels were built
for, and the HYPERFAST_* variables in force.

Example:
    hyperfast env"""

    def run(self, console: Console) -> None:
        """Print the report."""
        console.print(env_report.render(env_report.collect()), markup=False, highlight=False, soft_wrap=True)
