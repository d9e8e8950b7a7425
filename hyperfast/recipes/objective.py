"""What a training step minimises: the interface, and plain cross-entropy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from hyperfast.data import DeviceLoader
from hyperfast.recipes.checkpoint import JSON


@dataclass(frozen=True)
class StepLosses:
    """The losses of one step, all on the device.

    Attributes:
        total: what is minimised, a scalar.
        logits: of the model, `[B, classes]`.
        terms: unweighted terms by name, scalars or one value per tap.
    """

    total: Tensor
    logits: Tensor
    terms: Mapping[str, Tensor]


class Objective(Protocol):
    """What a training step minimises.

    Attributes:
        modules: the parts of the objective that are trained along with the model; usually none.
        settings: what it was made from, for the checkpoint: a run is resumed only under the same settings.
    """

    modules: nn.ModuleDict
    settings: Mapping[str, JSON]

    def prepare(self, loader: DeviceLoader, *, resumed: bool, progress: bool) -> bool:
        """Called once before the first step: what has to be learned or computed ahead.

        Args:
            loader: of the training images.
            resumed: `modules` hold what a checkpoint had.
            progress: show a progress bar.

        Returns:
            Whether `modules` were changed, so that a checkpoint is worth its time.
        """

    def watch(self, model: nn.Module) -> AbstractContextManager[object]:
        """Entered once, around the whole run; taps are open inside."""

    def __call__(
        self,
        forward: Callable[[Tensor], Tensor],
        images: Tensor,
        labels: Tensor,
        progress: float,
        *,
        indices: Tensor | None = None,
        measure: bool = False,
    ) -> StepLosses:
        """The losses of a batch.

        Args:
            forward: the model, maybe compiled.
            images: `[B, C, H, W]`.
            labels: int64 `[B]`.
            progress: 0 at the first step of the run, 1 at the last.
            indices: int64 `[B]`, which images of the training set these are.
            measure: keep what `gradient_norms` tells after the backward pass.
        """

    def gradient_norms(self, scale: float, step: int) -> Mapping[str, Mapping[str, float]]:
        """Norms of the gradients of each term by each of its taps, of a step that was measured; waits for the device.

        Args:
            scale: of the loss, as a gradient scaler had it.
            step: that was measured.
        """

    def tap_names(self, term: str) -> list[str] | None:
        """Names of the values of a term that has one per tap; None for a scalar."""


class CrossEntropy:
    """Supervised training: cross-entropy with label smoothing."""

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.modules = nn.ModuleDict()
        self.settings: Mapping[str, JSON] = {"objective": "cross_entropy"}
        self.label_smoothing = label_smoothing

    def prepare(self, loader: DeviceLoader, *, resumed: bool, progress: bool) -> bool:
        """Nothing to prepare."""
        return False

    def watch(self, model: nn.Module) -> AbstractContextManager[object]:
        """Nothing to watch."""
        return contextlib.nullcontext()

    def __call__(
        self,
        forward: Callable[[Tensor], Tensor],
        images: Tensor,
        labels: Tensor,
        progress: float,
        *,
        indices: Tensor | None = None,
        measure: bool = False,
    ) -> StepLosses:
        logits = forward(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return StepLosses(loss, logits, {"cross_entropy": loss})

    def gradient_norms(self, scale: float, step: int) -> Mapping[str, Mapping[str, float]]:
        """Cross-entropy has no taps."""
        return {}

    def tap_names(self, term: str) -> list[str] | None:
        """Cross-entropy has no taps."""
        return None
