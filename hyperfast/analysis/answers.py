"""What a classifier answers on a set of images, image by image."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Images(Protocol):
    """Labelled images, as `hyperfast.data.ImageSet` has them."""

    @property
    def images(self) -> Tensor:
        """uint8 `[N, C, H, W]`."""

    @property
    def labels(self) -> Tensor:
        """int64 `[N]`."""

    @property
    def mean(self) -> Sequence[float]:
        """Per channel, of images scaled to [0, 1]; what a network expects to be subtracted."""

    @property
    def std(self) -> Sequence[float]:
        """Per channel; what a network expects images to be divided by."""


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """`Images` that were chosen or changed.

    Attributes:
        images: uint8 `[N, C, H, W]`.
        labels: int64 `[N]`.
        mean: per channel, of images scaled to [0, 1].
        std: as `mean`.
    """

    images: Tensor
    labels: Tensor
    mean: Sequence[float]
    std: Sequence[float]


def spread(data: Images, count: int) -> Images:
    """`count` images at even distances, in order: a set sorted by class keeps its proportions. All if it has fewer.

    Raises:
        ValueError: `count` is less than 1.
    """
    if count < 1:
        raise ValueError(f"count is {count}; expected at least 1 image")
    if count >= len(data.labels):
        return data
    chosen = torch.arange(count, device=data.labels.device) * len(data.labels) // count
    return LabelledImages(data.images[chosen], data.labels[chosen], data.mean, data.std)


@dataclass(frozen=True, eq=False)
class Answers:
    """Answers of one model.

    Attributes:
        correct: bool `[N]` on the CPU, whether the largest logit is that of the label.
        loss: mean cross-entropy.
    """

    correct: Tensor
    loss: float

    @property
    def accuracy(self) -> float:
        """Share of correct answers, in [0, 1]."""
        return float(self.correct.double().mean())


def answers(
    module: nn.Module,
    data: Images,
    *,
    change: Callable[[Tensor, Tensor], Tensor] | None = None,
    batch_size: int = 500,
) -> Answers:
    """Ask a classifier about every image. It runs in eval mode, on its own device; its mode is put back.

    Args:
        module: maps normalised images to logits `[B, classes]`.
        data: the images.
        change: `change(images, labels)` returns what to show instead: float32 `[B, C, H, W]` in [0, 1] before
            normalisation, both ways. Batches come in order.
        batch_size: images at a time.

    Raises:
        ValueError: there are no images, or `batch_size` is not positive.
    """
    count = len(data.labels)
    if not count or batch_size < 1:
        raise ValueError(f"there are {count} images and batch_size is {batch_size}; both must be at least 1")
    device = device_of(module)
    correct, loss = [], torch.zeros((), dtype=torch.float64, device=device)
    with evaluating(module):
        for start in range(0, count, batch_size):
            part = slice(start, start + batch_size)
            images, labels = pixels(data.images[part]).to(device), data.labels[part].to(device)
            if change is not None:
                images = change(images, labels).to(device)
            with torch.no_grad():
                logits = module(normalised(images, data.mean, data.std)).float()
            correct.append(logits.argmax(1) == labels)
            loss += F.cross_entropy(logits, labels, reduction="sum")
    return Answers(torch.cat(correct).cpu(), float(loss) / count)


def pixels(images: Tensor) -> Tensor:
    """uint8 images as float32 in [0, 1]."""
    return images.to(torch.float32) / 255


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images - mean) / std, per channel of `[B, C, H, W]`."""
    shift, scale = (
        torch.tensor(list(values), dtype=images.dtype, device=images.device).view(-1, 1, 1) for values in (mean, std)
    )
    return (images - shift) / scale


def device_of(module: nn.Module) -> torch.device:
    """Where the module's parameters are; the CPU if it has none."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards every submodule is in the mode that it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
