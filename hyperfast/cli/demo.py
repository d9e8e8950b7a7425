"""`hyperfast demo`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hyperfast.recipes.demo import DemoConfig, demo

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Demo(DemoConfig):
    """The settings of `DemoConfig`, with its texts."""

    @staticmethod
    def help() -> str:
        return """Train on handwritten digits, in a minute or two, without any files: a small teacher, and the same
network with generated weights, learning from labels alone, from the teacher's attention maps, and from its logits.
Prints a table and writes a page with curves and attention maps.

Examples:
    hyperfast demo
    hyperfast demo --seeds 1 --out runs/quick"""

    def run(self, console: Console) -> None:
        """Run it."""
        demo(self, console=console)
