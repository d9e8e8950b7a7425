"""Attention transfer over several feature maps, forward and backward to the student's maps."""

from __future__ import annotations

from peers import repdistiller
from registry import Case

from hyperfast import functional, reference
from operations.feature_maps import feature_operation

OPERATION = feature_operation(
    "attention_transfer",
    "Attention transfer of three taps, forward and backward",
    [
        Case(
            "128x64x32x32, 128x128x16x16, 128x256x8x8",
            {"maps": [(128, 64, 32, 32), (128, 128, 16, 16), (128, 256, 8, 8)], "relu": True},
        ),
        Case("4x8x8x8, 4x16x4x4", {"maps": [(4, 8, 8, 8), (4, 16, 4, 4)], "relu": True}, small=True),
    ],
    functional.attention_transfer,
    lambda student, teacher: reference.attention_transfer(student, teacher, 2, "code", 1e-12).sum(),
    {"RepDistiller's form": repdistiller.attention_loss},
    # Squares and channel sums of both maps, then the student's map times its coefficient.
    flops=5,
)
