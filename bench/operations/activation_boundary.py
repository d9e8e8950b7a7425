"""Activation boundary over pre-activation maps, forward and backward to the student's maps."""

from __future__ import annotations

from typing import Any

from peers import alternatives
from registry import Case

from hyperfast import functional, reference
from operations.feature_maps import SMALL, STAGES, feature_operation, sum_of_taps
from operations.shapes import shufflenet_v2_x0_5_activations


def _fused(*arguments: Any, **options: Any) -> Any:
    return functional.activation_boundary(*arguments, **options)[0]


OPERATION = feature_operation(
    "activation_boundary",
    "Activation boundary, forward and backward",
    [STAGES, Case("ShuffleNetV2 x0.5, 37 taps, batch 128", {"maps": shufflenet_v2_x0_5_activations(128)}), SMALL],
    _fused,
    lambda student, teacher: reference.activation_boundary(student, teacher, 1.0, "mean")[0].sum(),
    {
        "two branches, the official form": sum_of_taps(alternatives.boundary_of_two_branches),
        "one hinge": sum_of_taps(alternatives.boundary_of_one_hinge),
    },
    flops=8,
)
