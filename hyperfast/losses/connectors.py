"""Connectors: a student's feature maps in the shape of the teacher's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperfast.losses.plain import as_map, class_tokens

Kind = Literal["conv", "regressor"]
_KINDS = ("conv", "regressor")


class Connector(nn.Module):
    r"""A layer between a student's tap and a loss that compares it with a teacher's map of another shape.

    A convolution without bias, batch norm and, for a regressor, ReLU. The kernel follows from the heights and widths:

    | student to teacher | convolution |
    |---|---|
    | equal | 1x1 |
    | twice as large | 3x3, stride 2 |
    | half as large | transposed 4x4, stride 2 |
    | anything else | average-pooled or bilinearly interpolated to the teacher's size, then 1x1 |

    Args:
        student: shape of the student's map without the batch, `(C, H, W)`, or `(C,)` for vectors, where a linear layer
            takes the place of the convolution.
        teacher: the same of the teacher's.
        kind: `"conv"`, activation boundary's connector, or `"regressor"`, FitNets' in RepDistiller, with a ReLU behind
            it: for maps from behind an activation.

    Shape:
        `[B, *student]` to `[B, *teacher]`.

    Raises:
        ValueError: shapes of other or unequal numbers of axes; another kind.

    Notes:
        Weights start from :math:`N(0, 2 / (k^2 C_{out}))`, norms from 1 and 0. It is trained with the student, and of
        no use afterwards. RepDistiller takes a convolution without padding, of kernel 1 + H_s - H_t, where the sizes
        have no simple ratio.

    Source: bhheo/AB_distillation (1x1 convolution and batch norm); RepDistiller's `ConvReg`.
    """

    def __init__(self, student: Sequence[int], teacher: Sequence[int], kind: Kind = "conv") -> None:
        super().__init__()
        if kind not in _KINDS:
            raise ValueError(f"kind is {kind!r}; choose one of {', '.join(map(repr, _KINDS))}")
        if len(student) != len(teacher) or len(student) not in (1, 3):
            raise ValueError(
                f"no connector leads from a map {list(student)} to one {list(teacher)}; both are to be (C, H, W), or "
                "both (C,)"
            )
        self.kind = kind
        self.size = tuple(teacher[1:])
        channels, wanted = student[0], teacher[0]
        if not self.size:
            self.layer: nn.Module = nn.Linear(channels, wanted, bias=False)
            self.norm: nn.Module = nn.BatchNorm1d(wanted)
        else:
            self.layer = _convolution(channels, wanted, student[1:], teacher[1:])
            self.norm = nn.BatchNorm2d(wanted)
        weight: Tensor = self.layer.weight  # type: ignore[assignment]
        nn.init.normal_(weight, std=math.sqrt(2 / (wanted * weight.shape[2:].numel())))

    def forward(self, features: Tensor) -> Tensor:
        """The map as the teacher's would be shaped."""
        if isinstance(self.layer, nn.Conv2d) and self.layer.stride == (1, 1):
            features = _resized(features, self.size)
        connected: Tensor = self.norm(self.layer(features))
        return torch.relu(connected) if self.kind == "regressor" else connected

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}"


class TokenMap(nn.Module):
    """Tokens `[B, N, D]` of a square image as the map `[B, D, h, w]`, without the class token; maps as they are."""

    def forward(self, features: Tensor) -> Tensor:
        """The map."""
        return as_map(features)

    @staticmethod
    def shape(shape: Sequence[int]) -> list[int]:
        """What it makes of maps of this shape, without the batch.

        Raises:
            ValueError: tokens of no square image.
        """
        if len(shape) != 2:
            return list(shape)
        side = math.isqrt(shape[0] - class_tokens(shape[0]))
        return [shape[1], side, side]


def _convolution(channels: int, wanted: int, student: Sequence[int], teacher: Sequence[int]) -> nn.Module:
    ratios = {(s, t) for s, t in zip(student, teacher, strict=True)}
    if all(s == 2 * t for s, t in ratios):
        return nn.Conv2d(channels, wanted, 3, stride=2, padding=1, bias=False)
    if all(t == 2 * s for s, t in ratios):
        return nn.ConvTranspose2d(channels, wanted, 4, stride=2, padding=1, bias=False)
    return nn.Conv2d(channels, wanted, 1, bias=False)


def _resized(features: Tensor, size: tuple[int, ...]) -> Tensor:
    now = features.shape[2:]
    if tuple(now) == size:
        return features
    if all(n >= s for n, s in zip(now, size, strict=True)):
        return F.adaptive_avg_pool2d(features, (size[0], size[1]))
    return F.interpolate(features, size, mode="bilinear", align_corners=False)
