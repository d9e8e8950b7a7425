"""Pretraining of the paraphrasers of factor transfer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperfast.losses import Paraphraser

_LOSSES = {"l1": F.l1_loss, "mse": F.mse_loss}


def pretrain_paraphraser(
    paraphraser: Paraphraser,
    maps: Iterable[Tensor],
    steps: int,
    *,
    loss: str = "l1",
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
) -> Tensor:
    """Train a paraphraser to reconstruct the teacher's feature maps, by SGD, and freeze it.

    Args:
        paraphraser: trained in place, on the device that it is on.
        maps: batches `[B, C, H, W]` of the teacher's maps at one tap; begun anew when they end, so that a list or a
            loader may be shorter than `steps`.
        steps: updates; the authors' are 6 epochs, the projects' 1 to 30.
        loss: `"l1"`, the authors' code, or `"mse"`, the paper and everyone else.
        lr: learning rate, constant.
        momentum: of SGD.
        weight_decay: of SGD.

    Returns:
        The loss before each update, float32 `[steps]`, on the device.

    Raises:
        ValueError: another loss; fewer than one step; maps that hold no batch, or end before `steps` and cannot be
            begun anew.

    Source: Kim, Park and Kwak, arXiv 1802.04977 (Jangho-Kim/Factor-Transfer-pytorch).
    """
    if loss not in _LOSSES:
        raise ValueError(f"loss is {loss!r}; choose one of {', '.join(map(repr, _LOSSES))}")
    if steps < 1:
        raise ValueError(f"steps is {steps}; expected at least 1")
    optimizer = torch.optim.SGD(paraphraser.parameters(), lr, momentum, weight_decay=weight_decay)
    device = next(paraphraser.parameters()).device
    paraphraser.requires_grad_(True).train()
    values: list[Tensor] = []
    for features in _repeated(maps, steps):
        features = features.detach().to(device)
        optimizer.zero_grad()
        value = _LOSSES[loss](paraphraser(features), features)
        value.backward()
        optimizer.step()
        values.append(value.detach().float())
    paraphraser.requires_grad_(False).eval()
    return torch.stack(values)


def _repeated(maps: Iterable[Tensor], steps: int) -> Iterator[Tensor]:
    """`steps` batches of `maps`, from the beginning again where they end."""
    given = 0
    while given < steps:
        before = given
        for features in maps:
            yield features
            given += 1
            if given == steps:
                return
        if given == before:
            raise ValueError(f"maps ended after {given} of {steps} steps and gave nothing when begun anew")
