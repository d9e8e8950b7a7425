"""The straight line between two networks' weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from hyperfast.analysis.differences import rmse
from hyperfast.analysis.weights import Weights, Workpiece, pairs


class LinePoint(NamedTuple):
    """A place on the line: its alpha, the accuracy there, and the RMSE to where the line starts."""

    alpha: float
    accuracy: float
    rmse: float


def blend(start: Weights, end: Weights, alpha: float) -> dict[str, Tensor]:
    """Parameters (1 - alpha) start + alpha end, computed in float64; running statistics are not among them.

    Raises:
        ValueError: a parameter that one of them lacks, or that has another shape.
    """
    return {
        name: ((1 - alpha) * a.double() + alpha * b.double()).to(a.dtype)
        for name, (a, b) in pairs(start, end, vectors=True).items()
    }


def interpolation(
    module: nn.Module,
    end: Weights,
    evaluate: Callable[[nn.Module], float],
    *,
    alphas: Sequence[float],
    names: Sequence[str] | None = None,
) -> list[LinePoint]:
    """Accuracy and RMSE along the line from `module` to `end`.

    Args:
        module: alpha = 0. It is copied and stays as it is; its running statistics are used all along the line.
        end: alpha = 1, another network of the architecture, or its state dict.
        evaluate: the accuracy of a module, which is in eval mode.
        alphas: places on the line, from 0 to 1, or beyond.
        names: weights that the RMSE is taken over; default those of two or more dimensions.

    Raises:
        ValueError: as `blend`.

    Source: Choi et al., arXiv 2407.00356, appendix I.
    """
    workpiece = Workpiece(module)
    points = []
    for alpha in alphas:
        weights = blend(module, end, alpha)
        points.append(LinePoint(alpha, evaluate(workpiece.put(weights)), rmse(module, weights, names)))
    return points
