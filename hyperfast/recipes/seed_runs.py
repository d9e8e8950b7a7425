"""What the runs of one method come to over several seeds, and a table of methods on the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hyperfast.analysis import Curve

if TYPE_CHECKING:
    from rich.table import Table

    from hyperfast.recipes.result import TrainResult


@dataclass(frozen=True)
class SeedRuns:
    """The runs of one method.

    Attributes:
        name: of the method.
        results: one per seed.
    """

    name: str
    results: Sequence[TrainResult]

    def values(self, field: str) -> list[float]:
        """`field` of every result that has it."""
        found = (getattr(result, field) for result in self.results)
        return [float(value) for value in found if value is not None]

    def percent(self, field: str, decimals: int = 1) -> str | None:
        """Mean and standard deviation over the runs of a share, in percent; None where no run has it."""
        shares = [100 * value for value in self.values(field)]
        if not shares:
            return None
        spread = f" ± {statistics.stdev(shares):.{decimals}f}" if len(shares) > 1 else ""
        return f"{statistics.mean(shares):.{decimals}f}{spread}"

    def median(self, field: str) -> float:
        """Median of `field` over the runs."""
        return statistics.median(self.values(field))

    def epochs_to_reach(self, accuracy: float) -> str:
        """Mean over the runs of the first epoch with this validation accuracy, and how many runs got there."""
        reached = [epoch for result in self.results if (epoch := result.epochs_to_reach(accuracy)) is not None]
        if not reached:
            return "not reached"
        some = "" if len(reached) == len(self.results) else f" ({len(reached)} of {len(self.results)} runs)"
        return f"{statistics.mean(reached):.1f}{some}"

    def curve(self, field: str) -> Curve:
        """`field` of the records of all epochs."""
        return Curve(self.name, [[getattr(record, field) for record in result.history] for result in self.results])


def mebibytes(count: float) -> str:
    """Bytes as MiB."""
    return f"{count / 2**20:,.0f} MiB"


def terminal_table(columns: Sequence[str], rows: Sequence[Sequence[str | None]], title: str | None = None) -> Table:
    """A table for rich's console: the first column left, the others right; None is shown as a dash."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        # Where it is narrow, the name of a method stays whole, and nothing is left out.
        table.add_column(column, justify="right" if index else "left", no_wrap=not index, overflow="fold")
    for row in rows:
        table.add_row(*("–" if cell is None else cell for cell in row))
    return table
