"""Sums of per-step values that stay on the device until they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

Means: TypeAlias = "dict[str, list[float]]"


class Meter:
    """Means over steps of named values, scalars or vectors `[L]`; the device is waited for only in `read`."""

    def __init__(self) -> None:
        self.steps = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Count one step. Every step must bring the same names and shapes until the next `read`."""
        self.steps += 1
        for name, value in values.items():
            value = value.detach().float().reshape(-1)
            if name in self._sums:
                self._sums[name] += value
            else:
                self._sums[name] = value.clone()

    def read(self) -> Means:
        """The means since the last `read`, as lists; starts anew. One transfer to the host."""
        if not self._sums:
            return {}
        names, sums = list(self._sums), list(self._sums.values())
        flat = (torch.cat(sums) / self.steps).tolist()
        means: Means = {}
        for name, values in zip(names, sums, strict=True):
            means[name], flat = flat[: len(values)], flat[len(values) :]
        self._sums.clear()
        self.steps = 0
        return means

    def state(self) -> dict[str, Tensor]:
        """The sums, for a checkpoint; `steps` is stored beside them."""
        return dict(self._sums)

    def restore(self, sums: Mapping[str, Tensor], steps: int, device: torch.device) -> None:
        """Continue from `state`."""
        self._sums = {name: value.to(device, copy=True) for name, value in sums.items()}
        self.steps = steps
