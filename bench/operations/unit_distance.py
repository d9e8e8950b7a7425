"""Factor transfer's distance between feature maps of norm 1, forward and backward to the student's maps."""

from __future__ import annotations

from peers import alternatives

from hyperfast import functional, reference
from operations.feature_maps import SMALL, STAGES, feature_operation, sum_of_taps

OPERATION = feature_operation(
    "unit_distance",
    "Distance of factor transfer, forward and backward",
    [STAGES, SMALL],
    functional.unit_distance,
    lambda student, teacher: reference.unit_distance(student, teacher, 1, 1e-12, False, "mean").sum(),
    {"F.normalize": sum_of_taps(alternatives.factor_distance)},
    flops=12,
)
