"""An exponential moving average of a model's weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class AveragedWeights(nn.Module):
    r"""A copy of a model whose weights follow it; `update(model)` moves it one step.

    .. math::
        \bar w \leftarrow d_n \bar w + (1 - d_n) w, \quad d_n = \min(d, (1 + n) / (10 + n)), \quad n = 0, 1, \ldots

    so that a short run is not dominated by its first weights. Floating point buffers (running statistics of batch
    norm) are averaged too, because they belong to the weights; other buffers are copied.

    torch.optim.swa_utils has an average as well, which waits for a GPU at every step.

    Args:
        model: the model in training.
        decay: d in [0, 1).

    Attributes:
        module: the copy.
    """

    updates: Tensor

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema decay is {decay}; it must be in [0, 1)")
        super().__init__()
        self.module = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay
        # On the CPU, where it is read without waiting for the device.
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device="cpu"))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after a step."""
        count = int(self.updates)
        decay = min(self.decay, (1 + count) / (10 + count))
        pairs = list(zip(_tensors(self.module), _tensors(model), strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        others = [pair for pair in pairs if not pair[0].is_floating_point()]
        if floats:
            torch._foreach_lerp_([mine for mine, _ in floats], [given for _, given in floats], 1 - decay)
        if others:
            torch._foreach_copy_([mine for mine, _ in others], [given for _, given in others])
        self.updates += 1


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
