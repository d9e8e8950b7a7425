"""What a comparison measures on a GPU: memory and kernel launches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import hyperfast
from hyperfast import models
from hyperfast.data import Augment, ImageSet, Splits
from hyperfast.recipes import DistillConfig, TrainConfig, compare
from hyperfast.recipes.compare_report import table

pytest.importorskip("matplotlib")


def _images(count: int) -> ImageSet:
    images = torch.randint(256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    return ImageSet(images, torch.arange(count) % 4, ("a", "b", "c", "d"), (0.5,) * 3, (0.25,) * 3)


def test_launches_of_a_step_are_counted(tmp_path: Path) -> None:
    def network() -> nn.Module:
        return models.create("resnet8", 4, width=8)

    def student(method: str, seed: int) -> nn.Module:
        return network() if method == "plain" else hyperfast.hypernetize(network(), hidden=(4, 8))

    data = Splits(_images(64), _images(16), _images(20))
    config = TrainConfig(epochs=1, batch_size=16, lr=0.01, device="cuda", augment=Augment(pad=1))
    methods = {"plain": None, "mip": None, "at": DistillConfig()}
    comparison = compare(methods, student, network().cuda(), data, config, folder=tmp_path, seeds=(0,))
    assert [run.error for run in comparison.runs] == [None] * 3
    launches = comparison.launches
    assert launches["plain"] > 0 and 0 < launches["mip"] < launches["at"]  # which runs the teacher too
    columns, rows = table(comparison)
    assert columns[-1] == "launches" and rows[2][-1] == f"{launches['mip']:,}"
    assert all(run.result is not None and run.result.peak_memory > 0 for run in comparison.runs)
