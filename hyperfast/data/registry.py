"""Sets of images by name."""

from __future__ import annotations

import difflib
from functools import partial
from typing import TYPE_CHECKING, Any

from hyperfast.data.cifar import read_cifar
from hyperfast.data.dataset import ImageSet, Splits, stratified_split
from hyperfast.data.digits import read_digits
from hyperfast.data.folder import read_folder
from hyperfast.data.loader import Augment

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["default_augment", "load", "names"]

# Digits and letters do not survive a mirror, and four pixels are half of an 8x8 image.
_SETS: dict[str, tuple[Callable[..., Splits], Augment]] = {
    "digits": (read_digits, Augment(pad=1, flip=False)),
    "cifar10": (partial(read_cifar, classes=10), Augment()),
    "cifar100": (partial(read_cifar, classes=100), Augment()),
    "folder": (read_folder, Augment()),
}


def names() -> tuple[str, ...]:
    """The names that `load` knows."""
    return tuple(_SETS)


def default_augment(name: str) -> Augment:
    """The augmentation that suits the set called `name`."""
    return _find(name)[1]


def load(
    name: str,
    root: str | Path | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    limit: int | None = None,
    **options: Any,
) -> Splits:
    """Read a set of images and set validation images apart from its training images.

    Args:
        name: `"digits"` (comes with scikit-learn), `"cifar10"`, `"cifar100"` or `"folder"`.
        root: where the files are. Not used by digits.
        val_fraction: part of the training images for validation, below 1, or a whole number of images from 1. Drawn
            by class, never from the test images. A folder with a validation folder of its own keeps that one.
        seed: of that draw. The test images are the same for all seeds.
        limit: take at most so many images of each of the three sets, drawn by class; for quick runs.
        options: of the reader: `read_cifar` has `allow_missing`, `read_folder` `size`, `channels`, `test_fraction`.

    Raises:
        ValueError: an unknown name, a fraction or limit that cannot be, files that are not what they should be.
        FileNotFoundError: the files are not at `root`; says what was looked for.
        ModuleNotFoundError: digits without scikit-learn, folders without Pillow.
    """
    reader, _ = _find(name)
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; give at least 1 image, or None for all")
    if not val_fraction >= 0 or (val_fraction >= 1 and not float(val_fraction).is_integer()):
        raise ValueError(f"val_fraction is {val_fraction}; give a fraction in [0, 1) or a whole number of images")
    splits = reader(root, **options)
    train, val = splits.train, splits.val
    if not len(val) and val_fraction > 0:
        count = int(val_fraction) if val_fraction >= 1 else max(1, round(val_fraction * len(train)))
        if count >= len(train):
            raise ValueError(f"val_fraction is {val_fraction}: no training image of the {len(train)} would be left")
        held, rest = stratified_split(train.labels, count, seed)
        train, val = train.subset(rest), train.subset(held)
    return Splits(*(_limited(part, limit) for part in (train, val, splits.test)))


def _find(name: str) -> tuple[Callable[..., Splits], Augment]:
    if name not in _SETS:
        near = difflib.get_close_matches(name, _SETS)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"unknown set {name!r}{meant}; choose one of {', '.join(_SETS)}")
    return _SETS[name]


def _limited(part: ImageSet, limit: int | None) -> ImageSet:
    if limit is None or len(part) <= limit:
        return part
    return part.subset(stratified_split(part.labels, limit, seed=0)[0])
