"""Accuracy of a model on a split."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Evaluation:
    """Top-1 accuracy (a share in [0, 1]) and mean cross-entropy over `images` images."""

    accuracy: float
    loss: float
    images: int


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device, amp: str = "none"
) -> Evaluation:
    """Measure `model` in eval mode; its mode is put back. The device is waited for once, at the end.

    Args:
        model: maps images to logits `[B, classes]`.
        batches: `(images, labels)`.
        device: where `model` is; the batches are moved there.
        amp: `"none"`, `"bf16"` or `"fp16"`.

    Raises:
        ValueError: there are no batches.
    """
    training = model.training
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    images_seen = 0
    try:
        for images, labels in batches:
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            with autocast(device, amp):
                logits = model(images)
                loss += F.cross_entropy(logits, labels, reduction="sum")  # autocast does it in float32
            correct += (logits.argmax(1) == labels).sum()
            images_seen += len(labels)
    finally:
        model.train(training)
    if not images_seen:
        raise ValueError("the split to evaluate on has no images")
    return Evaluation(int(correct) / images_seen, float(loss) / images_seen, images_seen)


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """The autocast region of an `amp` setting; does nothing for `"none"`."""
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=amp != "none")
