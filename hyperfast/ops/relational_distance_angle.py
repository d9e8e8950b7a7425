"""`hyperfast::relational_distance_angle`: all taps in one call, and `relational_statistics` of a teacher.

The backward is `hyperfast::gram_backward`: it needs one small matrix per tap and the student's maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hyperfast import reference
from hyperfast.backends import Backend, Dispatcher, Implementation
from hyperfast.ops import _gram, _native, _triton
from hyperfast.ops._library import register


def _native_forward(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    statistics: Tensor | None,
    distance: float,
    angle: float,
) -> tuple[Tensor, Tensor]:
    batch = student[0].shape[0]
    coefficients = _gram.matrices(student)
    losses = coefficients.new_empty(len(student))
    known = None if statistics is None else statistics.to(coefficients.dtype).contiguous()
    params = _native.module().RelationalParams(
        wide=losses.dtype == torch.float64,
        batch=batch,
        statistics=0 if known is None else known.data_ptr(),
        losses=losses.data_ptr(),
        coefficients=coefficients.data_ptr(),
    )
    params.set_weights(distance, angle)
    dense = _gram.add_taps(params, student, teacher)
    triples = len(student) * batch**3 if angle else 0
    _native.launch("relational_distance_angle", params, losses, _gram.work(dense) + triples)
    return losses, coefficients


def _native_statistics(maps: Sequence[Tensor]) -> Tensor:
    return _gram.native_statistics("relational_distance_angle", _native.module().RelationalParams, maps)


def _triton_supports(student: Sequence[Tensor], *arguments: Any) -> str | None:
    reason = _gram.triton_supports(student, *arguments)
    return reason or _triton.kernels("relational_distance_angle").supports(student)


def _triton_forward(*arguments: Any) -> Any:
    return _triton.kernels("relational_distance_angle").forward(*arguments)


def _triton_statistics(*arguments: Any) -> Any:
    return _triton.kernels("relational_distance_angle").statistics(*arguments)


forward_implementations = Dispatcher(
    "relational_distance_angle",
    [
        Implementation(Backend.CPU, _native_forward, _gram.cpu_supports),
        Implementation(Backend.TRITON, _triton_forward, _triton_supports),
        Implementation(Backend.REFERENCE, reference.relational_distance_angle_forward),
    ],
)
statistics_implementations = Dispatcher(
    "relational_statistics",
    [
        Implementation(Backend.CPU, _native_statistics, _gram.cpu_supports),
        Implementation(Backend.TRITON, _triton_statistics, _gram.triton_supports),
        Implementation(Backend.REFERENCE, reference.relational_statistics),
    ],
)

relational_distance_angle = register(
    "relational_distance_angle(Tensor[] student, Tensor[] teacher, Tensor? statistics, float distance, float angle) "
    "-> (Tensor, Tensor)",
    forward_implementations,
    _gram.forward_fake,
    lambda ctx, grad, _: _gram.backward(ctx, grad, centred=True),
    _gram.save,
)
relational_statistics = register(
    "relational_statistics(Tensor[] maps) -> Tensor",
    statistics_implementations,
    _gram.statistics_fake,
    _gram.no_gradient,
    _gram.nothing_saved,
)
