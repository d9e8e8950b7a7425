"""Small models that the tests of hyperfast.nn share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def small_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )


class TiedNet(nn.Module):
    """A parameter under two names, and a module under two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.decoder = nn.Linear(4, 7, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.decoder(self.second(self.first(self.embedding(tokens))))
        return logits


def images(samples: int = 6) -> Tensor:
    return torch.randn(samples, 3, 8, 8)
