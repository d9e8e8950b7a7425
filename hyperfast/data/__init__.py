"""Sets of images as tensors, and the loader that keeps them on the device."""

from hyperfast.data.cifar import read_cifar
from hyperfast.data.dataset import ImageSet, Splits, stratified_split
from hyperfast.data.digits import read_digits
from hyperfast.data.folder import read_folder
from hyperfast.data.loader import Augment, DeviceLoader
from hyperfast.data.registry import default_augment, load, names

__all__ = [
    "Augment",
    "DeviceLoader",
    "ImageSet",
    "Splits",
    "default_augment",
    "load",
    "names",
    "read_cifar",
    "read_digits",
    "read_folder",
    "stratified_split",
]
