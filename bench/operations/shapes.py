"""Shapes of the convolution and linear tensors of CIFAR networks, in definition order.

They stand here in plain numbers so that what is measured does not move with the model code. Sizes are those of
chenyaofo/pytorch-cifar-models with 100 classes: no bias in ResNet convolutions, 1x1 convolutions as shortcuts, a
three-layer classifier on VGG.
"""

from __future__ import annotations

Shapes = dict[str, tuple[int, ...]]


def resnet(depth: int, classes: int = 100) -> Shapes:
    """ResNet-`depth` (6n + 2) of the CIFAR family: stages of 16, 32 and 64 channels."""
    shapes: Shapes = {"conv1.weight": (16, 3, 3, 3)}
    channels = 16
    for stage, width in enumerate((16, 32, 64), start=1):
        for block in range((depth - 2) // 6):
            prefix = f"layer{stage}.{block}"
            shapes[f"{prefix}.conv1.weight"] = (width, channels, 3, 3)
            shapes[f"{prefix}.conv2.weight"] = (width, width, 3, 3)
            if channels != width:
                shapes[f"{prefix}.downsample.0.weight"] = (width, channels, 1, 1)
            channels = width
    shapes["fc.weight"] = (classes, channels)
    shapes["fc.bias"] = (classes,)
    return shapes


def vgg11_bn(classes: int = 100) -> Shapes:
    """VGG-11 with batch normalisation, whose convolutions have biases."""
    shapes: Shapes = {}
    channels, layer = 3, 0
    for width in (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512):
        if width == 0:  # pooling
            layer += 1
            continue
        shapes[f"features.{layer}.weight"] = (width, channels, 3, 3)
        shapes[f"features.{layer}.bias"] = (width,)
        channels, layer = width, layer + 3
    for index, (width, inputs) in zip((0, 3, 6), ((512, 512), (512, 512), (classes, 512)), strict=True):
        shapes[f"classifier.{index}.weight"] = (width, inputs)
        shapes[f"classifier.{index}.bias"] = (width,)
    return shapes


def shufflenet_v2_x0_5_activations(batch: int) -> list[tuple[int, ...]]:
    """What the 37 activations of ShuffleNetV2 x0.5 take in, for images of 32x32: 194,560 elements per image."""
    shapes: list[tuple[int, ...]] = [(batch, 24, 32, 32)]
    for width, blocks, size in ((24, 4, 16), (48, 8, 8), (96, 4, 4)):
        half = (batch, width, size, size)
        # A block that halves the size has two branches; the longer one begins at the larger size.
        shapes += [half, (batch, width, 2 * size, 2 * size), half, *[half] * (2 * (blocks - 1))]
    return [*shapes, (batch, 1024, 4, 4)]
