"""How far a reconstructed network is from the original, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from hyperfast.analysis.weights import Weights, pairs


class LayerDifference(NamedTuple):
    """One layer: the mean of |w - w'|, the root of the mean of (w - w')^2, and how many weights it has."""

    name: str
    mean_absolute: float
    rmse: float
    weights: int


def layer_differences(first: Weights, second: Weights, names: Sequence[str] | None = None) -> list[LayerDifference]:
    """Differences between two networks of one architecture; default over weights of two or more dimensions.

    Raises:
        ValueError: a name that one of them lacks, or tensors of different shapes.
    """
    rows = []
    for name, (a, b) in pairs(first, second, names).items():
        difference = a.double() - b.double()
        rms = math.sqrt(float(difference.square().mean()))
        rows.append(LayerDifference(name, float(difference.abs().mean()), rms, a.numel()))
    return rows


def rmse(first: Weights, second: Weights, names: Sequence[str] | None = None) -> float:
    """Root of the mean square over all of these layers together: the reconstruction loss.

    Raises:
        ValueError: as `layer_differences`.
    """
    rows = layer_differences(first, second, names)
    return math.sqrt(sum(row.rmse**2 * row.weights for row in rows) / sum(row.weights for row in rows))
