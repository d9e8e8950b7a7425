"""FitNets' squared difference of feature maps, forward and backward to the student's maps."""

from __future__ import annotations

from torch.nn.functional import mse_loss

from hyperfast import functional, reference
from operations.feature_maps import SMALL, STAGES, feature_operation, sum_of_taps

OPERATION = feature_operation(
    "fitnets",
    "FitNets, forward and backward",
    [STAGES, SMALL],
    functional.fitnets,
    lambda student, teacher: reference.fitnets(student, teacher, False, "mean")[0].sum(),
    {"mse_loss": sum_of_taps(mse_loss)},
    flops=4,
)
