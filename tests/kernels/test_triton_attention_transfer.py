"""The Triton kernels of `attention_transfer` in the interpreter, against the reference in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers import assert_as_accurate

from hyperfast import reference

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor

pytestmark = pytest.mark.interpreter

# (student channels, teacher channels, spatial size): every tile shape, sizes that are no multiple of one, several taps.
TAPS = [(5, 7, (33, 35)), (70, 3, (15, 12)), (20, 20, (4, 4)), (3, 5, (9,)), (2, 2, (3, 3, 3))]


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    pytest.importorskip("triton")
    from hyperfast.kernels.triton import attention_transfer

    return attention_transfer


def maps(
    taps: list[Any], side: int, batch: int = 2, dtype: torch.dtype = torch.float32, last: bool = False
) -> list[Tensor]:
    found = [torch.randn(batch, tap[side], *tap[2]).to(dtype) for tap in taps]
    if last:
        found = [f.movedim(1, -1).contiguous().movedim(-1, 1) for f in found]
    return found


def doubled(tensors: list[Tensor]) -> list[Tensor]:
    return [x.double() for x in tensors]


def check(kernels: ModuleType, student: list[Tensor], teacher: list[Tensor], p: int = 2, mode: str = "code") -> None:
    assert kernels.supports(student, teacher) is None
    eps = 1e-6 if mode == "zoo" else 1e-12
    losses, coefficients = kernels.forward(student, teacher, p, mode, eps)
    assert losses.dtype == coefficients.dtype == torch.float32
    eager = reference.attention_transfer_forward(student, teacher, p, mode, eps)
    exact = reference.attention_transfer_forward(doubled(student), doubled(teacher), p, mode, eps)
    assert_as_accurate(losses, eager[0], exact[0], what="losses")
    assert_as_accurate(coefficients, eager[1], exact[1], what="coefficients")
    # Losses are about 1 / N: a gradient scaled as a loss scale would does not vanish in float16.
    grad = torch.rand(len(student)) + 1000
    found = kernels.backward(grad, student, coefficients, p)
    eager_gradients = reference.attention_transfer_backward(grad, student, eager[1], p)
    exact_gradients = reference.attention_transfer_backward(grad.double(), doubled(student), exact[1], p)
    for a, b, c, s in zip(found, eager_gradients, exact_gradients, student, strict=True):
        assert a.dtype == s.dtype and a.stride() == torch.empty_like(s).stride()
        assert_as_accurate(a, b, c, what="gradient")


@pytest.mark.parametrize("mode", ["code", "paper", "zoo"])
@pytest.mark.parametrize("p", [1, 2, 3])
def test_powers_and_modes(kernels: ModuleType, p: int, mode: str) -> None:
    check(kernels, maps(TAPS, 0), maps(TAPS, 1), p, mode)


@pytest.mark.parametrize("teacher_last", [False, True])
@pytest.mark.parametrize("student_last", [False, True])
def test_memory_formats(kernels: ModuleType, student_last: bool, teacher_last: bool) -> None:
    check(kernels, maps(TAPS, 0, last=student_last), maps(TAPS, 1, last=teacher_last))


def test_mixed_formats_and_strides(kernels: ModuleType) -> None:
    student = [maps(TAPS[:1], 0)[0], maps(TAPS[1:2], 0, last=True)[0], torch.randn(2, 8, 10, 10)[:, ::2, 1:]]
    teacher = [maps(TAPS[:1], 1, last=True)[0], maps(TAPS[1:2], 1)[0], torch.randn(2, 4, 10, 9).transpose(2, 3)]
    check(kernels, student, teacher)


def test_half_precision(kernels: ModuleType) -> None:
    check(kernels, maps(TAPS[:3], 0, dtype=torch.float16), maps(TAPS[:3], 1, dtype=torch.float16))
    check(kernels, maps(TAPS[:3], 0, dtype=torch.float16), maps(TAPS[:3], 1))


def test_half_precision_squares_do_not_overflow(kernels: ModuleType) -> None:
    student = [m * 300 for m in maps(TAPS[1:2], 0, dtype=torch.float16)]
    losses, _ = kernels.forward(student, maps(TAPS[1:2], 1), 2, "code", 1e-12)
    assert losses.isfinite().all() and losses[0] > 0


@pytest.mark.parametrize("mode", ["code", "paper", "zoo"])
def test_dead_maps_have_no_gradient(kernels: ModuleType, mode: str) -> None:
    student, teacher = maps(TAPS[:2], 0), maps(TAPS[:2], 1)
    student[0][1] = 0
    _, coefficients = kernels.forward(student, teacher, 2, mode, 1e-6)
    first = coefficients[: 2 * 33 * 35].view(2, -1)
    assert coefficients.isfinite().all() and not first[1].any() and first[0].any()


def test_equal_maps_and_single_positions_are_zero(kernels: ModuleType) -> None:
    same, single = torch.rand(2, 3, 6, 6), torch.rand(2, 1, 1, 1)
    for mode in ("code", "paper"):
        losses, coefficients = kernels.forward([same, single], [same, torch.rand(2, 4, 1, 1)], 2, mode, 1e-12)
        assert not losses.any() and not coefficients.any()


def test_maps_of_one_channel_and_one_position_alone(kernels: ModuleType) -> None:
    losses, _ = kernels.forward([torch.rand(1, 1, 1, 1)], [torch.rand(1, 1, 1, 1)], 2, "code", 1e-12)
    assert losses.tolist() == [0]
    check(kernels, [torch.randn(1, 1, 1, 7)], [torch.randn(1, 1, 1, 7)])


def test_many_taps_and_samples(kernels: ModuleType) -> None:
    taps = [(2, 3, (3, 2 + i)) for i in range(17)]
    check(kernels, maps(taps, 0), maps(taps, 1))
    student, teacher = maps(taps[:1], 0, batch=66), maps(taps[:1], 1, batch=66)
    losses, _ = kernels.forward(student, teacher, 2, "code", 1e-12)
    exact = reference.attention_transfer(doubled(student), doubled(teacher), 2, "code", 1e-12)
    assert_as_accurate(losses, reference.attention_transfer(student, teacher, 2, "code", 1e-12), exact, what="losses")


def test_empty_batch(kernels: ModuleType) -> None:
    student, teacher = maps(TAPS[:2], 0, batch=0), maps(TAPS[:2], 1, batch=0)
    losses, coefficients = kernels.forward(student, teacher, 2, "code", 1e-12)
    assert losses.tolist() == [0, 0] and not coefficients.numel()
    assert [g.shape for g in kernels.backward(torch.ones(2), student, coefficients, 2)] == [s.shape for s in student]


def test_two_runs_agree_bit_for_bit(kernels: ModuleType) -> None:
    student, teacher = maps(TAPS, 0), maps(TAPS, 1)

    def run() -> list[Tensor]:
        losses, coefficients = kernels.forward(student, teacher, 2, "code", 1e-12)
        return [losses, coefficients, *kernels.backward(torch.ones(len(TAPS)), student, coefficients, 2)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_one_launch_each_way(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import GridExecutor

    launches = []
    call = GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        launches.append(self.fn.__name__)
        call(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    student = maps(TAPS, 0)
    _, coefficients = kernels.forward(student, maps(TAPS, 1), 2, "code", 1e-12)
    kernels.backward(torch.ones(len(TAPS)), student, coefficients, 2)
    assert launches == ["attention_transfer_forward_kernel", "attention_transfer_backward_kernel"]


def test_refusals_name_the_reason(kernels: ModuleType) -> None:
    student, teacher = maps(TAPS[:2], 0), maps(TAPS[:2], 1)
    assert "float64" in kernels.supports(doubled(student), teacher)
    assert "bfloat16" in kernels.supports([s.bfloat16() for s in student], teacher)
    assert "the teacher maps have different dtypes" in kernels.supports(student, [teacher[0], teacher[1].half()])
    assert "65 taps; at most 64" in kernels.supports([student[1]] * 65, [teacher[1]] * 65)
    assert "no elements" in kernels.supports([torch.rand(2, 0, 3)], [torch.rand(2, 1, 3)])
