"""MobileNetV2 for 32x32 images.

Source: Sandler et al., arXiv 1801.04381, with the module names and strides of chenyaofo/pytorch-cifar-models, whose
weights load. Strides are 1 in the stem and in the second stage, so that 32x32 images end at 4x4. Activations are not in
place here.
"""

from __future__ import annotations

from torch import Tensor, nn

__all__ = [
    "InvertedResidual",
    "MobileNetV2",
    "mobilenetv2_x0_5",
    "mobilenetv2_x0_75",
    "mobilenetv2_x1_0",
    "mobilenetv2_x1_4",
]

_STEM, _LAST = 32, 1280  # channels of the first and of the last convolution, for the multiplier 1
# Expansion, channels, blocks and stride of each stage, for the multiplier 1.
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def _multiple_of_8(channels: float) -> int:
    """The nearest one, at least 8, and the next one where that would take more than a tenth away."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8


def _conv_bn_relu6(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU6(),
    )


class InvertedResidual(nn.Module):
    """1x1 expansion (none where it is 1), 3x3 depthwise, linear 1x1 projection; plus the input where shapes agree."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = expansion * in_channels
        expand = [_conv_bn_relu6(in_channels, hidden, 1)] if expansion > 1 else []
        self.residual = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(
            *expand,
            _conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return x + out if self.residual else out


class MobileNetV2(nn.Module):
    """Stem `features.0`, 17 inverted residuals, 1x1 convolution `features.18`, dropout and a linear classifier.

    Args:
        multiplier: of all channels of the published network, rounded to multiples of 8; the 1280 of the last
            convolution never become fewer.
        num_classes: width of the logits.
        in_channels: channels of the images.
        width: channels of the stem, 32 times the multiplier by default; with another number all the other channels
            change in proportion, in multiples of 8.
        dropout: probability, before the classifier.

    Shape: images `[B, in_channels, H, W]`, any H and W of at least 1, to logits `[B, num_classes]`.

    The output of a block is linear: no activation follows its last batch norm or its sum.

    Convolutions start from Kaiming's normal distribution in mode `fan_out`, linear weights from N(0, 0.01^2), biases
    from 0.
    """

    def __init__(
        self,
        multiplier: float,
        num_classes: int = 10,
        *,
        in_channels: int = 3,
        width: int | None = None,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        stem = _multiple_of_8(_STEM * multiplier)
        channels = stem if width is None else width
        proportion = channels / stem
        features: list[nn.Module] = [_conv_bn_relu6(in_channels, channels, 3)]
        for expansion, base, blocks, stride in _STAGES:
            outputs = _multiple_of_8(_multiple_of_8(base * multiplier) * proportion)
            for block in range(blocks):
                features += [InvertedResidual(channels, outputs, 1 if block else stride, expansion)]
                channels = outputs
        last = _multiple_of_8(_multiple_of_8(_LAST * max(1.0, multiplier)) * proportion)
        features += [_conv_bn_relu6(channels, last, 1)]
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.avgpool(self.features(x)).flatten(1))
        return logits


def mobilenetv2_x0_5(
    num_classes: int = 10, *, in_channels: int = 3, width: int = 16, dropout: float = 0.2
) -> MobileNetV2:
    """Half the channels; 815,780 parameters with 100 classes."""
    return MobileNetV2(0.5, num_classes, in_channels=in_channels, width=width, dropout=dropout)


def mobilenetv2_x0_75(
    num_classes: int = 10, *, in_channels: int = 3, width: int = 24, dropout: float = 0.2
) -> MobileNetV2:
    """Three quarters of the channels; 1,483,524 parameters with 100 classes."""
    return MobileNetV2(0.75, num_classes, in_channels=in_channels, width=width, dropout=dropout)


def mobilenetv2_x1_0(
    num_classes: int = 10, *, in_channels: int = 3, width: int = 32, dropout: float = 0.2
) -> MobileNetV2:
    """The published channels; 2,351,972 parameters with 100 classes."""
    return MobileNetV2(1.0, num_classes, in_channels=in_channels, width=width, dropout=dropout)


def mobilenetv2_x1_4(
    num_classes: int = 10, *, in_channels: int = 3, width: int = 48, dropout: float = 0.2
) -> MobileNetV2:
    """1.4 times the channels; 4,495,076 parameters with 100 classes."""
    return MobileNetV2(1.4, num_classes, in_channels=in_channels, width=width, dropout=dropout)
