"""ShuffleNetV2 for 32x32 images.

Source: Ma et al., arXiv 1807.11164, with the module names and strides of chenyaofo/pytorch-cifar-models, whose weights
load. The stem has stride 1 and no pooling follows it, so that 32x32 images end at 4x4. Activations are not in place
here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = [
    "ShuffleBlock",
    "ShuffleNetV2",
    "shufflenetv2_x0_5",
    "shufflenetv2_x1_0",
    "shufflenetv2_x1_5",
    "shufflenetv2_x2_0",
]

_STEM = 24
_BLOCKS = (4, 8, 4)


def _pointwise(in_channels: int, out_channels: int) -> list[nn.Module]:
    return [nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()]


def _depthwise(channels: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
    return [conv, nn.BatchNorm2d(channels)]


class ShuffleBlock(nn.Module):
    """Two branches, concatenated and shuffled: channel 2i of the output comes from the first, 2i + 1 from the second.

    With stride 2 both branches read the whole input. With stride 1 the first is one half of the input as it is, and
    `branch2` reads the other: half of the output has passed the block untouched, so that maps before an activation
    have to be read inside `branch1` and `branch2` (`taps(at="activations")`), not at the block.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.splits = stride == 1
        if not self.splits:
            self.branch1 = nn.Sequential(*_depthwise(in_channels, stride), *_pointwise(in_channels, half))
        inputs = half if self.splits else in_channels
        self.branch2 = nn.Sequential(*_pointwise(inputs, half), *_depthwise(half, stride), *_pointwise(half, half))

    def forward(self, x: Tensor) -> Tensor:
        if self.splits:
            first, second = x.chunk(2, dim=1)
        else:
            first, second = self.branch1(x), x
        # Not a stack along a new dimension: it is one copy less, but ends channels-last layout at every block.
        return torch.channel_shuffle(torch.cat((first, self.branch2(second)), dim=1), 2)


class ShuffleNetV2(nn.Module):
    """Stem `conv1`, stages `stage2`, `stage3`, `stage4` of 4, 8 and 4 blocks, 1x1 convolution `conv5`, classifier `fc`.

    Args:
        channels: of the three stages and of the last convolution.
        num_classes: width of the logits.
        in_channels: channels of the images.
        width: channels of the stem; with another number than 24 all `channels` change in proportion, to even numbers.

    Shape: images `[B, in_channels, H, W]`, any H and W of at least 1, to logits `[B, num_classes]`. On 32x32 images the
    stages end at 16x16, 8x8 and 4x4.

    Weights start as torch's layers do.
    """

    def __init__(
        self,
        channels: tuple[int, int, int, int],
        num_classes: int = 10,
        *,
        in_channels: int = 3,
        width: int = _STEM,
    ) -> None:
        super().__init__()
        *outputs, last = (max(2, 2 * round(count * width / _STEM / 2)) for count in channels)
        stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.conv1 = nn.Sequential(stem, nn.BatchNorm2d(width), nn.ReLU())
        self.stage2 = _stage(_BLOCKS[0], width, outputs[0])
        self.stage3 = _stage(_BLOCKS[1], outputs[0], outputs[1])
        self.stage4 = _stage(_BLOCKS[2], outputs[1], outputs[2])
        self.conv5 = nn.Sequential(*_pointwise(outputs[2], last))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(last, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage4(self.stage3(self.stage2(self.conv1(x))))
        logits: Tensor = self.fc(self.avgpool(self.conv5(x)).flatten(1))
        return logits


def _stage(blocks: int, in_channels: int, out_channels: int) -> nn.Sequential:
    first = ShuffleBlock(in_channels, out_channels, 2)
    return nn.Sequential(first, *(ShuffleBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


def shufflenetv2_x0_5(num_classes: int = 10, *, in_channels: int = 3, width: int = 24) -> ShuffleNetV2:
    """48, 96 and 192 channels; 444,292 parameters with 100 classes."""
    return ShuffleNetV2((48, 96, 192, 1024), num_classes, in_channels=in_channels, width=width)


def shufflenetv2_x1_0(num_classes: int = 10, *, in_channels: int = 3, width: int = 24) -> ShuffleNetV2:
    """116, 232 and 464 channels; 1,356,104 parameters with 100 classes."""
    return ShuffleNetV2((116, 232, 464, 1024), num_classes, in_channels=in_channels, width=width)


def shufflenetv2_x1_5(num_classes: int = 10, *, in_channels: int = 3, width: int = 24) -> ShuffleNetV2:
    """176, 352 and 704 channels; 2,581,124 parameters with 100 classes."""
    return ShuffleNetV2((176, 352, 704, 1024), num_classes, in_channels=in_channels, width=width)


def shufflenetv2_x2_0(num_classes: int = 10, *, in_channels: int = 3, width: int = 24) -> ShuffleNetV2:
    """244, 488 and 976 channels; 5,549,896 parameters with 100 classes."""
    return ShuffleNetV2((244, 488, 976, 2048), num_classes, in_channels=in_channels, width=width)
