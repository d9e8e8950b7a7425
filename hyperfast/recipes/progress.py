"""A progress bar on the terminal, where one is wanted."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

Update: TypeAlias = Callable[[int, str], None]
OnStep: TypeAlias = Callable[[int], None]


@contextlib.contextmanager
def progress_bar(wanted: bool, total: int) -> Iterator[Update]:
    """Yields `update(steps_made, text)`, which does nothing where no bar is wanted."""
    if not wanted:
        yield lambda step, text: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns) as bar:
        task = bar.add_task("", total=total)
        yield lambda step, text: bar.update(task, completed=step, description=text)


@contextlib.contextmanager
def progress_over_runs(wanted: bool, steps: Sequence[int]) -> Iterator[Callable[[str], OnStep]]:
    """One bar over runs of so many steps, one after the other.

    Yields `begin(name)`, which goes on to the next run and makes the `on_step` of it.
    """
    starts = iter(itertools.accumulate(steps, initial=0))
    with progress_bar(wanted, sum(steps)) as show:

        def begin(name: str) -> OnStep:
            start = next(starts)
            show(start, name)
            return lambda step: show(start + step, name)

        yield begin
