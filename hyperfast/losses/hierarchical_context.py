"""Hierarchical context loss: squared differences of maps and of what they are pooled to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from hyperfast import functional
from hyperfast.losses.base import FeatureLoss, Weights
from hyperfast.losses.plain import as_map

if TYPE_CHECKING:
    from torch import Tensor


class HierarchicalContext(FeatureLoss):
    r"""The student's map is the teacher's, and so is what remains of it when it is pooled ever smaller.

    With :math:`F^{(0)} = F`, :math:`F^{(k)}` the map pooled to the k-th of the sizes, and
    :math:`\lambda_k = 2^{-k} / \sum_j 2^{-j}`:

    .. math::
        L = \sum_k \lambda_k \, \mathrm{mean} \, (F_s^{(k)} - F_t^{(k)})^2

    Args:
        sizes: heights and widths to pool to, by averages; those that are not smaller than the map are left out, and
            take no share of the weights.
        weights: of the taps, see `FeatureLoss`; default 1 / L. PAT sums over the stages: `[1.0] * 4`.
        beta: of the whole loss, see there.

    Shape:
        Maps `[B, C, H, W]` or tokens `[B, N, C]` (`as_map`), float16 to float64, of one shape in both networks, as
        maps: a connector makes it so. Result: a scalar, float32 (float64 for float64 maps).

    Raises:
        ValueError: sizes that are not positive; (in the forward) maps of different shapes.

    Notes:
        The poolings run as torch operations; the squared differences of all taps and sizes are one launch of
        `functional.fitnets`. The gradient by :math:`F_s^{(k)}` is :math:`2 \lambda_k (F_s^{(k)} - F_t^{(k)})` divided
        by its number of elements, spread evenly over what was pooled.

        PAT compares what its region-aware attention makes of the stages, and prompts the teacher; that is architecture
        and not here: with a plain `Connector` in their place its accuracies do not apply.

    Source: Chen et al., arXiv 2104.09044, whose loss PAT (ICCV 2025, jimmylin0979/PAT) takes over. No values of that
    code are pinned.
    """

    def __init__(self, sizes: Sequence[int] = (4, 2, 1), weights: Weights | None = None, beta: float = 1.0) -> None:
        super().__init__(weights, beta)
        if any(size < 1 for size in sizes):
            raise ValueError(f"sizes is {tuple(sizes)}; expected heights of at least 1")
        self.sizes = tuple(sizes)

    def per_tap(self, student: Sequence[Tensor], teacher: Sequence[Tensor], expected_grad: Tensor) -> Tensor:
        """Losses `[L]` of all taps."""
        pyramids = []
        for index, (s, t) in enumerate(zip(student, teacher, strict=True)):
            maps = as_map(s), as_map(t)
            if maps[0].shape != maps[1].shape:
                raise ValueError(
                    f"tap {index}: student map {list(s.shape)}, teacher map {list(t.shape)}; the loss compares element "
                    "by element: bring the student's to the teacher's shape, for instance with a convolution"
                )
            pyramids.append([self._pyramid(features) for features in maps])
        shares = [_shares(len(s)) for s, _ in pyramids]
        expected = [expected_grad[tap] * share for tap, found in enumerate(shares) for share in found]
        losses = functional.fitnets(
            [level for s, _ in pyramids for level in s],
            [level for _, t in pyramids for level in t],
            expected_grad=torch.stack(expected),
        )
        per_level = iter(losses.unbind())
        return torch.stack(
            [sum((share * next(per_level) for share in found), losses.new_zeros(())) for found in shares]
        )

    def _pyramid(self, features: Tensor) -> list[Tensor]:
        """The map, and what it is pooled to."""
        smaller = [size for size in self.sizes if size < features.shape[2]]
        return [features, *(F.adaptive_avg_pool2d(features, size) for size in smaller)]

    def extra_repr(self) -> str:
        return f"sizes={self.sizes}"


def _shares(levels: int) -> list[float]:
    """1, 1/2, 1/4, ... divided by their sum."""
    total = 2 - 2.0 ** (1 - levels)
    return [2.0**-level / total for level in range(levels)]
