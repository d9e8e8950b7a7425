"""Trees of image files, one folder per class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hyperfast.data.dataset import ImageSet, Splits, channel_statistics, stratified_split

__all__ = ["read_folder"]

_TEST_SEED = 0


def read_folder(root: str | Path | None, *, size: int = 32, channels: int = 3, test_fraction: float = 0.2) -> Splits:
    """Read `root/<class>/*`, or `root/train/<class>/*` with `root/test/<class>/*` and perhaps `root/val/<class>/*`.

    Classes and files are taken in the order of their names. Files that do not have the suffix of an image format that
    Pillow knows are passed over. An image is scaled until its shorter side fits and cut to its central square.

    Args:
        root: the folder.
        size: height and width in pixels to which every image is brought.
        channels: 3 (RGB) or 1 (grey).
        test_fraction: part of each class, in (0, 1), that becomes the test set where `root` has class folders only;
            the same images in every run.

    Returns:
        Splits with images `[N, channels, size, size]`, and the mean and std of the training images. Validation images
        are those of `root/val`; without it, or where `val` is the only folder beside `train` and so the test set (as
        ImageNet has it), there are none and `load` sets some apart.

    Raises:
        FileNotFoundError: no folder, or no folder of a class in it.
        ValueError: a class without images, an image that cannot be read, a test class that is not a training class.
        ModuleNotFoundError: Pillow is not installed.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels}; choose 3 (RGB) or 1 (grey)")
    if size < 1:
        raise ValueError(f"size is {size}; give at least 1 pixel")
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction is {test_fraction}; give a fraction between 0 and 1")
    if root is None:
        raise FileNotFoundError("folder needs root, the folder that holds one folder per class")
    root = Path(root)
    parts = _classes(root)
    if "train" not in parts or not {"train", "val", "test"}.issuperset(parts):
        parts = ()  # `train` may be a class, of vehicles
    elif len(parts) == 1:
        root, parts = root / "train", ()
    if not parts:
        classes = _classes(root)
        images, labels = _read_tree(root, classes, size, channels)
        count = max(1, round(test_fraction * len(labels)))
        if count == len(labels):
            raise ValueError(
                f"{root} has {count} images; with test_fraction {test_fraction} none is left to train with"
            )
        test, train = stratified_split(labels, count, _TEST_SEED)
        return _splits(classes, (images[train], labels[train]), None, (images[test], labels[test]))
    classes = _classes(root / "train")
    read = {part: _read_tree(root / part, classes, size, channels) for part in parts}
    if "test" not in read:
        read["test"] = read.pop("val")
    return _splits(classes, read["train"], read.get("val"), read["test"])


def _splits(
    classes: tuple[str, ...],
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor] | None,
    test: tuple[Tensor, Tensor],
) -> Splits:
    mean, std = channel_statistics(train[0])
    sets = (train, val or (train[0][:0], train[1][:0]), test)
    return Splits(*(ImageSet(images, labels, classes, mean, std) for images, labels in sets))


def _folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _classes(root: Path) -> tuple[str, ...]:
    if not root.is_dir():
        raise FileNotFoundError(f"no folder at {root}")
    classes = tuple(_folders(root))
    if not classes:
        raise FileNotFoundError(f"{root} has no folders; put the images of each class in a folder of its own")
    return classes


def _read_tree(root: Path, classes: tuple[str, ...], size: int, channels: int) -> tuple[Tensor, Tensor]:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "image folders need Pillow, which is not installed; try `pip install 'hyperfast[images]'`", name="PIL"
        ) from error
    unknown = set(_folders(root)) - set(classes)
    if unknown:
        raise ValueError(f"{root} has classes that the training folder has not: {', '.join(sorted(unknown))}")
    suffixes = Image.registered_extensions().keys()
    images, labels = [], []
    for label, name in enumerate(classes):
        folder = root / name
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.name[0] != ".")
        if not files and folder.is_dir():
            raise ValueError(f"{folder} has no images; add some, or remove the folder")
        images += [_read_image(path, size, channels) for path in files]
        labels += [label] * len(files)
    if not images:
        raise ValueError(f"{root} has no images of {', '.join(classes)}")
    return torch.from_numpy(np.stack(images)), torch.tensor(labels)


def _read_image(path: Path, size: int, channels: int) -> Any:
    """uint8 `[channels, size, size]`."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            image = image.convert("RGB" if channels == 3 else "L")
            pixels = np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    return pixels.reshape(size, size, channels).transpose(2, 0, 1)
