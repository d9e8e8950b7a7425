"""VGG networks with batch norm for 32x32 images.

Source: Simonyan and Zisserman, arXiv 1409.1556, with the module names and the small classifier of
chenyaofo/pytorch-cifar-models, whose weights load. Activations are not in place here.
"""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["VGG", "vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn"]

# Channels of a stage as multiples of the first one's; each stage ends in a 2x2 max-pooling.
_STAGE_WIDTHS = (1, 2, 4, 8, 8)


class VGG(nn.Module):
    """3x3 convolutions with bias, batch norm and ReLU in five stages (`features`), then three linear layers.

    Args:
        depths: convolutions of each of the five stages.
        num_classes: width of the logits.
        in_channels: channels of the images.
        width: channels of the first stage; the last two stages and the hidden linear layers have 8 `width`.
        dropout: probability, after both hidden linear layers.

    Shape: images `[B, in_channels, H, W]`, H and W at least 32, to logits `[B, num_classes]`. Larger images are
    averaged over the positions that are left after the last stage.

    Convolutions start from Kaiming's normal distribution in mode `fan_out`, linear weights from N(0, 0.01^2), all
    biases from 0.

    `taps(at="activations")` reads `features` alone: what the classifier's activations read has no positions.
    """

    tap_activations = ("features.*",)

    def __init__(
        self,
        depths: tuple[int, int, int, int, int],
        num_classes: int = 10,
        *,
        in_channels: int = 3,
        width: int = 64,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for depth, multiple in zip(depths, _STAGE_WIDTHS, strict=True):
            for _ in range(depth):
                layers += [nn.Conv2d(channels, multiple * width, 3, padding=1), nn.BatchNorm2d(multiple * width)]
                layers += [nn.ReLU()]
                channels = multiple * width
            layers += [nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(channels, channels),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(channels, channels),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(channels, num_classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.avgpool(self.features(x)).flatten(1))
        return logits


def vgg11_bn(num_classes: int = 10, *, in_channels: int = 3, width: int = 64, dropout: float = 0.5) -> VGG:
    """Eight convolutions; 9,802,596 parameters with 100 classes."""
    return VGG((1, 1, 2, 2, 2), num_classes, in_channels=in_channels, width=width, dropout=dropout)


def vgg13_bn(num_classes: int = 10, *, in_channels: int = 3, width: int = 64, dropout: float = 0.5) -> VGG:
    """Ten convolutions; 9,987,492 parameters with 100 classes."""
    return VGG((2, 2, 2, 2, 2), num_classes, in_channels=in_channels, width=width, dropout=dropout)


def vgg16_bn(num_classes: int = 10, *, in_channels: int = 3, width: int = 64, dropout: float = 0.5) -> VGG:
    """Thirteen convolutions; 15,299,748 parameters with 100 classes."""
    return VGG((2, 2, 3, 3, 3), num_classes, in_channels=in_channels, width=width, dropout=dropout)


def vgg19_bn(num_classes: int = 10, *, in_channels: int = 3, width: int = 64, dropout: float = 0.5) -> VGG:
    """Sixteen convolutions; 20,612,004 parameters with 100 classes."""
    return VGG((2, 2, 4, 4, 4), num_classes, in_channels=in_channels, width=width, dropout=dropout)
