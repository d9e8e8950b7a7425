"""The zoo of chenyaofo/pytorch-cifar-models, CIFAR-100, as tables: sizes, names and shapes of its checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

Entry = tuple[str, tuple[int, ...]]


class Sizes(NamedTuple):
    """Of one network. Kernels are (out, in) pairs; affine counts scales and shifts of the norms."""

    parameters: int
    multiply_adds: float  # millions, convolutions and linear layers, one 32x32 image
    tensors: int
    convolutions: int
    depthwise: int
    convolution_weights: int
    kernels_3x3: int
    kernels_1x1: int
    norms: int
    affine: int
    largest: int


SIZES = {
    "resnet20": Sizes(278_324, 40.82, 65, 21, 0, 270_256, 29_744, 2_560, 21, 1_568, 36_864),
    "resnet32": Sizes(472_756, 69.13, 101, 33, 0, 463_792, 51_248, 2_560, 33, 2_464, 36_864),
    "resnet44": Sizes(667_188, 97.44, 137, 45, 0, 657_328, 72_752, 2_560, 45, 3_360, 36_864),
    "resnet56": Sizes(861_620, 125.75, 173, 57, 0, 850_864, 94_256, 2_560, 57, 4_256, 36_864),
    "vgg11_bn": Sizes(9_802_596, 153.34, 38, 8, 0, 9_217_728, 1_024_192, 0, 8, 5_504, 2_359_296),
    "vgg13_bn": Sizes(9_987_492, 228.84, 46, 10, 0, 9_402_048, 1_044_672, 0, 10, 5_888, 2_359_296),
    "vgg16_bn": Sizes(15_299_748, 313.77, 58, 13, 0, 14_710_464, 1_634_496, 0, 13, 8_448, 2_359_296),
    "vgg19_bn": Sizes(20_612_004, 398.71, 70, 16, 0, 20_018_880, 2_224_320, 0, 16, 11_008, 2_359_296),
    "mobilenetv2_x0_5": Sizes(815_780, 28.08, 158, 52, 17, 669_136, 3_664, 636_160, 52, 18_544, 204_800),
    "mobilenetv2_x0_75": Sizes(1_483_524, 59.43, 158, 52, 17, 1_328_784, 5_520, 1_279_104, 52, 26_640, 307_200),
    "mobilenetv2_x1_0": Sizes(2_351_972, 88.09, 158, 52, 17, 2_189_760, 7_232, 2_124_672, 52, 34_112, 409_600),
    "mobilenetv2_x1_4": Sizes(4_495_076, 170.23, 158, 52, 17, 4_267_840, 10_176, 4_176_256, 52, 47_936, 802_816),
    "shufflenetv2_x0_5": Sizes(444_292, 10.99, 170, 56, 19, 333_840, 1_104, 323_904, 56, 7_952, 196_608),
    "shufflenetv2_x1_0": Sizes(1_356_104, 45.09, 170, 56, 19, 1_237_424, 2_532, 1_214_636, 56, 16_180, 475_136),
    "shufflenetv2_x1_5": Sizes(2_581_124, 94.35, 170, 56, 19, 2_455_184, 3_792, 2_421_056, 56, 23_440, 720_896),
    "shufflenetv2_x2_0": Sizes(5_549_896, 188.00, 170, 56, 19, 5_311_280, 5_220, 5_264_300, 56, 33_716, 1_998_848),
    "repvgg_a0": Sizes(7_956_164, 489.19, 170, 44, 0, 7_804_320, 780_432, 780_432, 62, 23_744, 2_211_840),
    "repvgg_a1": Sizes(12_939_492, 851.44, 170, 44, 0, 12_781_440, 1_278_144, 1_278_144, 62, 29_952, 2_949_120),
    "repvgg_a2": Sizes(26_942_500, 1850.22, 168, 44, 0, 26_759_040, 2_675_904, 2_675_904, 61, 42_560, 4_866_048),
}

# Activations that read a feature map, and the elements that they read per image.
ACTIVATIONS = {
    "resnet20": (19, 188_416),
    "resnet56": (55, 532_480),
    "vgg16_bn": (13, 276_480),
    "vgg19_bn": (16, 303_104),
    "mobilenetv2_x0_5": (35, 841_216),
    "mobilenetv2_x1_0": (35, 1_502_208),
    "shufflenetv2_x0_5": (37, 194_560),
    "shufflenetv2_x1_0": (37, 412_160),
    "shufflenetv2_x2_0": (37, 838_144),
    "repvgg_a0": (22, 438_272),
    "repvgg_a2": (22, 825_344),
}

_VGG_BLOCKS = {"11": (1, 1, 2, 2, 2), "13": (2, 2, 2, 2, 2), "16": (2, 2, 3, 3, 3), "19": (2, 2, 4, 4, 4)}
# Channels after the stem and each of the 17 blocks' stages, and after the last convolution.
_MOBILE = {
    "x0_5": (16, (8, 16, 16, 32, 48, 80, 160), 1280),
    "x0_75": (24, (16, 24, 24, 48, 72, 120, 240), 1280),
    "x1_0": (32, (16, 24, 32, 64, 96, 160, 320), 1280),
    "x1_4": (48, (24, 32, 48, 88, 136, 224, 448), 1792),
}
_SHUFFLE = {
    "x0_5": (48, 96, 192, 1024),
    "x1_0": (116, 232, 464, 1024),
    "x1_5": (176, 352, 704, 1024),
    "x2_0": (244, 488, 976, 2048),
}
_REPVGG = {
    "a0": (48, 48, 96, 192, 1280),
    "a1": (64, 64, 128, 256, 1280),
    "a2": (64, 96, 192, 384, 1408),
}


def options(name: str) -> dict[str, str]:
    """What `create` has to be given for the zoo's form of a model."""
    return {"shortcut": "B"} if name.startswith("resnet") else {}


def checkpoint(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the zoo's checkpoint of a model."""
    family, _, variant = name.partition("_")
    if family.startswith("resnet"):
        return dict(_resnet((int(family[6:]) - 2) // 6))
    if family.startswith("vgg"):
        return dict(_vgg(_VGG_BLOCKS[family[3:]]))
    if family == "mobilenetv2":
        return dict(_mobilenet(*_MOBILE[variant]))
    if family == "shufflenetv2":
        return dict(_shufflenet(*_SHUFFLE[variant]))
    return dict(_repvgg(_REPVGG[variant]))


def _norm(path: str, channels: int) -> Iterator[Entry]:
    for leaf in ("weight", "bias", "running_mean", "running_var"):
        yield f"{path}.{leaf}", (channels,)
    yield f"{path}.num_batches_tracked", ()


def _linear(path: str, inputs: int, outputs: int) -> Iterator[Entry]:
    yield f"{path}.weight", (outputs, inputs)
    yield f"{path}.bias", (outputs,)


def _conv_norm(conv: str, norm: str, outputs: int, inputs: int, kernel: int) -> Iterator[Entry]:
    yield f"{conv}.weight", (outputs, inputs, kernel, kernel)
    yield from _norm(norm, outputs)


def _resnet(blocks: int) -> Iterator[Entry]:
    yield from _conv_norm("conv1", "bn1", 16, 3, 3)
    inputs = 16
    for stage, outputs in ((1, 16), (2, 32), (3, 64)):
        for block in range(blocks):
            path = f"layer{stage}.{block}"
            yield from _conv_norm(f"{path}.conv1", f"{path}.bn1", outputs, inputs, 3)
            yield from _conv_norm(f"{path}.conv2", f"{path}.bn2", outputs, outputs, 3)
            if inputs != outputs:
                yield from _conv_norm(f"{path}.downsample.0", f"{path}.downsample.1", outputs, inputs, 1)
            inputs = outputs
    yield from _linear("fc", 64, 100)


def _vgg(blocks: tuple[int, ...]) -> Iterator[Entry]:
    index, inputs = 0, 3
    for depth, outputs in zip(blocks, (64, 128, 256, 512, 512), strict=True):
        for _ in range(depth):
            yield f"features.{index}.bias", (outputs,)
            yield from _conv_norm(f"features.{index}", f"features.{index + 1}", outputs, inputs, 3)
            index, inputs = index + 3, outputs  # convolution, norm, activation
        index += 1  # pooling
    yield from _linear("classifier.0", 512, 512)
    yield from _linear("classifier.3", 512, 512)
    yield from _linear("classifier.6", 512, 100)


def _mobilenet(stem: int, stages: tuple[int, ...], last: int) -> Iterator[Entry]:
    yield from _conv_norm("features.0.0", "features.0.1", stem, 3, 3)
    inputs, block = stem, 0
    for stage, (outputs, depth) in enumerate(zip(stages, (1, 2, 3, 4, 3, 3, 1), strict=True)):
        for _ in range(depth):
            block += 1
            path = f"features.{block}.conv"
            hidden, at = (6 * inputs, 1) if stage else (inputs, 0)
            if stage:
                yield from _conv_norm(f"{path}.0.0", f"{path}.0.1", hidden, inputs, 1)
            yield from _conv_norm(f"{path}.{at}.0", f"{path}.{at}.1", hidden, 1, 3)
            yield from _conv_norm(f"{path}.{at + 1}", f"{path}.{at + 2}", outputs, hidden, 1)
            inputs = outputs
    yield from _conv_norm("features.18.0", "features.18.1", last, inputs, 1)
    yield from _linear("classifier.1", last, 100)


def _shufflenet(*channels: int) -> Iterator[Entry]:
    *stages, last = channels
    yield from _conv_norm("conv1.0", "conv1.1", 24, 3, 3)
    inputs = 24
    for stage, (outputs, depth) in enumerate(zip(stages, (4, 8, 4), strict=True), start=2):
        half = outputs // 2
        for block in range(depth):
            path = f"stage{stage}.{block}.branch"
            if block == 0:
                yield from _conv_norm(f"{path}1.0", f"{path}1.1", inputs, 1, 3)
                yield from _conv_norm(f"{path}1.2", f"{path}1.3", half, inputs, 1)
            yield from _conv_norm(f"{path}2.0", f"{path}2.1", half, half if block else inputs, 1)
            yield from _conv_norm(f"{path}2.3", f"{path}2.4", half, 1, 3)
            yield from _conv_norm(f"{path}2.5", f"{path}2.6", half, half, 1)
        inputs = outputs
    yield from _conv_norm("conv5.0", "conv5.1", last, inputs, 1)
    yield from _linear("fc", last, 100)


def _repvgg(channels: tuple[int, ...]) -> Iterator[Entry]:
    inputs = 3
    for stage, (outputs, depth) in enumerate(zip(channels, (1, 2, 4, 14, 1), strict=True)):
        for block in range(depth):
            path = f"stage{stage}.{block}" if stage else "stage0"
            stride = 2 if stage > 1 and block == 0 else 1
            if inputs == outputs and stride == 1:
                yield from _norm(f"{path}.rbr_identity", outputs)
            yield from _conv_norm(f"{path}.rbr_dense.conv", f"{path}.rbr_dense.bn", outputs, inputs, 3)
            yield from _conv_norm(f"{path}.rbr_1x1.conv", f"{path}.rbr_1x1.bn", outputs, inputs, 1)
            inputs = outputs
    yield from _linear("linear", inputs, 100)
