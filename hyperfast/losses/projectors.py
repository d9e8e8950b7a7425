"""Projectors: what a stage of the student would have become, had the network gone on from there to a vector."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from hyperfast.losses.plain import class_tokens

_GRID = 7  # patches per side, from which on tokens are not merged
_STD = 0.02  # of the initial linear weights


class SeparableConv(nn.Sequential):
    """Depthwise 3x3 of stride 2 and 1x1, then depthwise 3x3 and 1x1, each pair with batch norm and ReLU behind it."""

    def __init__(self, channels: int, outputs: int) -> None:
        layers: list[nn.Module] = []
        for stride, after in ((2, channels), (1, outputs)):
            layers += [
                nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
                nn.Conv2d(channels, after, 1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            ]
        super().__init__(*layers)


class PatchMerging(nn.Module):
    """Each 2x2 patches of a square image to one: norm and linear layer over the 4 D channels of `[B, 4 N, D]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.layer = nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens `[B, N, D]`."""
        batch, count, width = tokens.shape
        half = math.isqrt(count) // 2
        squares = tokens.view(batch, half, 2, half, 2, width).permute(0, 1, 3, 2, 4, 5)
        merged: Tensor = self.layer(self.norm(squares.reshape(batch, half * half, 4 * width)))
        return merged


class StageProjector(nn.Module):
    """A branch behind one stage of the student, which makes a vector per image of its map.

    - Of a map `[C, H, W]`: `remaining` separable convolutions of stride 2, each with twice the channels of the one
      before and the last with `width`; behind the last stage a 1x1 convolution instead. Then the mean over the
      positions.
    - Of tokens `[N, D]` of a square image: while there are more than 7x7 and they can be halved, 2x2 patches are
      merged; then `remaining` transformer blocks, at least one. Then the class token, where there is one, or the mean.

    Args:
        shape: of the map without the batch.
        remaining: how many stages of the network follow; 0 behind the last.
        width: of the vector, for maps; tokens keep their own, D.

    Attributes:
        width: of the vector.

    Shape:
        `[B, *shape]` to `[B, width]`.

    Raises:
        ValueError: a map of another number of axes; tokens of no square image.

    Notes:
        Convolutions start from Kaiming's normal distribution in mode `fan_out`, norms from 1 and 0, linear weights from
        a normal distribution of standard deviation 0.02, cut off at two of them, biases from 0; the projections of the
        attention to queries, keys and values as PyTorch has them. The transformer blocks have 4 heads, or 2 or 1 where
        4 do not divide D. The batch norms need a batch of at least two where the map shrinks to one position.

    Source: Hao et al., arXiv 2310.19444 (Hao840/OFAKD), whose networks see 224x224 images and stages of 56 to 7
    positions. There tokens of hierarchical transformers are merged too, here they need not be.
    """

    def __init__(self, shape: Sequence[int], remaining: int, width: int) -> None:
        super().__init__()
        if len(shape) == 3:
            self.width, self.class_tokens = width, 0
            self.layers: nn.Module = _convolutions(shape[0], remaining, width)
        elif len(shape) == 2:
            self.width, self.class_tokens = shape[1], class_tokens(shape[0])
            self.merge, self.layers = _transformer(shape[0] - self.class_tokens, shape[1], max(1, remaining))
        else:
            raise ValueError(f"the map is {list(shape)} without the batch; expected (C, H, W), or tokens (N, D)")
        for module in self.modules():
            _initialise(module)

    def forward(self, features: Tensor) -> Tensor:
        """A vector per image, `[B, width]`."""
        if features.ndim == 4:
            projected: Tensor = self.layers(features)
            return projected.mean((2, 3))
        first, patches = features[:, : self.class_tokens], features[:, self.class_tokens :]
        tokens: Tensor = self.layers(torch.cat((first, self.merge(patches)), 1))
        return tokens[:, 0] if self.class_tokens else tokens.mean(1)


def _convolutions(channels: int, remaining: int, width: int) -> nn.Module:
    if remaining == 0:
        return nn.Conv2d(channels, width, 1)
    channels_of = [channels << step for step in range(remaining)] + [width]
    return nn.Sequential(*(SeparableConv(before, after) for before, after in pairwise(channels_of)))


def _transformer(patches: int, width: int, blocks: int) -> tuple[nn.Module, nn.Module]:
    merging = nn.Sequential()
    side = math.isqrt(patches)
    while side > _GRID and side % 2 == 0:
        merging.append(PatchMerging(width))
        side //= 2
    heads = math.gcd(4, width)
    block = [
        nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        for _ in range(blocks)
    ]
    return merging, nn.Sequential(*block)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=_STD, a=-2 * _STD, b=2 * _STD)
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
