"""Reads the command line, runs the command, and turns its errors into a line and an exit code."""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import tyro
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from hyperfast.backends import BackendUnavailable
from hyperfast.cli.suggest import nearest
from hyperfast.version import __version__

# What hyperfast raises on purpose. Anything else is a bug and shows its traceback.
_EXPECTED = (ValueError, OSError, ImportError, FloatingPointError, BackendUnavailable)
_FAILED = 2
_INTERRUPTED = 130  # 128 + SIGINT, what shells expect


class _Command(NamedTuple):
    """Imported only when it is called: `env` must work where the libraries of another command do not."""

    module: str
    name: str
    summary: str


_COMMANDS = {
    "train": _Command("train", "Train", "train a network on labels, as it is or with generated weights"),
    "distill": _Command("distill", "Distill", "train a student with generated weights, helped by a teacher"),
    "compare": _Command("compare", "Compare", "methods of distillation, several seeds each: a table and a page"),
    "compress": _Command(
        "compress", "Compress", "make a trained network small: a predictor of its weights, in one file"
    ),
    "inherit": _Command("inherit", "Inherit", "make small networks of a trained one: low rank and gated heads"),
    "export": _Command("export", "Export", "bake generated weights: safetensors, torch.export or ONNX"),
    "reconstruct": _Command("reconstruct", "Reconstruct", "an ordinary network from a compressed one"),
    "analyze": _Command("analyze", "Analyze", "compare a network with reconstructions of it: a page and tables"),
    "demo": _Command("demo", "Demo", "all of it on handwritten digits in a minute or two, no files needed"),
    "env": _Command("env", "Env", "what a bug report needs to know about this machine"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: what follows `hyperfast` on the command line; default `sys.argv[1:]`.

    Returns:
        The exit code: 0, 2 after an error, 130 after Ctrl-C.

    Raises:
        SystemExit: from a command's `--help` (0) and from options that cannot be read (2).
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    console, errors = Console(), Console(stderr=True)
    _log_to(errors)
    if not given or given[0] in ("-h", "--help"):
        _print_help(console)
        return 0 if given else _FAILED
    if given[0] == "--version":
        console.print(f"hyperfast {__version__}", highlight=False)
        return 0
    try:
        _run(given[0], given[1:], console)
    except KeyboardInterrupt as interrupt:
        _print(errors, str(interrupt) or "stopped", "yellow")
        return _INTERRUPTED
    except _EXPECTED as error:
        if debug:
            raise
        _print(errors, f"error: {str(error) or type(error).__name__}", "bold red")
        return _FAILED
    return 0


def _run(name: str, options: Sequence[str], console: Console) -> None:
    if name not in _COMMANDS:
        raise ValueError(f"there is no command {name!r}{nearest(name, _COMMANDS)}; choose from {', '.join(_COMMANDS)}")
    command = _COMMANDS[name]
    kind: Any = getattr(importlib.import_module(f"hyperfast.cli.{command.module}"), command.name)
    parsed = tyro.cli(
        kind,
        args=options,
        prog=f"hyperfast {name}",
        description=kind.help(),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    parsed.run(console)


def _print_help(console: Console) -> None:
    commands = Table.grid(padding=(0, 2))
    for name, command in _COMMANDS.items():
        commands.add_row(f"  [bold]{name}[/]", command.summary)
    console.print("[bold]hyperfast[/]: networks whose weights come from a hypernetwork, and layer-wise distillation")
    console.print("\nusage: hyperfast COMMAND \\[OPTIONS]\n", highlight=False)
    console.print(commands)
    console.print(
        '\n"hyperfast COMMAND --help" explains a command with examples. Without any data of your own: "hyperfast demo".'
        "\n\nErrors end with exit code 2 (with --debug and a traceback), Ctrl-C with 130. Training commands write a "
        "checkpoint first, and go on from it when the same command is given again. --version prints the version.",
        highlight=False,
    )


def _print(console: Console, text: str, style: str) -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _log_to(console: Console) -> None:
    """hyperfast's own log messages and all warnings, as lines on the terminal."""
    logger = logging.getLogger("hyperfast")
    logger.handlers = [RichHandler(console=console, show_time=False, show_path=False)]
    logger.propagate = False

    def show(message: Warning | str, *_: object, **__: object) -> None:
        _print(console, f"warning: {message}", "yellow")

    warnings.showwarning = show
