"""`hyperfast::activation_boundary`: all taps in one grouped launch. The measures are the shares of mismatches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hyperfast import reference
from hyperfast.ops import _native
from hyperfast.ops._paired import PairedLoss
from hyperfast.reference.reduction import divisor


def _params(dtype: int, teacher: Sequence[Tensor], margin: float, _reduction: str) -> Any:
    packed = teacher[0].dtype == torch.uint8
    return _native.module().ActivationBoundaryParams(dtype=dtype, margin=margin, packed=packed)


loss = PairedLoss(
    "activation_boundary",
    "float margin, str reduction",
    _params,
    lambda student, _margin, reduction: 1 / divisor(student, reduction),
    reference.activation_boundary_forward,
    reference.activation_boundary_backward,
    # A sample's signs are padded to whole bytes.
    by_sample=True,
    measured=True,
)
