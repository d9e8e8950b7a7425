"""A set of labelled images, and its division into training, validation and test images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["ImageSet", "Splits", "stratified_split"]


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with one label each.

    Attributes:
        images: uint8 `[N, C, H, W]`.
        labels: int64 `[N]`, indices into `classes`, on the device of `images`.
        classes: names of the classes.
        mean: per channel, of images scaled to [0, 1]; what a loader subtracts.
        std: per channel, of the same; what a loader then divides by.

    Raises:
        ValueError: shapes, dtypes or lengths other than these.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(
                f"images is {self.images.dtype} {list(self.images.shape)}; expected torch.uint8 [N, C, H, W]"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels is {self.labels.dtype} {list(self.labels.shape)}; "
                f"expected torch.int64 [{self.images.shape[0]}], one per image"
            )
        channels = self.images.shape[1]
        if len(self.mean) != channels or len(self.std) != channels:
            raise ValueError(
                f"mean has {len(self.mean)} and std {len(self.std)} values; the images have {channels} channels"
            )
        if not all(value > 0 for value in self.std):
            raise ValueError(f"std is {self.std}; images are divided by it, so every value must be positive")

    def __len__(self) -> int:
        return self.images.shape[0]

    def subset(self, indices: Tensor) -> ImageSet:
        """The images at `indices` (int64 `[M]`), in that order."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def to(self, device: torch.device | str) -> ImageSet:
        """The same set on `device`."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


@dataclass(frozen=True, eq=False)
class Splits:
    """Three disjoint sets of one task: `train` to learn from, `val` to choose by, `test` to report."""

    train: ImageSet
    val: ImageSet
    test: ImageSet

    def normalised(self, mean: Sequence[float], std: Sequence[float]) -> Splits:
        """The same images under another mean and std, such as those that a pretrained teacher was trained with."""
        parts = (replace(part, mean=tuple(mean), std=tuple(std)) for part in (self.train, self.val, self.test))
        return Splits(*parts)


def stratified_split(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw `count` images with the classes in the proportions of the whole.

    Args:
        labels: int64 `[N]` on the CPU.
        count: images to draw, 0 to N.
        seed: the same seed draws the same images, on every machine.

    Returns:
        Indices drawn `[count]` and indices left `[N - count]`, both rising.

    Raises:
        ValueError: `count` is negative or larger than N.
    """
    if not 0 <= count <= len(labels):
        raise ValueError(f"count is {count}; there are {len(labels)} images to draw from")
    # RandomState, whose stream NumPy has promised not to change: a seed must name the same split next year.
    order = np.random.RandomState(seed).permutation(len(labels))
    shuffled = labels.numpy()[order]
    by_class = np.argsort(shuffled, kind="stable")
    sizes = np.bincount(shuffled) if len(shuffled) else np.zeros(0, np.int64)
    # The i-th image of a class of n lies at (i + 1/2) / n; the lowest `count` of all classes are in proportion.
    place = np.empty(len(labels))
    place[by_class] = np.concatenate([(np.arange(n) + 0.5) / n for n in sizes if n] or [np.zeros(0)])
    drawn = order[np.argsort(place, kind="stable")]
    return torch.from_numpy(np.sort(drawn[:count])), torch.from_numpy(np.sort(drawn[count:]))


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 `[N, C, H, W]` scaled to [0, 1]; 1 for a constant channel."""
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    values = torch.arange(256, dtype=torch.float64) / 255
    weights = counts / counts.sum(1, keepdim=True)
    mean = weights @ values
    std = (weights * (values - mean[:, None]).square()).sum(1).sqrt()
    return tuple(mean.tolist()), tuple(torch.where(std > 0, std, 1.0).tolist())
