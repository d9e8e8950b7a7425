"""Relational knowledge distillation over feature maps, forward and backward to the student's maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peers import repdistiller
from registry import Case, Operation, Provider, hyperfast_providers, prepare_compiler
from torch import Tensor

from hyperfast import functional, reference
from operations.feature_maps import Inputs, doubled, elements, make_inputs, work


def _fused(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    return functional.relational_distance_angle(student, teacher).sum()


def gram_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The same from Gram matrices of centred samples: tensors of B x B x B instead of B x B x D."""
    losses = []
    for s, t in zip(student, teacher, strict=True):
        own, other = _centred(s), _centred(t)
        losses.append(
            25 * F.smooth_l1_loss(repdistiller.distances(own), repdistiller.distances(other))
            + 50 * F.smooth_l1_loss(_angles(own), _angles(other))
        )
    return torch.stack(losses).sum()


def _centred(features: Tensor) -> Tensor:
    rows = features.flatten(1)
    return rows - rows.mean(0)


def _angles(rows: Tensor) -> Tensor:
    """Cosines at the vertices `[vertex, i, k]`."""
    # Not the diagonal of the product: Inductor of torch 2.13 computes its derivative wrongly.
    gram, squares = rows @ rows.t(), rows.square().sum(1)
    own = torch.eye(len(gram), dtype=torch.bool, device=gram.device)
    inverse = (squares[:, None] + squares[None, :] - 2 * gram).masked_fill(own, 1).rsqrt().masked_fill(own, 0)
    dots = gram[None] - gram[:, :, None] - gram[:, None, :] + squares[:, None, None]
    return dots * (inverse[:, :, None] * inverse[:, None, :])


def truth(inputs: Inputs) -> dict[str, Tensor]:
    """The reference in float64."""
    loss = reference.relational_distance_angle
    return work(doubled(inputs), lambda s, t: loss(s, t, None, 25.0, 50.0).sum()).results()


def _flops(options: Mapping[str, Any]) -> int:
    batch, taps = options["maps"][0][0], len(options["maps"])
    # As for similarity preserving; and about 18 for each angle of the two networks together.
    return 4 * batch * elements(options) + 18 * taps * batch**3


OPERATION = Operation(
    name="relational_distance_angle",
    title="Distances and angles between the samples of a tap, forward and backward",
    cases=[
        Case("128x192x4x4", {"maps": [(128, 192, 4, 4)], "relu": True}),
        Case("128x512", {"maps": [(128, 512)], "relu": True}),
        Case("9x16x4x4", {"maps": [(9, 16, 4, 4)], "relu": True}, small=True),
    ],
    providers=[
        *hyperfast_providers(lambda inputs: work(inputs, _fused)),
        Provider("eager (RepDistiller's form)", lambda inputs: work(inputs, repdistiller.relational_loss)),
        Provider("eager (Gram form)", lambda inputs: work(inputs, gram_loss)),
        Provider(
            "torch.compile",
            lambda inputs: work(inputs, torch.compile(gram_loss, fullgraph=True)),
            prepare=prepare_compiler,
        ),
    ],
    inputs=make_inputs,
    truth=truth,
    # Both maps are read for the Gram matrices, the student's again and its gradient written in the backward pass.
    traffic=lambda options: 4 * 4 * elements(options),
    flops=_flops,
    tests="tests/ops/test_relational_distance_angle.py",
    gpu_tests="relational_distance_angle",
    tolerance=1e-3,
)
