"""pytest-benchmark front end of the operation `sub_logit_distillation`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def test_sub_logit_distillation(measured: Callable[[], torch.Tensor | Sequence[torch.Tensor]]) -> None:
    outputs = measured()
    tensors = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    assert all(tensor.isfinite().all() for tensor in tensors)
