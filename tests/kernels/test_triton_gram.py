"""The Triton kernels of the losses between Gram matrices in the interpreter, against the reference in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers import assert_as_accurate

from hyperfast import reference
from hyperfast.kernels import config

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor

pytestmark = pytest.mark.interpreter

# Shapes of the student's and the teacher's maps: sizes that fill no tile, more than one piece, channels_last.
TAPS = [((5, 6, 7), (4, 5, 7)), ((3, 40), (3, 33)), ((1100,), (300,))]
Maps = tuple[list["Tensor"], list["Tensor"]]


@pytest.fixture(scope="module")
def gram() -> ModuleType:
    pytest.importorskip("triton")
    from hyperfast.kernels.triton import gram

    return gram


@pytest.fixture(scope="module", params=["similarity_preserving", "relational_distance_angle"])
def loss(request: pytest.FixtureRequest, gram: ModuleType) -> Loss:
    return Loss(request.param, gram)


class Loss:
    """One loss: its kernels, its reference, and the backward pass they share."""

    def __init__(self, name: str, gram: ModuleType) -> None:
        from hyperfast.kernels.triton import relational_distance_angle, similarity_preserving

        self.name, self.gram, self.centred = name, gram, name == "relational_distance_angle"
        self.kernels = relational_distance_angle if self.centred else similarity_preserving
        self.reference = getattr(reference, f"{name}_forward")
        prefix = "relational" if self.centred else "similarity"
        self.reference_statistics = getattr(reference, f"{prefix}_statistics")
        self.weights = (25.0, 50.0) if self.centred else ()

    def forward(self, student: list[Tensor], teacher: list[Tensor], known: Tensor | None = None) -> Any:
        assert self.gram.supports(student, teacher) is None
        return self.kernels.forward(student, teacher, known, *self.weights)

    def exact(self, student: list[Tensor], teacher: list[Tensor]) -> Any:
        return self.reference(doubled(student), doubled(teacher), None, *self.weights)

    def check(self, student: list[Tensor], teacher: list[Tensor]) -> None:
        losses, coefficients = self.forward(student, teacher)
        assert losses.dtype == coefficients.dtype == torch.float32
        eager = self.reference(student, teacher, None, *self.weights)
        exact = self.exact(student, teacher)
        assert_as_accurate(losses, eager[0], exact[0], what="losses")
        assert_as_accurate(coefficients, eager[1], exact[1], what="coefficients")
        grad = torch.rand(len(student)) + 1000
        found = self.gram.backward(grad, student, coefficients, self.centred)
        eager_gradients = reference.gram_backward(grad, student, eager[1], self.centred)
        exact_gradients = reference.gram_backward(grad.double(), doubled(student), exact[1], self.centred)
        for a, b, c, s in zip(found, eager_gradients, exact_gradients, student, strict=True):
            assert a.dtype == s.dtype and a.stride() == torch.empty_like(s).stride()
            assert_as_accurate(a, b, c, what="gradient")


def maps(batch: int = 9, dtype: torch.dtype = torch.float32, taps: Any = TAPS) -> Maps:
    student, teacher = ([torch.randn(batch, *tap[side]).to(dtype) for tap in taps] for side in (0, 1))
    return student, teacher


def doubled(tensors: list[Tensor]) -> list[Tensor]:
    return [x.double() for x in tensors]


@pytest.mark.parametrize("batch", [2, 9, 33, 70])
def test_batches(loss: Loss, batch: int) -> None:
    if loss.centred and batch == 70:
        loss.check(*maps(batch, taps=TAPS[:1]))  # the interpreter takes its time for all angles
    elif batch > 2:
        loss.check(*maps(batch))
    else:
        student, teacher = maps(batch)
        losses, _ = loss.forward(student, teacher)
        torch.testing.assert_close(losses.double(), loss.exact(student, teacher)[0], rtol=1e-5, atol=1e-10)


def test_half_precision(loss: Loss) -> None:
    student, teacher = maps(dtype=torch.float16)
    loss.check(student, teacher)
    losses, _ = loss.forward(student, [t.float() for t in teacher])  # two launches for two dtypes
    torch.testing.assert_close(losses, loss.forward(student, teacher)[0], rtol=1e-5, atol=0)


def test_half_precision_does_not_overflow(loss: Loss) -> None:
    student, teacher = maps(dtype=torch.float16)
    large = [10_000 * s.clamp(-6, 6) for s in student]
    losses, coefficients = loss.forward(large, teacher)
    assert coefficients.isfinite().all()
    torch.testing.assert_close(losses, loss.forward([s / 10_000 for s in large], teacher)[0], rtol=1e-2, atol=0)


def test_layouts(loss: Loss) -> None:
    student = [
        torch.randn(9, 4, 5, 6).contiguous(memory_format=torch.channels_last),
        torch.randn(9, 8, 10, 10)[:, ::2, 1:],
        torch.randn(9, 1, 7).expand(9, 3, 7),
    ]
    loss.check(student, [torch.randn(9, 4, 10, 9).transpose(2, 3), torch.randn(9, 12), torch.randn(9, 5)])


def test_statistics_stand_for_the_teachers_maps(loss: Loss) -> None:
    student, teacher = maps()
    known = loss.kernels.statistics(teacher)
    assert_as_accurate(known, loss.reference_statistics(teacher), loss.reference_statistics(doubled(teacher)))
    for a, b in zip(loss.forward(student, [], known), loss.forward(student, teacher), strict=True):
        assert torch.equal(a, b)


def test_equal_networks_have_zero_loss_and_coefficients(loss: Loss) -> None:
    student, _ = maps()
    student[0][:, 1] = 0
    student[1][3] = student[1][5]
    student[2][:] = 1
    losses, coefficients = loss.forward(student, [s.clone() for s in student])
    assert not losses.any() and not coefficients.any()


def test_dead_and_equal_samples_are_as_in_the_reference(loss: Loss) -> None:
    student, teacher = maps()
    student[0][2] = 0
    student[1][3] = student[1][5]
    teacher[2][4] = teacher[2][1]
    losses, coefficients = loss.forward(student, teacher)
    exact = loss.exact(student, teacher)
    torch.testing.assert_close(losses.double(), exact[0], rtol=1e-5, atol=0)
    assert (coefficients - exact[1]).norm() < 1e-4 * exact[1].norm()


def test_a_large_common_mean_costs_relations_no_accuracy(gram: ModuleType) -> None:
    relations = Loss("relational_distance_angle", gram)
    student, teacher = ([s + 1000 for s in side] for side in maps())
    losses, coefficients = relations.forward(student, teacher)
    exact = relations.exact(student, teacher)
    torch.testing.assert_close(losses.double(), exact[0], rtol=1e-4, atol=0)
    found = gram.backward(torch.ones(3), student, coefficients, True)
    expected = reference.gram_backward(torch.ones(3).double(), doubled(student), exact[1], True)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() < 1e-3 * b.norm()


@pytest.mark.parametrize(("distance", "angle"), [(1.0, 0.0), (0.0, 1.0)])
def test_either_relation_alone(gram: ModuleType, distance: float, angle: float) -> None:
    relations = Loss("relational_distance_angle", gram)
    relations.weights = (distance, angle)
    relations.check(*maps())


def test_gram_matrices_are_symmetric_bit_for_bit(gram: ModuleType) -> None:
    for centred in (False, True):
        (found,) = gram.gram([torch.randn(70, 1500)], centred)
        assert torch.equal(found, found.t())


def test_two_runs_agree_bit_for_bit(loss: Loss) -> None:
    student, teacher = maps()
    first, second = loss.forward(student, teacher), loss.forward(student, teacher)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_launches_do_not_depend_on_the_number_of_taps(loss: Loss, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import GridExecutor

    launches = []
    call = GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        launches.append(self.fn.__name__)
        call(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    student, teacher = maps()
    _, coefficients = loss.forward(student, teacher)
    loss.gram.backward(torch.ones(3), student, coefficients, loss.centred)
    shared = ["gram_partial_kernel", "gram_sum_kernel"]
    if loss.centred:
        rows = ["relational_rows_kernel", "relational_coefficients_kernel"]
        assert launches == ["gram_mean_kernel", *shared, *rows, "gram_backward_kernel"]
    else:
        assert launches == [*shared, "similarity_rows_kernel", "gram_backward_kernel"]


def test_refusals_name_the_reason(gram: ModuleType) -> None:
    from hyperfast.kernels.triton import relational_distance_angle

    student, teacher = maps()
    assert "float64" in gram.supports(doubled(student), teacher)
    assert not config.INTERPRET or "bfloat16" in gram.supports([s.bfloat16() for s in student], teacher)
    assert "the teacher maps have different dtypes" in gram.supports(student, [teacher[0], teacher[1].half()])
    assert "130 maps; at most 128" in gram.supports([student[1]] * 65, [teacher[1]] * 65)
    assert "no elements" in gram.supports([torch.rand(2, 0, 3)], [torch.rand(2, 1, 3)])
    assert "a batch of 2049; at most 2048" in gram.supports([torch.rand(2049, 1)])
    assert "a batch of 1025; at most 1024" in relational_distance_angle.supports([torch.rand(1025, 1)])
