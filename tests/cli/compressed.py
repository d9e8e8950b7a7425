"""A small network and files that stand for it, for the commands that read such files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hyperfast import models
from hyperfast.nn import WeightPredictor
from hyperfast.recipes import Artifact, checkpoint
from hyperfast.surgery import cover, find_permutation

OPTIONS = {"width": 4, "in_channels": 1, "shortcut": "B"}


@dataclass(frozen=True)
class Files:
    """What `write` wrote."""

    folder: Path
    original: Path
    module: nn.Module

    def compressed(self, name: str, seed: int = 0, weights: Any = "fp32", **metadata: Any) -> Path:
        """A file whose predictor was never trained."""
        coverage = cover(self.module, policy="nern")
        permutation = find_permutation(coverage, coverage.gather(self.module.state_dict()))
        coordinates = coverage.coordinates()
        torch.manual_seed(seed)
        predictor = WeightPredictor((coordinates.amax(0) + 1).tolist(), 6, coordinates)
        known = {"model": "resnet8", "classes": 10, "model_options": OPTIONS} | metadata
        path = self.folder / name
        Artifact.of(self.module, predictor, coverage, permutation, known).save(path, weights=weights)
        return path


def write(folder: Path) -> Files:
    """A network on grey images of ten classes."""
    torch.manual_seed(0)
    module = models.create("resnet8", **OPTIONS)
    path = folder / "original.safetensors"
    checkpoint.write(path, module.state_dict(), {"mean": "0.3", "std": "0.4"})
    return Files(folder, path, module)
