"""What the losses between Gram matrices of samples share: how they read maps, and `hyperfast::gram_backward`.

Such a loss leaves one small matrix per tap, M = dL/dG. The backward needs it and the student's maps, and is the same
for all of them: dX = (M + M^T) X.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hyperfast import reference
from hyperfast.backends import Backend, Dispatcher, Implementation
from hyperfast.ops import _native, _taps, _triton
from hyperfast.ops._library import register
from hyperfast.reference.reduction import accumulator


def cpu_supports(student: Sequence[Tensor], teacher: Sequence[Tensor] = (), *_: Any) -> str | None:
    """Why the CPU kernels cannot take the maps, or None."""
    reason = _native.missing() or _native.wrong_device(student[0], "cpu")
    dtypes = {features.dtype for features in (*student, *teacher)}
    if reason is None and torch.float64 in dtypes and len(dtypes) > 1:
        reason = "some maps are torch.float64 and some are not"
    if reason is None and any(features.numel() == 0 for features in (*student, *teacher)):
        reason = "a map is empty"
    return reason


def _cpu_supports_backward(_grad: Tensor, student: Sequence[Tensor], *_: Any) -> str | None:
    if len({s.dtype for s in student}) > 1:
        return "the maps are of different dtypes"
    return cpu_supports(student)


def triton_supports(student: Sequence[Tensor], teacher: Sequence[Tensor] = (), *_: Any) -> str | None:
    """Why the Triton kernels cannot take the maps, or None."""
    reason: str | None = _triton.missing(student[0].device)
    return reason or _triton.kernels("gram").supports(student, teacher)


def _triton_supports_backward(_grad: Tensor, student: Sequence[Tensor], *_: Any) -> str | None:
    return triton_supports(student)


def samples(side: str, features: Tensor) -> dict[str, int]:
    """A dense map as the native module takes it. In which order a sample's elements come changes no Gram matrix."""
    return {
        side: features.data_ptr(),
        f"{side}_size": features.shape[1:].numel(),
        f"{side}_dtype": _native.DTYPES[features.dtype],
    }


def work(maps: Sequence[Tensor]) -> int:
    """Elements read, counted once for every so many samples that each is multiplied with."""
    return sum(features.numel() * (1 + len(features) // 16) for features in maps)


def add_taps(params: Any, student: Sequence[Tensor], teacher: Sequence[Tensor] = ()) -> list[Tensor]:
    """The maps into the table of a launch. Returns them as they are read; the launch needs them alive."""
    dense = [_taps.dense(features) for features in (*student, *teacher)]
    for index in range(len(student)):
        other = samples("teacher", dense[len(student) + index]) if teacher else {}
        params.add_tap(**samples("student", dense[index]), **other)
    return dense


def matrices(student: Sequence[Tensor]) -> Tensor:
    """An uninitialised matrix `[B, B]` per tap."""
    batch = student[0].shape[0]
    return student[0].new_empty((len(student), batch, batch), dtype=accumulator(student))


def native_statistics(operation: str, params_type: Any, maps: Sequence[Tensor]) -> Tensor:
    """What `operation` reduces the teacher's maps to, `[L, B, B]`."""
    statistics = matrices(maps)
    params = params_type(
        wide=statistics.dtype == torch.float64,
        batch=maps[0].shape[0],
        student_statistics=statistics.data_ptr(),
    )
    dense = add_taps(params, maps)
    _native.launch(operation, params, statistics, work(dense))
    return statistics


def statistics_fake(maps: list[Tensor]) -> Tensor:
    """Fake kernel of an operation that gives the statistics of maps."""
    return matrices(maps)


def no_gradient(_ctx: Any, *_: Any) -> Any:
    """Backward of an operation on the teacher's maps."""
    raise RuntimeError("statistics are the teacher's, and have no gradient; give the student's maps themselves")


def nothing_saved(ctx: Any, inputs: Any, output: Any) -> None:
    """`setup_context` of an operation whose backward needs nothing."""


def forward_fake(student: list[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    """Fake kernel of a loss between Gram matrices."""
    return student[0].new_empty(len(student), dtype=accumulator(student)), matrices(student)


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """`setup_context` of a loss between Gram matrices: the student's maps and M."""
    ctx.students, ctx.teachers, ctx.others = len(inputs[0]), len(inputs[1]), len(inputs) - 2
    ctx.save_for_backward(*inputs[0], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def backward(ctx: Any, grad: Tensor | None, centred: bool) -> tuple[Any, ...]:
    """Gradients by the arguments of a loss between Gram matrices; the teacher's maps, which come second, get none."""
    *student, coefficients = ctx.saved_tensors
    gradients = [None] * ctx.students if grad is None else gram_backward(grad, student, coefficients, centred)
    return (gradients, [None] * ctx.teachers, *[None] * ctx.others)


def _native_backward(grad: Tensor, student: Sequence[Tensor], coefficients: Tensor, centred: bool) -> list[Tensor]:
    dtype = accumulator(student)
    grad, coefficients = grad.to(dtype).contiguous(), coefficients.to(dtype).contiguous()
    maps = [_taps.dense(s) for s in student]
    gradients = [_native.empty_like(s) for s in maps]
    params = _native.module().GramGradientParams(
        wide=dtype == torch.float64,
        centred=centred,
        stream=_taps.past_caches(maps),
        batch=maps[0].shape[0],
        coefficients=coefficients.data_ptr(),
        grad=grad.data_ptr(),
    )
    for s, d in zip(maps, gradients, strict=True):
        params.add_tap(**samples("student", s), gradient=d.data_ptr())
    _native.launch("gram_backward", params, grad, work(maps))
    return [_taps.strided_as(d, s) for d, s in zip(gradients, student, strict=True)]


def _triton_backward(*arguments: Any) -> Any:
    return _triton.kernels("gram").backward(*arguments)


backward_implementations = Dispatcher(
    "gram_backward",
    [
        Implementation(Backend.CPU, _native_backward, _cpu_supports_backward),
        Implementation(Backend.TRITON, _triton_backward, _triton_supports_backward),
        Implementation(Backend.REFERENCE, reference.gram_backward),
    ],
)


def _no_double_backward(_ctx: Any, *_: Any) -> Any:
    raise RuntimeError(
        "losses between Gram matrices have no fused second derivative; compute it inside "
        "hyperfast.use_backend('reference')"
    )


gram_backward = register(
    "gram_backward(Tensor grad, Tensor[] student, Tensor coefficients, bool centred) -> Tensor[]",
    backward_implementations,
    lambda grad, student, coefficients, centred: [torch.empty_like(s) for s in student],
    _no_double_backward,
    nothing_saved,
)
