"""`hyperfast::similarity_preserving`: all taps in one call, and `similarity_statistics` of a teacher.

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
    student: Sequence[Tensor], teacher: Sequence[Tensor], statistics: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    coefficients = _gram.matrices(student)
    losses = coefficients.new_empty(len(student))
    known = None if statistics is None else statistics.to(coefficients.dtype).contiguous()
    params = _native.module().SimilarityParams(
        wide=losses.dtype == torch.float64,
        batch=student[0].shape[0],
        statistics=0 if known is None else known.data_ptr(),
        losses=losses.data_ptr(),
        coefficients=coefficients.data_ptr(),
    )
    dense = _gram.add_taps(params, student, teacher)
    _native.launch("similarity_preserving", params, losses, _gram.work(dense))
    return losses, coefficients


def _native_statistics(maps: Sequence[Tensor]) -> Tensor:
    return _gram.native_statistics("similarity_preserving", _native.module().SimilarityParams, maps)


def _triton_forward(*arguments: Any) -> Any:
    return _triton.kernels("similarity_preserving").forward(*arguments)


def _triton_statistics(*arguments: Any) -> Any:
    return _triton.kernels("similarity_preserving").statistics(*arguments)


forward_implementations = Dispatcher(
    "similarity_preserving",
    [
        Implementation(Backend.CPU, _native_forward, _gram.cpu_supports),
        Implementation(Backend.TRITON, _triton_forward, _gram.triton_supports),
        Implementation(Backend.REFERENCE, reference.similarity_preserving_forward),
    ],
)
statistics_implementations = Dispatcher(
    "similarity_statistics",
    [
        Implementation(Backend.CPU, _native_statistics, _gram.cpu_supports),
        Implementation(Backend.TRITON, _triton_statistics, _gram.triton_supports),
        Implementation(Backend.REFERENCE, reference.similarity_statistics),
    ],
)

similarity_preserving = register(
    "similarity_preserving(Tensor[] student, Tensor[] teacher, Tensor? statistics) -> (Tensor, Tensor)",
    forward_implementations,
    _gram.forward_fake,
    lambda ctx, grad, _: _gram.backward(ctx, grad, centred=False),
    _gram.save,
)
similarity_statistics = register(
    "similarity_statistics(Tensor[] maps) -> Tensor",
    statistics_implementations,
    _gram.statistics_fake,
    _gram.no_gradient,
    _gram.nothing_saved,
)
