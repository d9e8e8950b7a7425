"""A task that a small network learns in a second, and a network with everything that makes resuming hard."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from hyperfast.data import Augment, ImageSet, Splits
from hyperfast.recipes import TrainConfig

CLASSES = 4


def image_set(count: int, seed: int) -> ImageSet:
    """Noise with one bright quadrant, which is the class."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 120, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % CLASSES
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, 4 * (label // 2) :, 4 * (label % 2) :][:, :4, :4] += 100
    return ImageSet(images, labels, ("a", "b", "c", "d"), (0.3,) * 3, (0.2,) * 3)


def splits(train: int = 80, val: int = 24, test: int = 32) -> Splits:
    return Splits(image_set(train, 1), image_set(val, 2), image_set(test, 3))


class Network(nn.Module):
    """Convolutions, batch norm, dropout."""

    def __init__(self, width: int = 8, classes: int = CLASSES, dropout: float = 0.1) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.layer2 = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(16 * width, classes))

    def forward(self, images: Tensor) -> Tensor:
        features = self.layer2(self.layer1(images))
        logits: Tensor = self.head(nn.functional.adaptive_avg_pool2d(features, 4).flatten(1))
        return logits


def network(seed: int = 0, **options: Any) -> Network:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return Network(**options)


def environment() -> dict[str, str]:
    """That of a process with as many threads as a user would have, whatever those of the tests are."""
    given = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    # Waiting threads sleep: on a busy machine spinning ones would take the processor from those that work.
    return {**given, "OMP_WAIT_POLICY": "passive"}


def config(**changes: Any) -> TrainConfig:
    """Five steps per epoch."""
    settings: dict[str, Any] = {
        "epochs": 3,
        "batch_size": 16,
        "lr": 0.02,
        "warmup_epochs": 0.5,
        "log_every": 2,
        "device": "cpu",
        "augment": Augment(pad=1, flip=False),
    }
    return TrainConfig(**{**settings, **changes})
