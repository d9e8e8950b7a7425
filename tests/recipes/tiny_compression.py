"""The settings of a compression that takes a moment, and one that NeRN's own code was run on."""

from __future__ import annotations

from typing import Any

from helpers import golden
from torch import nn

from hyperfast.nn import load_nern
from hyperfast.recipes import CompressConfig
from hyperfast.recipes.reconstruction import Reconstruction, Targets, new_predictor
from hyperfast.surgery import cover

NERN = golden("nern")


def settings(**changes: Any) -> CompressConfig:
    small: dict[str, Any] = {
        "hidden": 12,
        "levels": 6,
        "steps": 12,
        "batch_rows": 20,
        "permutation": "identity",
        "device": "cpu",
        "log_every": 4,
    }
    return CompressConfig(**{**small, **changes})


def toy(**changes: Any) -> Reconstruction:
    """The three layers of golden group B, and NeRN's predictor of them at a constant learning rate."""
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 6, 3, bias=False), nn.Conv2d(6, 8, 1, bias=False)
    )
    state = {f"{i}.weight": NERN[f"B_target{i}"] for i in range(3)}
    network.load_state_dict(state)
    config = settings(hidden=16, levels=40, min_lr=5e-3, rmse="full", **{"sampling": "all", **changes})
    coverage = cover(network, policy="nern")
    predictor = new_predictor(coverage, config, seed=0)
    load_nern(predictor, {n.removeprefix("B_init."): v for n, v in NERN.items() if n.startswith("B_init.")})
    return Reconstruction(predictor, Targets.of(state, coverage, config), config, seed=0)
