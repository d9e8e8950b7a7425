"""Architectures for small images, made by name, and the reading of their weights."""

from hyperfast.models.registry import create, names
from hyperfast.models.resnet import ResNet, resnet8, resnet20, resnet32, resnet44, resnet56
from hyperfast.models.vgg import VGG, vgg11_bn, vgg13_bn, vgg16_bn, vgg19_bn
from hyperfast.models.weights import Checkpoint, load_weights, read_checkpoint

__all__ = [
    "VGG",
    "Checkpoint",
    "ResNet",
    "create",
    "load_weights",
    "names",
    "read_checkpoint",
    "resnet8",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "vgg11_bn",
    "vgg13_bn",
    "vgg16_bn",
    "vgg19_bn",
]
