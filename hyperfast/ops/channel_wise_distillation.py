"""`hyperfast::channel_wise_distillation`: all taps in one grouped launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hyperfast import reference
from hyperfast.ops import _native
from hyperfast.ops._paired import PairedLoss
from hyperfast.reference.channel_wise_distillation import factor


def _params(dtype: int, _teacher: Sequence[Tensor], temperature: float) -> Any:
    return _native.module().ChannelWiseDistillationParams(dtype=dtype, temperature=temperature)


loss = PairedLoss(
    "channel_wise_distillation",
    "float temperature",
    _params,
    factor,
    reference.channel_wise_distillation_forward,
    reference.channel_wise_distillation_backward,
    by_sample=True,
)
