"""Residual networks for CIFAR: three stages of basic blocks, depth 6n + 2.

Source: He et al., arXiv 1512.03385, section 4.2. Module names are those of chenyaofo/pytorch-cifar-models and
akamaster/pytorch_resnet_cifar10, which differ in the shortcut ("B" and "A") and in the name of the classifier (`fc` and
`linear`; it is `fc` here and `load_weights` renames). Neither can be tapped at every activation: one in-place ReLU, or
a functional one, serves a whole block. Here each activation is a module of its own that writes to a new tensor.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["BasicBlock", "ResNet", "ZeroPadShortcut", "resnet8", "resnet20", "resnet32", "resnet44", "resnet56"]

Shortcut = Literal["A", "B"]


class ZeroPadShortcut(nn.Module):
    """Option A: every `stride`-th position, and channels of zeros on both sides. Has no parameters."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        extra = out_channels - in_channels
        self.padding = (0, 0, 0, 0, extra // 2, extra - extra // 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[..., :: self.stride, :: self.stride], self.padding)


class BasicBlock(nn.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + downsample(x)) with 3x3 convolutions."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module
        if stride == 1 and in_channels == out_channels:
            self.downsample = nn.Identity()
        elif shortcut == "A":
            self.downsample = ZeroPadShortcut(in_channels, out_channels, stride)
        else:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        result: Tensor = self.relu2(out + self.downsample(x))
        return result


class ResNet(nn.Module):
    """Stages `layer1`, `layer2`, `layer3` of `blocks` blocks with `width`, 2 `width` and 4 `width` channels.

    Args:
        blocks: n, blocks per stage; the depth is 6n + 2.
        num_classes: width of the logits.
        in_channels: channels of the images.
        width: channels of the first stage.
        shortcut: where a stage begins, `"A"` (subsampling and zero channels, no parameters; the choice of He et al.
            for CIFAR) or `"B"` (1x1 convolution and batch norm).

    Shape: images `[B, in_channels, H, W]`, any H and W of at least 1, to logits `[B, num_classes]`. On 32x32 images the
    stages end at 32x32, 16x16 and 8x8.

    Convolutions start from Kaiming's normal distribution in mode `fan_out`, batch norms from 1 and 0.
    """

    def __init__(
        self,
        blocks: int,
        num_classes: int = 10,
        *,
        in_channels: int = 3,
        width: int = 16,
        shortcut: Shortcut = "A",
    ) -> None:
        super().__init__()
        if shortcut not in ("A", "B"):
            raise ValueError(f"shortcut is {shortcut!r}; choose 'A' or 'B'")
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1 = _stage(blocks, width, width, 1, shortcut)
        self.layer2 = _stage(blocks, width, 2 * width, 2, shortcut)
        self.layer3 = _stage(blocks, 2 * width, 4 * width, 2, shortcut)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


def _stage(blocks: int, in_channels: int, out_channels: int, stride: int, shortcut: Shortcut) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1, shortcut) for _ in range(blocks - 1)))


def resnet8(num_classes: int = 10, *, in_channels: int = 3, width: int = 8, shortcut: Shortcut = "A") -> ResNet:
    """One block per stage, narrow: for the 8x8 digits (with `in_channels=1`) and for tests."""
    return ResNet(1, num_classes, in_channels=in_channels, width=width, shortcut=shortcut)


def resnet20(num_classes: int = 10, *, in_channels: int = 3, width: int = 16, shortcut: Shortcut = "A") -> ResNet:
    """Three blocks per stage; 278,324 parameters with shortcut B and 100 classes."""
    return ResNet(3, num_classes, in_channels=in_channels, width=width, shortcut=shortcut)


def resnet32(num_classes: int = 10, *, in_channels: int = 3, width: int = 16, shortcut: Shortcut = "A") -> ResNet:
    """Five blocks per stage; 472,756 parameters with shortcut B and 100 classes."""
    return ResNet(5, num_classes, in_channels=in_channels, width=width, shortcut=shortcut)


def resnet44(num_classes: int = 10, *, in_channels: int = 3, width: int = 16, shortcut: Shortcut = "A") -> ResNet:
    """Seven blocks per stage; 667,188 parameters with shortcut B and 100 classes."""
    return ResNet(7, num_classes, in_channels=in_channels, width=width, shortcut=shortcut)


def resnet56(num_classes: int = 10, *, in_channels: int = 3, width: int = 16, shortcut: Shortcut = "A") -> ResNet:
    """Nine blocks per stage; 861,620 parameters with shortcut B and 100 classes."""
    return ResNet(9, num_classes, in_channels=in_channels, width=width, shortcut=shortcut)
