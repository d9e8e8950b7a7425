"""Pretraining of the paraphrasers of factor transfer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperfast.losses import Paraphraser

_LOSSES = {"l1": F.l1_loss, "mse": F.mse_loss}


def pretrain_paraphrasers(
    paraphrasers: Sequence[Paraphraser],
    maps: Iterable[Sequence[Tensor]],
    steps: int,
    *,
    loss: str = "l1",
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    on_step: Callable[[int], object] | None = None,
) -> Tensor:
    """Train a paraphraser per tap to reconstruct the teacher's feature maps, by SGD, and freeze them.

    Args:
        paraphrasers: trained in place, on the device that they are on.
        maps: batches, each with the teacher's maps `[B, C, H, W]` at all taps; begun anew when they end, so that a list
            or a loader may be shorter than `steps`.
        steps: updates; the authors' are 6 epochs, the projects' 1 to 30.
        loss: `"l1"`, the authors' code, or `"mse"`, the paper and everyone else.
        lr: learning rate, constant.
        momentum: of SGD.
        weight_decay: of SGD.
        on_step: called after each update with the number of updates made.

    Returns:
        The loss of each tap before each update, float32 `[steps, L]`, on the device.

    Raises:
        ValueError: another loss; fewer than one step; not as many maps as paraphrasers; maps that hold no batch, or end
            before `steps` and cannot be begun anew.

    Source: Kim, Park and Kwak, arXiv 1802.04977 (Jangho-Kim/Factor-Transfer-pytorch).
    """
    if loss not in _LOSSES:
        raise ValueError(f"loss is {loss!r}; choose one of {', '.join(map(repr, _LOSSES))}")
    if steps < 1:
        raise ValueError(f"steps is {steps}; expected at least 1")
    trained = torch.nn.ModuleList(paraphrasers).requires_grad_(True).train()
    optimizer = torch.optim.SGD(trained.parameters(), lr, momentum, weight_decay=weight_decay)
    values: list[Tensor] = []
    for features in _repeated(maps, steps):
        if len(features) != len(paraphrasers):
            raise ValueError(f"{len(features)} maps for {len(paraphrasers)} paraphrasers; give one of each tap")
        optimizer.zero_grad()
        losses = [_reconstruction(p, f, loss) for p, f in zip(paraphrasers, features, strict=True)]
        torch.stack(losses).sum().backward()
        optimizer.step()
        values.append(torch.stack(losses).detach().float())
        if on_step is not None:
            on_step(len(values))
    trained.requires_grad_(False).eval()
    return torch.stack(values)


def _reconstruction(paraphraser: Paraphraser, features: Tensor, loss: str) -> Tensor:
    features = features.detach().to(next(paraphraser.parameters()).device)
    return _LOSSES[loss](paraphraser(features), features)


def _repeated(maps: Iterable[Sequence[Tensor]], steps: int) -> Iterator[Sequence[Tensor]]:
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
