"""Reads the command line, runs the command, and turns its errors into a line and an exit code."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.logging import RichHandler

from hyperfast.backends import BackendUnavailable
from hyperfast.cli.demo import Demo
from hyperfast.cli.distill import Distill
from hyperfast.cli.env import Env
from hyperfast.cli.export import Export
from hyperfast.cli.train import Train

# What hyperfast raises on purpose. Anything else is a bug and shows its traceback.
_EXPECTED = (ValueError, OSError, ImportError, FloatingPointError, BackendUnavailable)
_INTERRUPTED = 130  # 128 + SIGINT, what shells expect

_DESCRIPTION = """Networks whose weights come from a hypernetwork, and layer-wise distillation.

Try it without any data of your own (a minute or two, needs the extra 'demo'):

    hyperfast demo

"hyperfast COMMAND --help" explains a command with examples. Errors end with exit code 2, Ctrl-C with 130; training
commands write a checkpoint first and go on from it when the same command is given again."""

_COMMANDS: Any = (
    Annotated[Train, tyro.conf.subcommand("train", description=Train.help())]
    | Annotated[Distill, tyro.conf.subcommand("distill", description=Distill.help())]
    | Annotated[Export, tyro.conf.subcommand("export", description=Export.help())]
    | Annotated[Demo, tyro.conf.subcommand("demo", description=Demo.help())]
    | Annotated[Env, tyro.conf.subcommand("env", description=Env.help())]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: what follows `hyperfast` on the command line; default `sys.argv[1:]`.

    Returns:
        The exit code: 0, 2 after an error, 130 after Ctrl-C.

    Raises:
        SystemExit: from `--help` (0) and from options that cannot be read (2).
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    console, errors = Console(), Console(stderr=True)
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff)
    command = tyro.cli(
        _COMMANDS,
        args=[argument for argument in given if argument != "--debug"],
        prog="hyperfast",
        description=_DESCRIPTION,
        config=config,
    )
    _log_to(errors)
    try:
        command.run(console)
    except KeyboardInterrupt as interrupt:
        errors.print(str(interrupt) or "stopped", style="yellow", markup=False, highlight=False)
        return _INTERRUPTED
    except _EXPECTED as error:
        if debug:
            raise
        message = str(error) or type(error).__name__
        errors.print(f"error: {message}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        return 2
    return 0


def _log_to(console: Console) -> None:
    """hyperfast's own log messages and warnings, as lines on the terminal."""
    logger = logging.getLogger("hyperfast")
    logger.handlers = [RichHandler(console=console, show_time=False, show_path=False)]
    logger.propagate = False

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        console.print(f"{category.__name__}: {message}", style="yellow", markup=False, highlight=False)

    warnings.showwarning = show
