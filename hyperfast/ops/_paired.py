"""Losses over pairs of maps of one shape: one operation each, all taps in one grouped launch.

The kernels read both maps once and, where the gradient is known beforehand, write that of the student's while the maps
are in the cache: three passes over memory. The backward pass is the same launch without the losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from hyperfast.backends import Backend, Dispatcher, Implementation
from hyperfast.ops import _native, _taps
from hyperfast.ops._library import register
from hyperfast.reference.reduction import accumulator

Maps = Sequence[Tensor]


class PairedLoss:
    """A loss over pairs of maps, registered as `hyperfast::{name}` and `hyperfast::{name}_backward`.

    `forward(student, teacher, *options, expected_grad)` returns the losses `[L]`, measures and the gradients, which are
    none without an expectation. The measures are a second number per tap, `[L]`, or `[0]` where a loss has none.
    `backward(grad, student, teacher, *options)` returns the gradients.

    Args:
        name: of the operation, of the native launch, and with `_forward` and `_backward` of the references.
        options: their schema, such as `"float margin, str reduction"`.
        params: (dtype, teacher maps, *options) -> the native launch's parameters, without the taps.
        factor: (student map, *options) -> what the sum over a tap is multiplied by.
        forward: the reference of the forward pass.
        backward: the reference of the backward pass.
        by_sample: the kernel's rows are the samples; else they are whole maps.
        measured: whether there are measures.
        scaled: the measures are factors of the gradients, to be applied to the upstream gradient.
    """

    def __init__(
        self,
        name: str,
        options: str,
        params: Callable[..., Any],
        factor: Callable[..., float],
        forward: Callable[..., tuple[Tensor, Tensor, list[Tensor]]],
        backward: Callable[..., list[Tensor]],
        *,
        by_sample: bool = False,
        measured: bool = False,
        scaled: bool = False,
    ) -> None:
        self.name, self.params, self.factor = name, params, factor
        self.by_sample, self.measured, self.scaled = by_sample, measured, scaled
        self.count = options.count(",") + 1
        native = {Backend.CUDA: _cuda_supports, Backend.CPU: _cpu_supports}
        self.forward_implementations = Dispatcher(
            name,
            [
                *(Implementation(b, self._native_forward, s) for b, s in native.items()),
                Implementation(Backend.REFERENCE, forward),
            ],
        )
        self.backward_implementations = Dispatcher(
            f"{name}_backward",
            [
                *(Implementation(b, self._native_backward, _of_backward(s)) for b, s in native.items()),
                Implementation(Backend.REFERENCE, backward),
            ],
        )
        self.forward = register(
            f"{name}(Tensor[] student, Tensor[] teacher, {options}, Tensor? expected_grad) "
            "-> (Tensor, Tensor, Tensor[])",
            self.forward_implementations,
            self._forward_fake,
            self._backward,
            self._save,
        )
        self.backward = register(
            f"{name}_backward(Tensor grad, Tensor[] student, Tensor[] teacher, {options}) -> Tensor[]",
            self.backward_implementations,
            lambda grad, student, *_: [torch.empty_like(s) for s in student],
            _taps.no_double_backward(name),
            lambda ctx, inputs, output: None,
        )

    def _native_forward(self, student: Maps, teacher: Maps, *arguments: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
        *options, expected_grad = arguments
        dtype = accumulator(student)
        losses = student[0].new_empty(len(student), dtype=dtype)
        measures = student[0].new_empty(len(student) if self.measured else 0, dtype=dtype)
        return losses, measures, self._launch(student, teacher, options, expected_grad, losses, measures)

    def _native_backward(self, grad: Tensor, student: Maps, teacher: Maps, *options: Any) -> list[Tensor]:
        return self._launch(student, teacher, options, grad)

    def _launch(
        self,
        student: Maps,
        teacher: Maps,
        options: Sequence[Any],
        grad: Tensor | None,
        losses: Tensor | None = None,
        measures: Tensor | None = None,
    ) -> list[Tensor]:
        """Run the kernel; writes `losses` and `measures` where they are given, returns gradients where `grad` is."""
        pairs = [_alike(s, t) for s, t in zip(student, teacher, strict=True)]
        grad = None if grad is None else grad.contiguous()
        gradients = [] if grad is None else [_native.empty_like(s) for s, _ in pairs]
        for run in _taps.batches(len(pairs)):
            maps = [s for s, _ in pairs[run]]
            params = self.params(_native.DTYPES[maps[0].dtype], teacher, *options)
            for (s, t), d in zip_longest(pairs[run], gradients[run]):
                rows = len(s) if self.by_sample else 1
                params.add_tap(
                    student=s.data_ptr(),
                    teacher=t.data_ptr(),
                    d_student=0 if d is None else d.data_ptr(),
                    rows=rows,
                    length=s.numel() // rows,
                    channels=s.shape[1],
                    channels_last=_taps.is_channels_last(s),
                    factor=self.factor(s, *options),
                )
            # Two numbers per work item, and the ticket of a CUDA launch behind them.
            scratch = maps[0].new_empty(2 * params.items + 1, dtype=accumulator(maps))
            if losses is not None and measures is not None:
                addresses = losses[run].data_ptr(), measures[run].data_ptr(), scratch.data_ptr()
                params.set_losses(*addresses)
            if grad is not None:
                params.set_gradients(grad[run].data_ptr(), _taps.past_caches(maps))
            work = 2 * sum(s.numel() for s in maps)
            _native.launch(self.name, params, maps[0], work, scratch[-1:].data_ptr())
        return [_taps.strided_as(d, s) for d, s in zip(gradients, student, strict=False)]

    def _forward_fake(self, student: list[Tensor], *arguments: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
        dtype, count = accumulator(student), len(student)
        return (
            student[0].new_empty(count, dtype=dtype),
            student[0].new_empty(count if self.measured else 0, dtype=dtype),
            [] if arguments[-1] is None else [torch.empty_like(s) for s in student],
        )

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, list[Tensor]]) -> None:
        student, teacher, *ctx.options, expected_grad = inputs
        _losses, measures, gradients = output
        ctx.taps = len(student)
        _taps.save(ctx, [measures, *student, *teacher], expected_grad, gradients)
        ctx.mark_non_differentiable(measures, *gradients)

    def _backward(self, ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        gradients: Sequence[Tensor | None] | None = [None] * ctx.taps
        if grad is not None:
            (measures, *maps), gradients = _taps.saved(ctx, grad)
            if gradients is None:
                grad = grad * measures if self.scaled else grad
                gradients = self.backward(grad, maps[: ctx.taps], maps[ctx.taps :], *ctx.options)
        return gradients, [None] * ctx.taps, *[None] * (self.count + 1)


def _alike(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both dense, and laid out alike. Packed signs are those of a contiguous map."""
    if teacher.dtype == torch.uint8:
        return student.contiguous(), teacher.contiguous()
    student = _taps.dense(student)
    if teacher.stride() == student.stride() or (teacher.is_contiguous() and student.is_contiguous()):
        return student, teacher
    return student, torch.empty_like(student).copy_(teacher)


def _maps(student: Maps, teacher: Maps) -> list[Tensor]:
    """The maps that must agree in dtype; packed signs have their own."""
    packed = [t.dtype == torch.uint8 for t in teacher]
    return [*student] if all(packed) else [*student, *teacher]


def _cpu_supports(student: Maps, teacher: Maps, *_: Any) -> str | None:
    return _taps.cpu_supports(_maps(student, teacher))


def _cuda_supports(student: Maps, teacher: Maps, *arguments: Any) -> str | None:
    return _taps.no_expectation(arguments[-1]) or _taps.cuda_supports(_maps(student, teacher))


def _of_backward(supports: Callable[..., str | None]) -> Callable[..., str | None]:
    return lambda _grad, student, teacher, *_: supports(student, teacher, None)
