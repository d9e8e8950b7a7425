"""Architectures for small images, made by name, and the reading of their weights."""

from hyperfast.models.mobilenet import (
    MobileNetV2,
    mobilenetv2_x0_5,
    mobilenetv2_x0_75,
    mobilenetv2_x1_0,
    mobilenetv2_x1_4,
)
from hyperfast.models.registry import create, names
from hyperfast.models.repvgg import RepVGG, repvgg_a0, repvgg_a1, repvgg_a2
from hyperfast.models.resnet import ResNet, resnet8, resnet20, resnet32, resnet44, resnet56
from hyperfast.models.shufflenet import (
    ShuffleNetV2,
    shufflenetv2_x0_5,
    shufflenetv2_x1_0,
    shufflenetv2_x1_5,
    shufflenetv2_x2_0,
)
from hyperfast.models.tokens import MlpMixer, VisionTransformer, mixer_tiny32, vit_tiny32
from hyperfast.models.vgg import VGG, vgg11_bn, vgg13_bn, vgg16_bn, vgg19_bn
from hyperfast.models.weights import Checkpoint, load_weights, read_checkpoint

__all__ = [
    "VGG",
    "Checkpoint",
    "MlpMixer",
    "MobileNetV2",
    "RepVGG",
    "ResNet",
    "ShuffleNetV2",
    "VisionTransformer",
    "create",
    "load_weights",
    "mixer_tiny32",
    "mobilenetv2_x0_5",
    "mobilenetv2_x0_75",
    "mobilenetv2_x1_0",
    "mobilenetv2_x1_4",
    "names",
    "read_checkpoint",
    "repvgg_a0",
    "repvgg_a1",
    "repvgg_a2",
    "resnet8",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "shufflenetv2_x0_5",
    "shufflenetv2_x1_0",
    "shufflenetv2_x1_5",
    "shufflenetv2_x2_0",
    "vgg11_bn",
    "vgg13_bn",
    "vgg16_bn",
    "vgg19_bn",
    "vit_tiny32",
]
