"""`hyperfast::sgd_rank_one`, `adam_rank_one`: an optimiser step whose gradient is an outer product, in one pass.

The gradient of a hypernetwork's head is one: of theta's gradient and the features that the head read. As a matrix it
would be as large as the head, written once and read once by the optimiser. Here it exists a vector at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hyperfast import reference
from hyperfast.backends import Backend, Dispatcher, Implementation
from hyperfast.ops import _native
from hyperfast.ops._library import register_mutating

# As enum UpdateRule in csrc/include/hyperfast/rank_one_update.h.
_SGD, _MOMENTUM, _NESTEROV, _ADAM, _ADAMW = range(5)

_CPU_CHUNK_BYTES = 1 << 20
_CUDA_CHUNK_BYTES = 1 << 16


def _supports(device: str, weight: Tensor, *state: Tensor) -> str | None:
    reason = _native.wrong_device(weight, device)
    reason = reason or (_native.missing() if device == "cpu" else _native.missing_cuda())
    dtypes = (torch.float32, torch.float64) if device == "cpu" else (torch.float32,)
    if reason is None and weight.dtype not in dtypes:
        reason = f"the weight is {weight.dtype}; the kernels take {' and '.join(map(str, dtypes))}"
    if reason is None and not weight.numel():
        reason = "the weight is empty"
    if reason is None and not all(tensor.is_contiguous() for tensor in (weight, *state)):
        reason = "the weight or its state is not contiguous"
    return reason


def _sgd_on(device: str) -> Any:
    return lambda weight, momentum_buffer, *_: _supports(device, weight, *momentum_buffer)


def _adam_on(device: str) -> Any:
    return lambda weight, exp_avg, exp_avg_sq, *_: _supports(device, weight, exp_avg, exp_avg_sq)


def _update(
    weight: Tensor, state: Sequence[Tensor], left: Tensor, right: Tensor, offsets: Tensor | None, **rule: Any
) -> None:
    left, right = left.contiguous(), right.contiguous()
    rows, hidden = weight.shape
    chunk_bytes = _CPU_CHUNK_BYTES if weight.device.type == "cpu" else _CUDA_CHUNK_BYTES
    addresses = dict(zip(("first", "second"), (tensor.data_ptr() for tensor in state), strict=False))
    params = _native.module().RankOneParams(
        dtype=_native.DTYPES[weight.dtype],
        rows=rows,
        hidden=hidden,
        segments=right.shape[0],
        chunk=max(1, chunk_bytes // (hidden * weight.element_size())),
        offsets=0 if offsets is None else offsets.data_ptr(),
        weight=weight.data_ptr(),
        left=left.data_ptr(),
        right=right.data_ptr(),
        **addresses,
        **rule,
    )
    _native.launch("rank_one_update", params, weight, weight.numel())


def _native_sgd(
    weight: Tensor,
    momentum_buffer: Sequence[Tensor],
    left: Tensor,
    right: Tensor,
    offsets: Tensor | None,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    rule = (_NESTEROV if nesterov else _MOMENTUM) if momentum_buffer else _SGD
    _update(
        weight, momentum_buffer, left, right, offsets,
        rule=rule, step_size=lr, weight_decay=weight_decay, keep_first=momentum, add_first=1 - dampening,
    )  # fmt: skip


def _native_adam(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    left: Tensor,
    right: Tensor,
    offsets: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    step: int,
) -> None:
    _update(
        weight, (exp_avg, exp_avg_sq), left, right, offsets,
        rule=_ADAMW if decoupled else _ADAM, step_size=lr / (1 - beta1**step), weight_decay=weight_decay,
        shrink=1 - lr * weight_decay, keep_first=beta1, add_first=1 - beta1, keep_second=beta2, add_second=1 - beta2,
        second_scale=1 / math.sqrt(1 - beta2**step), eps=eps,
    )  # fmt: skip


sgd_implementations = Dispatcher(
    "sgd_rank_one",
    [
        Implementation(Backend.CUDA, _native_sgd, _sgd_on("cuda")),
        Implementation(Backend.CPU, _native_sgd, _sgd_on("cpu")),
        Implementation(Backend.REFERENCE, reference.sgd_rank_one),
    ],
)
adam_implementations = Dispatcher(
    "adam_rank_one",
    [
        Implementation(Backend.CUDA, _native_adam, _adam_on("cuda")),
        Implementation(Backend.CPU, _native_adam, _adam_on("cpu")),
        Implementation(Backend.REFERENCE, reference.adam_rank_one),
    ],
)

sgd_rank_one = register_mutating(
    "sgd_rank_one(Tensor(a!) weight, Tensor(b!)[] momentum_buffer, Tensor left, Tensor right, Tensor? offsets, "
    "float lr, float momentum, float dampening, float weight_decay, bool nesterov) -> ()",
    sgd_implementations,
)
adam_rank_one = register_mutating(
    "adam_rank_one(Tensor(a!) weight, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor left, Tensor right, "
    "Tensor? offsets, float lr, float beta1, float beta2, float eps, float weight_decay, bool decoupled, int step) "
    "-> ()",
    adam_implementations,
)
