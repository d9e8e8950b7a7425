"""Loss and error on the plane through three networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hyperfast.analysis.weights import Weights, Workpiece, pairs, parameters


@dataclass(frozen=True, eq=False)
class Plane:
    r"""The plane through three weight vectors, with axes at right angles.

    .. math::
        u = w_2 - w_1, \qquad v = (w_3 - w_1) - \frac{\langle w_3 - w_1, u \rangle}{\|u\|^2} u

    A place is measured along :math:`u / \|u\|` and :math:`v / \|v\|` from :math:`w_1`, so that distances on the plane
    are distances between weights.

    Attributes:
        origin: parameters of the first network.
        u: float64, unit length over all parameters together.
        v: as u, at right angles to it.
        points: places of the three networks.

    Source: Garipov et al., arXiv 1802.10026.
    """

    origin: dict[str, Tensor]
    u: dict[str, Tensor]
    v: dict[str, Tensor]
    points: tuple[tuple[float, float], tuple[float, float], tuple[float, float]]

    @classmethod
    def through(cls, first: Weights, second: Weights, third: Weights) -> Plane:
        """The plane through the parameters of three networks of one architecture.

        Raises:
            ValueError: two networks are the same or all three lie on a line; or as `interpolation.blend`.
        """
        u = {name: b.double() - a.double() for name, (a, b) in pairs(first, second, vectors=True).items()}
        w = {name: b.double() - a.double() for name, (a, b) in pairs(first, third, vectors=True).items()}
        length = _norm(u)
        if length == 0:
            raise ValueError("the first and the second network have the same weights; three points make a plane")
        along = _dot(w, u) / length
        u = {name: tensor / length for name, tensor in u.items()}
        v = {name: w[name] - along * u[name] for name in u}
        height = _norm(v)
        if not height > 1e-9 * _norm(w):
            raise ValueError("the third network lies on the line through the other two; three points make a plane")
        v = {name: tensor / height for name, tensor in v.items()}
        return cls(parameters(first), u, v, ((0.0, 0.0), (length, 0.0), (along, height)))

    def at(self, x: float, y: float) -> dict[str, Tensor]:
        """The parameters at a place, in the dtypes of the first network."""
        return {
            name: (tensor.double() + x * self.u[name] + y * self.v[name]).to(tensor.dtype)
            for name, tensor in self.origin.items()
        }

    def grid(self, size: int, margin: float = 0.3) -> tuple[list[float], list[float]]:
        """`size` places along either axis of a square around the three points, with a margin as a share of its side.

        Raises:
            ValueError: `size` is less than 2.
        """
        if size < 2:
            raise ValueError(f"size is {size}; a grid has at least 2 places along either axis")
        lows, highs = ([f(point[axis] for point in self.points) for axis in (0, 1)] for f in (min, max))
        side = (1 + 2 * margin) * max(high - low for low, high in zip(lows, highs, strict=True))
        across, up = (
            [(low + high - side) / 2 + side * i / (size - 1) for i in range(size)]
            for low, high in zip(lows, highs, strict=True)
        )
        return across, up


@dataclass(frozen=True, eq=False)
class Landscape:
    """What was measured on a grid of a plane.

    Attributes:
        x: places along u.
        y: places along v.
        values: by name of what was measured, float64 `[len(y), len(x)]`.
        points: places of the three networks.
    """

    x: list[float]
    y: list[float]
    values: dict[str, Tensor]
    points: tuple[tuple[float, float], tuple[float, float], tuple[float, float]]


def landscape(
    module: nn.Module,
    plane: Plane,
    measure: Callable[[nn.Module], Mapping[str, float]],
    *,
    x: Sequence[float],
    y: Sequence[float],
) -> Landscape:
    """Measure a network at every place of a grid.

    Args:
        module: the first network of the plane. It is copied and stays as it is; its running statistics are used
            everywhere.
        plane: from `Plane.through`.
        measure: numbers by name, such as loss and error, of a module in eval mode.
        x: places along u, for instance of `plane.grid`.
        y: places along v.

    Raises:
        ValueError: there are no places.
    """
    if not x or not y:
        raise ValueError(f"there are {len(x)} places along x and {len(y)} along y; expected at least one each")
    workpiece = Workpiece(module)
    rows = [[dict(measure(workpiece.put(plane.at(a, b)))) for a in x] for b in y]
    values = {
        name: torch.tensor([[cell[name] for cell in row] for row in rows], dtype=torch.float64) for name in rows[0][0]
    }
    return Landscape(list(x), list(y), values, plane.points)


def _dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return sum(float((a[name] * b[name]).sum()) for name in a)


def _norm(a: Mapping[str, Tensor]) -> float:
    return math.sqrt(_dot(a, a))
