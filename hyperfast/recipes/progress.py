"""A progress bar on the terminal, where one is wanted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeAlias

Update: TypeAlias = Callable[[int, str], None]


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
