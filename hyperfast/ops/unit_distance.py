"""`hyperfast::unit_distance`: all taps in one grouped launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hyperfast import reference
from hyperfast.ops import _native
from hyperfast.ops._paired import PairedLoss
from hyperfast.reference.reduction import divisor


def _params(dtype: int, _teacher: Sequence[Tensor], p: int, eps: float, added: bool, _reduction: str) -> Any:
    return _native.module().UnitDistanceParams(dtype=dtype, power=p, eps=eps, added=added)


loss = PairedLoss(
    "unit_distance",
    "int p, float eps, bool added, str reduction",
    _params,
    lambda student, _p, _eps, _added, reduction: 1 / divisor(student, reduction),
    reference.unit_distance_forward,
    reference.unit_distance_backward,
    by_sample=True,
)
