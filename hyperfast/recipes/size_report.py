"""What a compressed network takes, against every size that its compression may be said to have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_FLOAT = 4  # bytes of a weight of the original, whatever it was stored as


@dataclass(frozen=True)
class Ratio:
    """Compression ratios against one count of the original's weights; smaller is better, 1 saves nothing.

    Attributes:
        against: what is counted.
        weights: how many weights that is.
        parameters: parameters of the predictor over `weights`, as papers count.
        stored: bytes of the predictor over the bytes of `weights` in float32.
        with_permutations: the same, with the bytes of the permutations, without which nothing can be reconstructed.
    """

    against: str
    weights: int
    parameters: float
    stored: float
    with_permutations: float


@dataclass(frozen=True)
class SizeReport:
    """Bytes and ratios of a compressed network; `str()` gives a table.

    Attributes:
        stored_as: `"fp32"`, `"fp16"` or `"int8"`.
        parameters: of the predictor.
        predictor: bytes of its parameters, scales of integers and Fourier frequencies included.
        permutations: bytes of the packed orders.
        kept: bytes of everything that is not predicted.
        description: bytes of everything else in the file: settings, names and shapes.
        original: bytes of the original's state dict.
        counts: what weights of the original are counted -> how many there are.
    """

    stored_as: str
    parameters: int
    predictor: int
    permutations: int
    kept: int
    description: int
    original: int
    counts: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes of the file."""
        return self.predictor + self.permutations + self.kept + self.description

    @property
    def ratios(self) -> tuple[Ratio, ...]:
        """One for each of `counts`."""
        return tuple(
            Ratio(
                name,
                weights,
                self.parameters / weights,
                self.predictor / (_FLOAT * weights),
                (self.predictor + self.permutations) / (_FLOAT * weights),
            )
            for name, weights in self.counts.items()
        )

    def __str__(self) -> str:
        parts = {
            f"predictor ({self.parameters:,} parameters, {self.stored_as})": self.predictor,
            "permutations": self.permutations,
            "not predicted": self.kept,
            "description": self.description,
            "the file": self.total,
        }
        lines = [f"{'part':<48}{'bytes':>14}"]
        lines += [f"{name:<48}{size:>14,}" for name, size in parts.items()]
        lines += [f"{'original':<48}{self.original:>14,}   the file / original {self.total / self.original:.3f}", ""]
        lines.append(f"{'predictor against':<26}{'weights':>13}{'parameters':>12}{'bytes':>9}{'with permutations':>20}")
        lines += [
            f"{r.against:<26}{r.weights:>13,}{r.parameters:>12.3f}{r.stored:>9.3f}{r.with_permutations:>20.3f}"
            for r in self.ratios
        ]
        return "\n".join(lines)
