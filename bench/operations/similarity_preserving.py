"""Similarity preserving over feature maps, forward and backward to the student's maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peers import repdistiller
from registry import Case, Operation, Provider, hyperfast_providers, prepare_compiler
from torch import Tensor

from hyperfast import functional, reference
from operations.feature_maps import Inputs, doubled, elements, make_inputs, work


def _fused(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    return functional.similarity_preserving(student, teacher).sum()


def truth(inputs: Inputs) -> dict[str, Tensor]:
    """The reference in float64."""
    return work(doubled(inputs), lambda s, t: reference.similarity_preserving(s, t).sum()).results()


def _flops(options: Mapping[str, Any]) -> int:
    # Half of both Gram matrices, which are symmetric, and the gradient.
    return (1 + 1 + 2) * options["maps"][0][0] * elements(options)


OPERATION = Operation(
    name="similarity_preserving",
    title="Similarity preserving of two taps, forward and backward",
    cases=[
        Case("128x48x16x16, 128x192x4x4", {"maps": [(128, 48, 16, 16), (128, 192, 4, 4)], "relu": True}),
        Case("9x8x8x8, 9x16x4x4", {"maps": [(9, 8, 8, 8), (9, 16, 4, 4)], "relu": True}, small=True),
    ],
    providers=[
        *hyperfast_providers(lambda inputs: work(inputs, _fused)),
        Provider("eager (RepDistiller's form)", lambda inputs: work(inputs, repdistiller.similarity_loss)),
        Provider(
            "torch.compile",
            lambda inputs: work(inputs, torch.compile(repdistiller.similarity_loss, fullgraph=True)),
            prepare=prepare_compiler,
        ),
    ],
    inputs=make_inputs,
    truth=truth,
    # Both maps are read for the Gram matrices, the student's again and its gradient written in the backward pass.
    traffic=lambda options: 4 * 4 * elements(options),
    flops=_flops,
    tests="tests/ops/test_similarity_preserving.py",
    gpu_tests="similarity_preserving",
    tolerance=1e-4,
)
