"""An exponential moving average of a model's weights."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

Tensors: TypeAlias = "tuple[Tensor, ...] | list[Tensor]"


def averaged_model(model: nn.Module, decay: float) -> AveragedModel:
    r"""A copy of `model` whose weights follow it; `update_parameters(model)` moves it one step.

    .. math::
        \bar w_n = d_n \bar w_{n-1} + (1 - d_n) w_n, \quad d_n = \min(d, (1 + n) / (10 + n))

    so that a short run is not dominated by its first weights. Floating point buffers (running statistics of batch
    norm) are averaged too, because they belong to the weights; integer buffers are copied.

    Args:
        model: the model in training.
        decay: d in [0, 1).

    Returns:
        The average; `.module` is the copy of the model.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"ema decay is {decay}; it must be in [0, 1)")

    @torch.no_grad()
    def update(averaged: Tensors, current: Tensors, _: object) -> None:
        if averaged[0].is_floating_point():
            # The count as AveragedModel hands it over lies on the GPU; its own copy can be read without waiting.
            count = int(average.n_averaged)
            torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + count) / (10 + count)))
        else:
            torch._foreach_copy_(averaged, current)

    average = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
    return average
