"""The Triton kernels of `flow_of_solution` in the interpreter, against the reference in float64."""

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

CHANNELS = (5, 70, 6)
PAIRS = [0, 1, 1, 2, 2, 2, 2, 0]
OPTIONS = [("mean", False), ("mean", True), ("sum", False), ("sum", True)]


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    pytest.importorskip("triton")
    from hyperfast.kernels.triton import flow_of_solution

    return flow_of_solution


def maps(dtype: torch.dtype = torch.float32, batch: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    student = [torch.randn(batch, c, 6, 12).to(dtype) for c in CHANNELS]
    return student, [torch.randn(batch, c, 5, 7).to(dtype) for c in CHANNELS]


def doubled(tensors: list[Tensor]) -> list[Tensor]:
    return [x.double() for x in tensors]


def check(
    kernels: ModuleType, student: list[Tensor], teacher: list[Tensor], reduction: str = "mean", normalize: bool = False
) -> None:
    assert kernels.supports(student, teacher, PAIRS) is None
    losses, differences, scales = kernels.forward(student, teacher, [], PAIRS, reduction, normalize)
    assert losses.dtype == differences.dtype == scales.dtype == torch.float32
    options: Any = ([], PAIRS, reduction, normalize)
    eager = reference.flow_of_solution_forward(student, teacher, *options)
    exact = reference.flow_of_solution_forward(doubled(student), doubled(teacher), *options)
    for a, b, c in zip((losses, differences, scales), eager[:3], exact[:3], strict=True):
        assert_as_accurate(a, b, c)
    grad = torch.rand(len(PAIRS) // 2) + 1000
    found = kernels.backward(grad, student, differences, scales, PAIRS)
    eager_gradients = reference.flow_of_solution_backward(grad, student, *eager[1:3], PAIRS)
    exact_gradients = reference.flow_of_solution_backward(grad.double(), doubled(student), *exact[1:3], PAIRS)
    for a, b, c, s in zip(found, eager_gradients, exact_gradients, student, strict=True):
        assert a.dtype == s.dtype and a.stride() == torch.empty_like(s).stride()
        assert_as_accurate(a, b, c, what="gradient")


@pytest.mark.parametrize(("reduction", "normalize"), OPTIONS)
def test_reductions(kernels: ModuleType, reduction: str, normalize: bool) -> None:
    check(kernels, *maps(), reduction, normalize)


def test_half_precision(kernels: ModuleType) -> None:
    student, teacher = maps(torch.float16)
    check(kernels, student, teacher)
    check(kernels, student, [t.float() for t in teacher])


def test_layouts(kernels: ModuleType) -> None:
    student, teacher = maps()
    student = [s.contiguous(memory_format=torch.channels_last) for s in student]
    check(kernels, student, [t.transpose(2, 3) for t in teacher])


def test_more_samples_than_are_added_at_once(kernels: ModuleType) -> None:
    student, teacher = maps(batch=67)
    losses, _, _ = kernels.forward(student, teacher, [], [0, 2], "mean", False)
    exact = reference.flow_of_solution(doubled(student), doubled(teacher), [], [0, 2], "mean", False)
    torch.testing.assert_close(losses.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("reduction", "normalize"), OPTIONS)
def test_statistics_stand_for_the_teachers_maps(kernels: ModuleType, reduction: str, normalize: bool) -> None:
    student, teacher = maps()
    known = kernels.statistics(teacher, PAIRS)
    exact = reference.flow_statistics(doubled(teacher), PAIRS)
    for a, b, c in zip(known, reference.flow_statistics(teacher, PAIRS), exact, strict=True):
        assert_as_accurate(a, b, c)
    found = kernels.forward(student, [], known, PAIRS, reduction, normalize)
    for a, b in zip(found, kernels.forward(student, teacher, [], PAIRS, reduction, normalize), strict=True):
        assert torch.equal(a, b)


def test_equal_networks_have_zero_loss_and_differences(kernels: ModuleType) -> None:
    student, _ = maps()
    student[0][:, 1] = 0
    losses, differences, _ = kernels.forward(student, [s.clone() for s in student], [], PAIRS, "sum", True)
    assert not losses.any() and not differences.any()


def test_a_dead_teacher_has_no_scale(kernels: ModuleType) -> None:
    student, teacher = maps()
    teacher[1][0] = 0
    losses, _, scales = kernels.forward(student, teacher, [], PAIRS, "sum", True)
    assert losses.isfinite().all() and scales[:2, 0].tolist() == [0, 0] and scales[2:].all()


def test_two_runs_agree_bit_for_bit(kernels: ModuleType) -> None:
    student, teacher = maps()

    def run() -> list[Tensor]:
        losses, differences, scales = kernels.forward(student, teacher, [], PAIRS, "mean", False)
        return [losses, differences, *kernels.backward(torch.ones(4), student, differences, scales, PAIRS)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_two_launches_forward_and_one_backward(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import GridExecutor

    launches = []
    call = GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        launches.append(self.fn.__name__)
        call(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    student, teacher = maps()
    _, differences, scales = kernels.forward(student, teacher, [], PAIRS, "mean", False)
    kernels.backward(torch.ones(4), student, differences, scales, PAIRS)
    assert launches == ["flow_matrices_kernel", "flow_losses_kernel", "flow_backward_kernel"]


def test_refusals_name_the_reason(kernels: ModuleType) -> None:
    student, teacher = maps()
    assert "float64" in kernels.supports(doubled(student), teacher, PAIRS)
    assert "the teacher maps have different dtypes" in kernels.supports(student, [teacher[0], teacher[1].half()], PAIRS)
    assert "65 maps and 1 pairs; at most 64 of each" in kernels.supports([student[0]] * 65, [], [0, 1])
    assert "3 maps and 65 pairs; at most 64 of each" in kernels.supports(student, [], [0, 1] * 65)
    assert "no elements" in kernels.supports([torch.rand(2, 0, 3)], [], [0, 0])
