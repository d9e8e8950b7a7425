"""What `train` and `distill` have in common: the folder of a run, going on with it, and the table at its end."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from hyperfast.cli.network import RUN, Network, Run
from hyperfast.recipes import CHECKPOINT
from hyperfast.recipes.checkpoint import differences

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console
    from torch import nn

    from hyperfast.data import Splits
    from hyperfast.recipes import RunOptions, TrainConfig, TrainResult

# They change how a run is computed, not what; the recipe allows the same.
_FREE = ("device", "compile", "checkpoint_every")


def describe(network: Network, splits: Splits, config: TrainConfig, **settings: Any) -> Run:
    """The run as `run.json` will have it."""
    image = splits.train.images.shape[1:]
    training = {key: value for key, value in asdict(config).items() if key not in _FREE}
    return Run(
        network,
        (image[0], image[1], image[2]),
        splits.train.mean,
        splits.train.std,
        {**settings, "training": training},
    )


def open_folder(run: Run, out: Path | None, default: str, resume: bool, console: Console) -> Path:
    """The folder of the run, with its `run.json`; one that holds the same run is gone on with.

    Args:
        run: what is about to be done.
        out: the folder that was asked for; None: `runs/<default>`, numbered where that holds another run.
        default: name of the folder.
        resume: insist that there is something to go on with.
        console: told what happens.

    Raises:
        FileNotFoundError: `resume`, and nothing to go on with.
        ValueError: `out` holds another run.
    """
    folder = _unused_or_same(run, Path("runs"), default) if out is None else out
    has_checkpoint = (folder / CHECKPOINT).exists()
    if resume and not has_checkpoint:
        raise FileNotFoundError(f"there is no {CHECKPOINT} in {folder} to resume from; leave --resume out to start")
    if has_checkpoint:
        changed = differences(Run.load(folder).to_json(), run.to_json())
        if changed:
            raise ValueError(
                f"{folder} holds a run with other settings: {'; '.join(changed[:5])}. Give the same settings to go on "
                "with it, or another --out"
            )
        console.print(f"going on with the run in {folder}", style="cyan", markup=False, highlight=False)
    else:
        run.save(folder)
    return folder


def options(folder: Path, tensorboard: bool, console: Console) -> RunOptions:
    """How the recipe runs: into `folder`, going on with what is there, with a bar where somebody can see it."""
    return {
        "folder": folder,
        "resume": (folder / CHECKPOINT).exists(),
        "progress": console.is_terminal,
        "tensorboard": tensorboard,
    }


def announce(network: Network, model: nn.Module, splits: Splits, console: Console) -> None:
    """One line on the network, one on the images."""
    count = sum(parameter.numel() for parameter in model.parameters())
    kind = "" if network.hypernet is None else f", hypernetised (hidden {network.hypernet.hidden})"
    console.print(f"network: {network.model}{kind}, {count:,} parameters", markup=False, highlight=False)
    sizes = {"training": splits.train, "validation": splits.val, "testing": splits.test}
    parts = ", ".join(f"{len(images):,} for {purpose}" for purpose, images in sizes.items())
    console.print(f"images: {parts}", markup=False, highlight=False)


def summarise(result: TrainResult, folder: Path, console: Console, extra: Mapping[str, float | None] = {}) -> None:
    """The one table at the end of a run; `extra` holds more accuracies."""
    table = Table(title=f"{folder}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    rows: Sequence[tuple[str, str]] = [
        *((name, percent(value)) for name, value in extra.items()),
        ("validation accuracy, best epoch", f"{percent(result.val_accuracy_best)} (epoch {result.best_epoch})"),
        ("validation accuracy, last epoch", percent(result.val_accuracy_last)),
        ("test accuracy, weights of the best epoch", percent(result.test_accuracy_best)),
        ("test accuracy, weights of the last epoch", percent(result.test_accuracy_last)),
        ("steps", f"{result.steps:,}"),
        ("time per step", f"{result.ms_per_step:.1f} ms"),
        ("peak memory", f"{result.peak_memory / 2**20:,.0f} MiB"),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(
        f"weights: {folder / 'best.safetensors'}; an ordinary network from them: "
        f"hyperfast export {folder} --out model.safetensors",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def percent(share: float | None) -> str:
    """A share as percent, or a dash."""
    return "–" if share is None else f"{100 * share:.2f} %"


def _unused_or_same(run: Run, parent: Path, name: str) -> Path:
    for number in itertools.count(1):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        if not (folder / CHECKPOINT).exists():
            return folder
        if (folder / RUN).exists() and not differences(Run.load(folder).to_json(), run.to_json()):
            return folder
    raise AssertionError("itertools.count ends nowhere")

