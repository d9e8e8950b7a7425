"""`hyperfast::fitnets`: all taps in one grouped launch. The measures are 1 / variance of the teacher's maps.

Where the maps are normalised, a pass over the teacher's comes before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hyperfast import reference
from hyperfast.ops import _native
from hyperfast.ops._paired import PairedLoss
from hyperfast.reference.fitnets import factor


def _params(dtype: int, _teacher: Sequence[Tensor], normalize: bool, _reduction: str) -> Any:
    return _native.module().FitNetsParams(dtype=dtype, normalize=normalize)


loss = PairedLoss(
    "fitnets",
    "bool normalize, str reduction",
    _params,
    lambda student, _normalize, reduction: factor(student, reduction),
    reference.fitnets_forward,
    reference.fitnets_backward,
    measured=True,
    scaled=True,
)
