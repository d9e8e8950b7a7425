"""What the losses between the Gram matrices of a batch promise on top of the other losses over maps."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from map_loss_contract import MapLossContract, with_gradients
from torch import Tensor

from hyperfast import functional, reference
from hyperfast.ops._gram import gram_backward

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from map_loss_contract import Call

# Sizes that fill no vector, no block of rows, more than one panel and more than one piece.
SHAPES = [(7, 5, 6, 7), (7, 8, 4, 4), (7, 19), (7, 3, 2, 3, 3), (7, 70, 61, 1)]


class GramContract(MapLossContract):
    """The tests that they share.

    Attributes:
        name: of the operation, of the public function and of the references.
        statistics_name: that of what makes statistics of the teacher's maps.
        ops: the module of the operation.
        parameters: what the operation takes after the maps and the statistics.
        centred: whether the loss depends on differences of samples only.
        batches: sizes.
    """

    name: ClassVar[str]
    statistics_name: ClassVar[str]
    ops: ClassVar[ModuleType]
    parameters: ClassVar[tuple[float, ...]] = ()
    centred: ClassVar[bool]
    batches: ClassVar[Sequence[int]]
    shapes = SHAPES
    accurate = (*SHAPES[:3], (7, 33, 17, 19))
    no_second_derivative = "losses between Gram matrices have no fused second derivative"
    close = (1e-4, 1e-6)

    @property
    def public(self) -> Callable[..., Tensor]:
        return getattr(functional, self.name)

    @property
    def statistics(self) -> Callable[..., Tensor]:
        """The public function that makes them."""
        return getattr(functional, self.statistics_name)

    def teacher_shape(self, index: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        """One channel more in the second tap."""
        batch, channels, *spatial = shape
        return (batch, channels + (index == 1), *spatial)

    def call(
        self, students: list[Tensor], teachers: list[Tensor], options: dict[str, Any], expected_grad: Tensor | None
    ) -> Call:
        parameters = tuple(options.values()) or self.parameters
        return getattr(self.ops, self.name), (students, teachers, None, *parameters)

    def more_calls(self, students: list[Tensor], teachers: list[Tensor], options: dict[str, Any]) -> Iterator[Call]:
        operation, make = getattr(self.ops, self.name), getattr(self.ops, self.statistics_name)
        yield make, (students,)
        wanting = [s.clone().requires_grad_() for s in students]
        yield operation, (wanting, [], make(students), *self.parameters)
        _, coefficients = operation(students, teachers, None, *self.parameters)
        yield gram_backward, (torch.ones(len(students)), students, coefficients, self.centred)

    # Values

    def test_equals_plain_autograd_in_batches_of_any_size(self, backend, batch):
        self.assert_exact(*self.maps([(batch, *shape[1:]) for shape in SHAPES]), {})

    def test_closed_form_of_the_reference_is_its_derivative(self):
        students, teachers = self.maps()
        detached, parameters = [s.detach() for s in students], (None, *self.parameters)
        losses, coefficients = getattr(reference, f"{self.name}_forward")(detached, teachers, *parameters)
        expected, expected_gradients = with_gradients(getattr(reference, self.name), students, teachers, *parameters)
        grad = torch.arange(1, len(students) + 1, dtype=torch.float64)
        gradients = reference.gram_backward(grad, detached, coefficients, self.centred)
        torch.testing.assert_close(losses, expected, rtol=1e-13, atol=0)
        torch.testing.assert_close(gradients, list(expected_gradients), rtol=1e-11, atol=1e-15)

    # Properties

    def test_invariant_to_the_scale_of_either_map_and_to_the_order_of_the_batch(self, backend):
        students, teachers = self.maps()
        expected = self.operation(students, teachers, {})
        scaled = self.operation([100 * s for s in students], [0.01 * t for t in teachers], {})
        torch.testing.assert_close(scaled, expected, rtol=1e-10, atol=1e-14)
        order = torch.randperm(7)
        permuted = self.operation([s[order] for s in students], [t[order] for t in teachers], {})
        torch.testing.assert_close(permuted, expected, rtol=1e-10, atol=1e-14)

    def test_invariant_to_a_shift_where_it_is_centred(self, backend):
        students, teachers = self.maps()
        expected = self.operation(students, teachers, {})
        if self.centred:
            shifted = self.operation([s - 3 for s in students], [t + 5 for t in teachers], {})
            torch.testing.assert_close(shifted, expected, rtol=1e-10, atol=1e-14)
        else:
            assert ((self.operation([s + 1 for s in students], teachers, {}) - expected).abs() > 1e-3).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_a_network_and_itself_have_zero_loss_and_gradient(self, backend, dtype):
        students = [torch.randn(shape).relu_() for shape in SHAPES]
        students[0][:, 1] = 0  # a dead channel
        students[1][3] = 0  # a dead sample
        students[2] = torch.ones(7, 19)  # equal samples
        students[3][2] = students[3][5]
        students = [s.to(dtype).requires_grad_() for s in students]
        teachers = [s.detach().clone() for s in students]
        operation = getattr(self.ops, self.name)
        known = getattr(self.ops, self.statistics_name)(teachers)
        for given in ((teachers, None), ([], known)):
            losses, gradients = with_gradients(lambda s, g=given: operation(s, *g, *self.parameters)[0], students)
            assert not losses.any()
            assert not any(gradient.any() for gradient in gradients)

    def test_a_nan_is_not_hidden(self, backend):
        students, teachers = self.maps(dtype=torch.float32)
        with torch.no_grad():
            students[0][1, 0] = torch.nan
        losses = self.operation(students, teachers, {})
        assert losses[0].isnan() and losses[1:].isfinite().all()

    def test_students_of_two_dtypes(self):
        students, teachers = self.maps(dtype=torch.float32)
        mixed = [students[0].detach().double().requires_grad_(), *students[1:]]
        losses, gradients = with_gradients(self.losses, mixed, teachers, {})
        torch.testing.assert_close(losses.float(), self.wide(students, teachers, {}))
        assert [g.dtype for g in gradients] == [torch.float64] + [torch.float32] * 4

    def test_maps_of_two_dtypes_on_every_backend(self, backend):
        self.test_maps_of_two_dtypes()

    def test_the_batch_of_every_student_is_one(self):
        (first, second, *_), teachers = self.maps()
        with pytest.raises(ValueError, match="student map 1 has a batch of 2, student map 0 one of 7"):
            self.losses([first, second[:2]], teachers[:2], {})

    # Statistics

    def test_statistics_stand_for_the_teachers_maps(self, backend):
        students, teachers = self.maps()
        known = self.statistics(teachers)
        assert known.shape == (5, 7, 7) and known.dtype == torch.float64
        expected = getattr(reference, self.statistics_name)(teachers)
        torch.testing.assert_close(known, expected, rtol=1e-12, atol=1e-14)
        expected = with_gradients(self.public, students, teachers)
        found = with_gradients(self.public, students, statistics=known)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)

    def test_statistics_have_no_gradient(self, backend):
        students, _ = self.maps(SHAPES[:1])
        assert not self.statistics(students).requires_grad
        with pytest.raises(RuntimeError, match="statistics are the teacher's, and have no gradient"):
            getattr(self.ops, self.statistics_name)(students).sum().backward()

    def test_teacher_or_statistics(self):
        students, teachers = self.maps(SHAPES[:2])
        message = rf"given; give the teacher's maps, or what {self.statistics_name}\(\)"
        with pytest.raises(ValueError, match=f"both {message}"):
            self.public(students, teachers, statistics=torch.ones(2, 7, 7))
        with pytest.raises(ValueError, match=f"neither {message}"):
            self.public(students)

    @pytest.mark.parametrize("statistics", [torch.ones(2, 7, 6), torch.ones(7, 7), torch.ones(2, 7, 7).long()])
    def test_bad_statistics(self, statistics):
        students, _ = self.maps(SHAPES[:2])
        message = rf"statistics is torch.* on cpu; expected floats \[2, 7, 7\] on cpu, as {self.statistics_name}\(\) "
        with pytest.raises(ValueError, match=f"{message}makes them"):
            self.public(students, statistics=statistics)
