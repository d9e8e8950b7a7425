"""Attention transfer over several feature maps, forward and backward to the student's maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from feature_maps import Inputs, doubled, elements, feature_work, make_inputs
from peers import repdistiller
from registry import Case, Operation, Provider, hyperfast_providers, prepare_compiler
from torch import Tensor

from hyperfast import functional, reference


def _fused(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """As `losses.AttentionTransfer` calls it: the weights of the sum are known beforehand."""
    return functional.attention_transfer(student, teacher, expected_grad=torch.ones(len(student))).sum()


def truth(inputs: Inputs) -> dict[str, Tensor]:
    """The reference in float64."""
    loss = reference.attention_transfer
    return feature_work(doubled(inputs), lambda s, t: loss(s, t, 2, "code", 1e-12).sum()).results()


OPERATION = Operation(
    name="attention_transfer",
    title="Attention transfer of three taps, forward and backward",
    cases=[
        Case(
            "128x64x32x32, 128x128x16x16, 128x256x8x8",
            {"maps": [(128, 64, 32, 32), (128, 128, 16, 16), (128, 256, 8, 8)]},
        ),
        Case("4x8x8x8, 4x16x4x4", {"maps": [(4, 8, 8, 8), (4, 16, 4, 4)]}, small=True),
    ],
    providers=[
        *hyperfast_providers(lambda inputs: feature_work(inputs, _fused)),
        Provider("eager (RepDistiller's form)", lambda inputs: feature_work(inputs, repdistiller.attention_loss)),
        Provider(
            "torch.compile",
            lambda inputs: feature_work(inputs, torch.compile(repdistiller.attention_loss, fullgraph=True)),
            prepare=prepare_compiler,
        ),
    ],
    inputs=make_inputs,
    truth=truth,
    # Both maps are read and the student's gradient is written: what is possible where a sample stays in the cache.
    traffic=lambda options: 3 * 4 * elements(options),
    # Squares and channel sums of both maps, then the student's map times its coefficient.
    flops=lambda options: 5 * elements(options),
    tests="tests/ops/test_attention_transfer.py",
    gpu_tests="attention_transfer",
    tolerance=1e-5,
)
