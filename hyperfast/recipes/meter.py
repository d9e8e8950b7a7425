"""Sums of per-step values that stay on the device until they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

Means: TypeAlias = "dict[str, list[float]]"


class Meter:
    """Means over steps of named values, scalars or vectors `[L]`; the device is waited for only in `read`.

    Attributes:
        steps: counted since the last `read`, by name: a value need not come in every step.
    """

    def __init__(self) -> None:
        self.steps: dict[str, int] = {}
        self._sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Count one step. A name must have one shape until the next `read`."""
        for name, value in values.items():
            value = value.detach().float().reshape(-1)
            if name in self._sums:
                self._sums[name] += value
            else:
                self._sums[name] = value.clone()
            self.steps[name] = self.steps.get(name, 0) + 1

    def read(self) -> Means:
        """The means since the last `read`, as lists; starts anew. One transfer to the host."""
        if not self._sums:
            return {}
        means = {name: total / self.steps[name] for name, total in self._sums.items()}
        flat = torch.cat(list(means.values())).tolist()
        read: Means = {}
        for name, values in means.items():
            read[name], flat = flat[: len(values)], flat[len(values) :]
        self._sums.clear()
        self.steps.clear()
        return read

    def state(self) -> dict[str, Tensor]:
        """The sums, for a checkpoint; `steps` is stored beside them."""
        return dict(self._sums)

    def restore(self, sums: Mapping[str, Tensor], steps: Mapping[str, int], device: torch.device) -> None:
        """Continue from `state`."""
        self._sums = {name: value.to(device, copy=True) for name, value in sums.items()}
        self.steps = dict(steps)
