"""`hyperfast::ranger_update`: one step of Ranger over all tensors of a group, in place and in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hyperfast import reference
from hyperfast.backends import Backend, Dispatcher, Implementation
from hyperfast.ops import _native
from hyperfast.ops._library import register_mutating

Tensors = Sequence[Tensor]


def _is_dense(tensor: Tensor) -> bool:
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    return tensor.permute(order).is_contiguous()


def _has_dense_rows(tensor: Tensor) -> bool:
    """Whether each slice of the first dimension is a block of memory and one follows the other."""
    return tensor.is_contiguous() or (
        tensor.ndim > 0 and tensor.stride(0) == tensor[0].numel() and _is_dense(tensor[0])
    )


def _alike(tensor: Tensor, parameter: Tensor) -> bool:
    return (tensor.is_contiguous() and parameter.is_contiguous()) or tensor.stride() == parameter.stride()


def _native_limits(parameters: Tensors, state: Sequence[Tensors]) -> str | None:
    if len({p.dtype for p in parameters}) > 1:
        return "the parameters are of different dtypes"
    if all(tensor.is_contiguous() for tensors in (parameters, *state) for tensor in tensors):
        return None
    for index, p in enumerate(parameters):
        if not _has_dense_rows(p):
            return f"parameter {index} has strides {p.stride()}; its rows are not blocks of memory"
        if not all(_alike(tensors[index], p) for tensors in state):
            return f"the state of parameter {index} is not laid out as the parameter is"
    return None


def _cpu_supports(parameters: Tensors, _gradients: Tensors, *arguments: Any) -> str | None:
    reason = _native.missing() or _native.wrong_device(parameters[0], "cpu")
    return reason or _native_limits(parameters, arguments[:3])


def _cuda_supports(parameters: Tensors, _gradients: Tensors, *arguments: Any) -> str | None:
    reason = _native.wrong_device(parameters[0], "cuda") or _native.missing_cuda()
    return reason or _native_limits(parameters, arguments[:3])


def _native_update(
    parameters: Tensors,
    gradients: Tensors,
    exp_avg: Tensors,
    exp_avg_sq: Tensors,
    slow: Tensors,
    steps: Tensors,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    k: int,
    alpha: float,
    centralize: bool,
) -> None:
    like = parameters[0]
    pairs = zip(gradients, parameters, strict=True)
    gradients = [g if _alike(g, p) else torch.empty_like(p).copy_(g) for g, p in pairs]
    tensors = list(zip(parameters, gradients, exp_avg, exp_avg_sq, slow, steps, strict=True))
    most = _native.module().max_ranger_tensors
    for first in range(0, len(tensors), most):
        params = _native.module().RangerParams(
            dtype=_native.DTYPES[like.dtype], beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay,
            k=k, alpha=alpha, lr=lr.data_ptr(), lr_on_host=lr.is_cpu,
        )  # fmt: skip
        work = 0
        for group in tensors[first : first + most]:
            shape = group[0].shape
            size = shape.numel()
            row = size // shape[0] if centralize and len(shape) >= 2 and size else 0
            params.add_tensor(*[tensor.data_ptr() for tensor in group], size, row)
            work += 5 * size
        ticket = like.new_empty(1, dtype=torch.int32)  # of the CUDA launch
        _native.launch("ranger_update", params, like, work, ticket.data_ptr())


implementations = Dispatcher(
    "ranger_update",
    [
        Implementation(Backend.CUDA, _native_update, _cuda_supports),
        Implementation(Backend.CPU, _native_update, _cpu_supports),
        Implementation(Backend.REFERENCE, reference.ranger_update),
    ],
)

ranger_update = register_mutating(
    "ranger_update(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, "
    "Tensor(d!)[] slow, Tensor(e!)[] steps, Tensor lr, float beta1, float beta2, float eps, float weight_decay, "
    "int k, float alpha, bool centralize) -> ()",
    implementations,
)

