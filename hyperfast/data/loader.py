"""Batches from a set that stays on the device: no worker processes, no copies, no waiting."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hyperfast.data.dataset import ImageSet

__all__ = ["Augment", "DeviceLoader"]


@dataclass(frozen=True)
class Augment:
    """Random changes to training images.

    Attributes:
        pad: pixels of black around an image, of which a window of the image's size is then cut out at random.
        flip: mirror every second image, by chance, left to right.
    """

    pad: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        if self.pad < 0:
            raise ValueError(f"pad is {self.pad}; give 0 or more pixels")


@dataclass(frozen=True, eq=False)
class _Plan:
    """What one epoch does with the images, in the order in which they come: all `[N]`."""

    order: Tensor
    top: Tensor
    left: Tensor
    flip: Tensor


class DeviceLoader:
    """Normalised float32 batches of an `ImageSet`, augmented on its device.

    The order and the augmentation of an epoch are drawn at its start from (seed, epoch) alone. A run that is resumed at
    `epoch(e, start_batch=b)` therefore sees what it would have seen. The draw of one kind of device is not that of
    another. Nothing here waits for the device.

    Args:
        image_set: the images. They are moved to `device` once and stay uint8.
        batch_size: images per batch.
        device: where batches are made, and where the training is.
        train: shuffle and augment. Otherwise images come as they are, in the order of the set.
        augment: changes to training images.
        seed: of the order and the changes.
        drop_last: leave out the last batch of an epoch where it is smaller. Default: when training, so that every batch
            has one shape, which compiled and captured steps want.
        channels_last: return the images in `torch.channels_last` memory format.

    Raises:
        ValueError: `batch_size` is not positive, or larger than the set where the last batch is dropped.

    Example:
        >>> loader = DeviceLoader(splits.train, 128, device="cuda", train=True)
        >>> for epoch in range(epochs):
        ...     for images, labels in loader.epoch(epoch):
        ...         ...
    """

    def __init__(
        self,
        image_set: ImageSet,
        batch_size: int,
        *,
        device: torch.device | str,
        train: bool,
        augment: Augment = Augment(),
        seed: int = 0,
        drop_last: bool | None = None,
        channels_last: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; give at least 1")
        self.drop_last = train if drop_last is None else drop_last
        if self.drop_last and batch_size > len(image_set):
            raise ValueError(
                f"batch_size is {batch_size} but the set has {len(image_set)} images, so that no batch would be full; "
                "give a smaller batch_size, or drop_last=False"
            )
        self.image_set = image_set.to(device)
        self.batch_size = batch_size
        self.train = train
        self.augment = augment
        self.seed = seed
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        mean = torch.tensor(image_set.mean, dtype=torch.float64).view(-1, 1, 1)
        std = torch.tensor(image_set.std, dtype=torch.float64).view(-1, 1, 1)
        # (x / 255 - mean) / std in one multiplication and one addition.
        self._scale = (1 / (255 * std)).to(device, torch.float32)
        self._shift = (-mean / std).to(device, torch.float32)
        self._drawn: tuple[int, _Plan] | None = None

    def __len__(self) -> int:
        """Batches per epoch."""
        whole, rest = divmod(len(self.image_set), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def epoch(self, epoch: int = 0, start_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch from `start_batch` on.

        Args:
            epoch: 0, 1, ...; chooses order and augmentation.
            start_batch: batches to leave out at the start, 0 to `len(self)`. They cost nothing.

        Returns:
            Iterator of images float32 `[B, C, H, W]` and labels int64 `[B]`, both on the device.

        Raises:
            ValueError: `epoch` or `start_batch` is out of range.
        """
        if epoch < 0:
            raise ValueError(f"epoch is {epoch}; epochs count from 0")
        if not 0 <= start_batch <= len(self):
            raise ValueError(f"start_batch is {start_batch}; an epoch has {len(self)} batches")
        return self._train_batches(epoch, start_batch) if self.train else self._plain_batches(start_batch)

    def indices(self, epoch: int, batch: int) -> Tensor:
        """Which images of the set a batch of an epoch has, int64 `[B]` on the device."""
        part = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
        if self.train:
            return self._plan(epoch).order[part]
        return torch.arange(len(self.image_set), device=self.image_set.images.device)[part]

    def _slices(self, start_batch: int) -> Iterator[slice]:
        for batch in range(start_batch, len(self)):
            yield slice(batch * self.batch_size, (batch + 1) * self.batch_size)

    def _plain_batches(self, start_batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for part in self._slices(start_batch):
            yield self._normalised(self.image_set.images[part]), self.image_set.labels[part].clone()

    def _train_batches(self, epoch: int, start_batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        plan = self._plan(epoch)
        for part in self._slices(start_batch):
            chosen = plan.order[part]
            images = self.image_set.images.index_select(0, chosen)
            if self.augment != Augment(pad=0, flip=False):
                images = crop_and_flip(images, plan.top[part], plan.left[part], plan.flip[part], self.augment.pad)
            yield self._normalised(images), self.image_set.labels.index_select(0, chosen)

    def _plan(self, epoch: int) -> _Plan:
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = epoch, self._draw(epoch)
        return self._drawn[1]

    def _draw(self, epoch: int) -> _Plan:
        device, count = self.image_set.images.device, len(self.image_set)
        generator = torch.Generator(device).manual_seed(_seed_of(self.seed, epoch))
        order = torch.randperm(count, generator=generator, device=device)
        places = 2 * self.augment.pad + 1
        top, left = torch.randint(places, (2, count), generator=generator, device=device)
        flip = torch.randint(2, (count,), generator=generator, device=device, dtype=torch.uint8).bool()
        return _Plan(order, top, left, flip if self.augment.flip else torch.zeros_like(flip))

    def _normalised(self, images: Tensor) -> Tensor:
        floats = images.to(torch.float32, memory_format=self._format)
        return floats.mul_(self._scale).add_(self._shift)


def _seed_of(seed: int, epoch: int) -> int:
    """31 bits, as different for neighbouring epochs as for distant ones; a CPU generator takes no more than 32."""
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1


def crop_and_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, pad: int) -> Tensor:
    """Cut the window at (`top`, `left`) out of each image with `pad` zeros around it, mirrored where `flip`.

    Args:
        images: `[B, C, H, W]`.
        top: int64 `[B]`, 0 to 2 `pad`; `pad` leaves the image where it is.
        left: as `top`.
        flip: bool `[B]`.
        pad: pixels on every side.

    Returns:
        `[B, C, H, W]`, in one gather: indices are worked out per row and per column of each image, not in a loop.
    """
    batch, channels, height, width = images.shape
    across = torch.arange(width, device=images.device)
    rows = torch.arange(height, device=images.device) + top[:, None]
    columns = torch.where(flip[:, None], across.flip(0), across) + left[:, None]
    flat = (rows[:, :, None] * (width + 2 * pad) + columns[:, None, :]).view(batch, 1, -1)
    padded = F.pad(images, (pad, pad, pad, pad)).flatten(2)
    return padded.gather(2, flat.expand(-1, channels, -1)).view(images.shape)
