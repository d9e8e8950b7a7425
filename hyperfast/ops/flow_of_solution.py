"""`hyperfast::flow_of_solution`: all pairs of taps in one call, and `flow_statistics` of a teacher.

The matrices of all samples may be many times as large as the maps. On the CPU the forward pass therefore may write the
gradients at once, sample by sample while a matrix is in the cache, and keep no matrix. They are right only for the
upstream gradient that was expected; for any other the forward pass runs anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hyperfast import reference
from hyperfast.backends import Backend, Dispatcher, Implementation
from hyperfast.ops import _native, _taps, _triton
from hyperfast.ops._gram import no_gradient, nothing_saved
from hyperfast.ops._library import register
from hyperfast.reference.reduction import accumulator


def _cpu_supports(student: Sequence[Tensor], teacher: Sequence[Tensor] = (), *_: Any) -> str | None:
    reason = _native.missing() or _native.wrong_device(student[0], "cpu")
    if reason is None and len({features.dtype for features in (*student, *teacher)}) > 1:
        reason = "the maps are of different dtypes"
    if reason is None and any(features.numel() == 0 for features in (*student, *teacher)):
        reason = "a map is empty"
    return reason


def _cpu_supports_backward(_grad: Tensor, student: Sequence[Tensor], *_: Any) -> str | None:
    return _cpu_supports(student)


def _triton_limits(student: Sequence[Tensor], teacher: Sequence[Tensor], pairs: Sequence[int]) -> str | None:
    reason: str | None = _triton.missing(student[0].device)
    return reason or _triton.kernels("flow_of_solution").supports(student, teacher, pairs)


def _triton_supports(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    _statistics: Sequence[Tensor],
    pairs: Sequence[int],
    _reduction: str,
    _normalize: bool,
    expected_grad: Tensor | None = None,
) -> str | None:
    # Comparing with the upstream gradient would wait for a GPU.
    reason = None if expected_grad is None else "expected_grad is for the CPU"
    return reason or _triton_limits(student, teacher, pairs)


def _triton_supports_backward(
    _grad: Tensor, student: Sequence[Tensor], _differences: Tensor, _scales: Tensor, pairs: Sequence[int]
) -> str | None:
    return _triton_limits(student, (), pairs)


def _triton_supports_statistics(maps: Sequence[Tensor], pairs: Sequence[int]) -> str | None:
    return _triton_limits(maps, (), pairs)


def _triton_forward(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    statistics: Sequence[Tensor],
    pairs: Sequence[int],
    reduction: str,
    normalize: bool,
    _expected_grad: None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    kernels = _triton.kernels("flow_of_solution")
    return (*kernels.forward(student, teacher, statistics, pairs, reduction, normalize), [])


def _triton_backward(*arguments: Any) -> Any:
    return _triton.kernels("flow_of_solution").backward(*arguments)


def _triton_statistics(*arguments: Any) -> Any:
    return _triton.kernels("flow_of_solution").statistics(*arguments)


def _matrix_sizes(student: Sequence[Tensor], pairs: Sequence[int]) -> list[int]:
    """Elements of the matrices of every pair."""
    channels = [s.shape[1] for s in student]
    batch = student[0].shape[0]
    return [batch * channels[i] * channels[j] for i, j in zip(pairs[::2], pairs[1::2], strict=True)]


class _Launch:
    """One launch over maps and pairs. Holds what the launch needs alive."""

    def __init__(
        self,
        student: Sequence[Tensor],
        pairs: Sequence[int],
        teacher: Sequence[Tensor] = (),
        statistics: Sequence[Tensor] = (),
        differences: Sequence[Tensor] = (),
        gradients: Sequence[Tensor] = (),
    ) -> None:
        self.maps = [features.contiguous() for features in (*student, *teacher)]
        self.statistics = [g.to(accumulator(student)).contiguous() for g in statistics]
        self.params = _native.module().FlowParams(
            dtype=_native.DTYPES[student[0].dtype],
            batch=student[0].shape[0],
        )
        for index, own in enumerate(self.maps[: len(student)]):
            other = self.maps[len(student) + index] if teacher else None
            self.params.add_map(
                channels=own.shape[1],
                student=own.data_ptr(),
                student_positions=own.shape[2:].numel(),
                teacher=0 if other is None else other.data_ptr(),
                teacher_positions=0 if other is None else other.shape[2:].numel(),
                d_student=gradients[index].data_ptr() if gradients else 0,
            )
        for index, (first, second) in enumerate(zip(pairs[::2], pairs[1::2], strict=True)):
            self.params.add_pair(
                first=first,
                second=second,
                statistics=self.statistics[index].data_ptr() if statistics else 0,
                differences=differences[index].data_ptr() if differences else 0,
            )

    def run(self) -> None:
        work = sum(features.numel() * (1 + features.shape[1] // 16) for features in self.maps)
        _native.launch("flow_of_solution", self.params, self.maps[0], work)


def _native_forward(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    statistics: Sequence[Tensor],
    pairs: Sequence[int],
    reduction: str,
    normalize: bool,
    expected_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    dtype, count = accumulator(student), len(pairs) // 2
    losses = student[0].new_empty(count, dtype=dtype)
    scales = student[0].new_empty((count, student[0].shape[0]), dtype=dtype)
    ahead = expected_grad is not None
    sizes = [] if ahead else _matrix_sizes(student, pairs)
    differences = _native.empty((sum(sizes),), student[0], dtype)
    gradients = [_native.empty(s.shape, s) for s in student] if ahead else []
    launch = _Launch(student, pairs, teacher, statistics, differences.split(sizes), gradients)
    launch.params.set_forward(reduction == "sum", normalize, losses.data_ptr(), scales.data_ptr())
    grad = None if expected_grad is None else expected_grad.contiguous()
    if grad is not None:
        launch.params.set_backward(grad.data_ptr(), scales.data_ptr())
    launch.run()
    gradients = [_taps.strided_as(d, s) for d, s in zip(gradients, student, strict=False)]
    return losses, differences, scales, gradients


def _native_backward(
    grad: Tensor, student: Sequence[Tensor], differences: Tensor, scales: Tensor, pairs: Sequence[int]
) -> list[Tensor]:
    grad, differences, scales = grad.contiguous(), differences.contiguous(), scales.contiguous()
    gradients = [_native.empty(s.shape, s) for s in student]
    of_pairs = differences.split(_matrix_sizes(student, pairs))
    launch = _Launch(student, pairs, differences=of_pairs, gradients=gradients)
    launch.params.set_backward(grad.data_ptr(), scales.data_ptr())
    launch.run()
    return [_taps.strided_as(d, s) for d, s in zip(gradients, student, strict=True)]


def _native_statistics(maps: Sequence[Tensor], pairs: Sequence[int]) -> list[Tensor]:
    matrices = _empty_matrices(maps, pairs)
    _Launch(maps, pairs, differences=matrices).run()
    return matrices


forward_implementations = Dispatcher(
    "flow_of_solution",
    [
        Implementation(Backend.CPU, _native_forward, _cpu_supports),
        Implementation(Backend.TRITON, _triton_forward, _triton_supports),
        Implementation(Backend.REFERENCE, reference.flow_of_solution_forward),
    ],
)
backward_implementations = Dispatcher(
    "flow_of_solution_backward",
    [
        Implementation(Backend.CPU, _native_backward, _cpu_supports_backward),
        Implementation(Backend.TRITON, _triton_backward, _triton_supports_backward),
        Implementation(Backend.REFERENCE, reference.flow_of_solution_backward),
    ],
)
statistics_implementations = Dispatcher(
    "flow_statistics",
    [
        Implementation(Backend.CPU, _native_statistics, lambda maps, _pairs: _cpu_supports(maps)),
        Implementation(Backend.TRITON, _triton_statistics, _triton_supports_statistics),
        Implementation(Backend.REFERENCE, reference.flow_statistics),
    ],
)


def _forward_fake(
    student: list[Tensor],
    teacher: list[Tensor],
    statistics: list[Tensor],
    pairs: Sequence[int],
    reduction: str,
    normalize: bool,
    expected_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    like, dtype, count = student[0], accumulator(student), len(pairs) // 2
    return (
        like.new_empty(count, dtype=dtype),
        like.new_empty(sum(_matrix_sizes(student, pairs)) if expected_grad is None else 0, dtype=dtype),
        like.new_empty((count, like.shape[0]), dtype=dtype),
        [] if expected_grad is None else [torch.empty_like(s) for s in student],
    )


def _empty_matrices(maps: Sequence[Tensor], pairs: Sequence[int]) -> list[Tensor]:
    batch, dtype = maps[0].shape[0], accumulator(maps)
    return [
        maps[0].new_empty((batch, maps[i].shape[1], maps[j].shape[1]), dtype=dtype)
        for i, j in zip(pairs[::2], pairs[1::2], strict=True)
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, list[Tensor]]) -> None:
    student, teacher, statistics, *ctx.options, expected_grad = inputs
    _losses, differences, scales, gradients = output
    ctx.counts = [len(student), len(teacher), len(statistics)]
    ctx.expects = expected_grad is not None
    if ctx.expects:
        ctx.save_for_backward(*student, *teacher, *statistics, expected_grad, *gradients)
    else:
        ctx.save_for_backward(*student, differences, scales)
    ctx.mark_non_differentiable(differences, scales, *gradients)
    ctx.set_materialize_grads(False)  # no zeros as large as the maps for outputs that have no gradient


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    maps, teachers, known = ctx.counts
    none = [None] * teachers, [None] * known, None, None, None, None
    if grad is None:
        return [None] * maps, *none
    student, (pairs, *options) = list(ctx.saved_tensors[:maps]), ctx.options
    if not ctx.expects:
        return flow_of_solution_backward(grad, student, *ctx.saved_tensors[maps:], pairs), *none
    teacher = list(ctx.saved_tensors[maps : maps + teachers])
    statistics = list(ctx.saved_tensors[maps + teachers : maps + teachers + known])
    expected_grad, *gradients = ctx.saved_tensors[maps + teachers + known :]
    as_expected = (
        type(grad) is Tensor  # while a graph is traced it has no numbers
        and not torch.is_grad_enabled()  # a gradient that is differentiated again needs its graph
        and torch.equal(grad, expected_grad)
    )
    if not as_expected:
        _, differences, scales, _ = flow_of_solution(
            [s.detach() for s in student], teacher, statistics, pairs, *options, None
        )
        gradients = flow_of_solution_backward(grad, student, differences, scales, pairs)
    return gradients, *none


def _no_double_backward(_ctx: Any, *_: Any) -> Any:
    raise RuntimeError(
        "flow_of_solution has no fused second derivative; compute it inside hyperfast.use_backend('reference')"
    )


flow_of_solution = register(
    "flow_of_solution(Tensor[] student, Tensor[] teacher, Tensor[] statistics, int[] pairs, str reduction, "
    "bool normalize, Tensor? expected_grad) -> (Tensor, Tensor, Tensor, Tensor[])",
    forward_implementations,
    _forward_fake,
    _backward,
    _save,
)
flow_of_solution_backward = register(
    "flow_of_solution_backward(Tensor grad, Tensor[] student, Tensor differences, Tensor scales, int[] pairs) "
    "-> Tensor[]",
    backward_implementations,
    lambda grad, student, differences, scales, pairs: [torch.empty_like(s) for s in student],
    _no_double_backward,
    nothing_saved,
)
flow_statistics = register(
    "flow_statistics(Tensor[] maps, int[] pairs) -> Tensor[]",
    statistics_implementations,
    _empty_matrices,
    no_gradient,
    nothing_saved,
)
