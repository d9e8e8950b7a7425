"""Channel-wise distillation of feature maps at T = 4, forward and backward to the student's maps."""

from __future__ import annotations

from peers import alternatives

from hyperfast import functional, reference
from operations.feature_maps import SMALL, STAGES, feature_operation, sum_of_taps

OPERATION = feature_operation(
    "channel_wise_distillation",
    "Channel-wise distillation, forward and backward",
    [STAGES, SMALL],
    functional.channel_wise_distillation,
    lambda student, teacher: reference.channel_wise_distillation(student, teacher, 4.0).sum(),
    {
        "two log-softmaxes, mmrazor's form": sum_of_taps(alternatives.channel_divergence_of_differences),
        "F.kl_div": sum_of_taps(alternatives.channel_divergence),
    },
    flops=40,
)
