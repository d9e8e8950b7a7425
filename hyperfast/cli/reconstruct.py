"""`hyperfast reconstruct`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from hyperfast.recipes import Artifact, checkpoint

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Reconstruct:
    """Write the network that a compressed file stands for.

    Attributes:
        artifact: file that "hyperfast compress" wrote. Nothing else is needed.
        out: safetensors file to write: the state dict, with the name of the model, its classes, and mean and std of
            its images in the metadata, as far as they are known.
    """

    artifact: tyro.conf.Positional[Path]
    out: Path

    @staticmethod
    def help() -> str:
        return """Reconstruct an ordinary network from a compressed one, and say what the compressed one takes.

Examples:
    hyperfast reconstruct r20.hf.safetensors --out resnet20_again.safetensors

The result can be the teacher of "hyperfast distill", and hyperfast.models.load_weights reads it. The same file gives
the same weights every time; how far they are from the original's is what "hyperfast analyze" shows.

The table counts the predictor against the weights that it covers, against all parameters, and against convolutions
alone; papers differ in which they mean. Permutations are needed to reconstruct, so the last column counts them too."""

    def run(self, console: Console) -> None:
        """Reconstruct, write, and print the sizes."""
        if self.out.suffix != ".safetensors":
            raise ValueError(f"--out is {self.out}; it is a safetensors file, so let it end in .safetensors")
        if self.out.resolve() == self.artifact.resolve():
            raise ValueError(f"--out is the compressed file itself, {self.out}; give another name")
        artifact = Artifact.load(self.artifact)
        checkpoint.write(self.out, artifact.state_dict(), _metadata(artifact))
        for line in (str(artifact.size_report()), f"\n{self.out}: {self.out.stat().st_size:,} bytes"):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _metadata(artifact: Artifact) -> dict[str, str]:
    """As `hyperfast export` writes them."""
    found = {}
    for key in ("model", "classes", "mean", "std"):
        value = artifact.metadata.get(key)
        if isinstance(value, list | tuple):
            found[key] = ",".join(map(str, value))
        elif value is not None:
            found[key] = str(value)
    return found
