"""The `hyperfast` command; `hyperfast --help` lists what it can do."""

from hyperfast.cli.main import main

__all__ = ["main"]
