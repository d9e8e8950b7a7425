"""What the losses that compare two maps of one shape, element by element, promise on top of the other losses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from map_loss_contract import AheadContract, with_gradients
from torch import Tensor

from hyperfast.backends import use_backend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from map_loss_contract import Call

    from hyperfast.ops._paired import PairedLoss

# One to three spatial axes, none; sizes that fill no vector, and one of several work items.
SHAPES = [(3, 5, 6, 7), (3, 8, 4, 4), (3, 4, 9), (3, 70, 2, 3, 3), (3, 33), (3, 13, 33, 29)]


class PairedContract(AheadContract):
    """The tests that all of them share.

    Attributes:
        loss: the operation.
        arguments: what the operation takes for the options of a case.
        zero_for_equal_maps: whether a map compared with itself has loss and gradient 0.
    """

    loss: ClassVar[PairedLoss]
    arguments: ClassVar[Callable[..., tuple[Any, ...]]]
    zero_for_equal_maps: ClassVar[bool] = True
    shapes = SHAPES
    scale, scale_of_1e4 = 2.0**10, 2.0**-8
    late, late_narrow = 1e-14, (1e-6, 1e-2)

    def __init_subclass__(cls) -> None:
        cls.traced = cls.cases[-1]
        cls.backward = (cls.loss, "backward")
        cls.no_second_derivative = f"{cls.loss.name} has no fused second derivative"

    def call(
        self, students: list[Tensor], teachers: list[Tensor], options: dict[str, Any], expected_grad: Tensor | None
    ) -> Call:
        return self.loss.forward, (students, teachers, *self.arguments(**options), expected_grad)

    def more_calls(self, students: list[Tensor], teachers: list[Tensor], options: dict[str, Any]) -> Iterator[Call]:
        yield self.loss.backward, (torch.ones(len(students)), students, teachers, *self.arguments(**options))

    def test_one_sample(self, backend, options):
        self.assert_exact(*self.maps([(1, 3, 5, 5), (1, 2, 1, 1)]), options)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_equal_maps_have_zero_loss_and_gradient(self, backend, options, dtype):
        if not self.zero_for_equal_maps:
            pytest.skip("a margin is wanted between them")
        students, _ = self.maps(dtype=dtype)
        losses, gradients = with_gradients(self.operation, students, [s.detach() for s in students], options)
        assert not losses.any()
        assert not any(gradient.any() for gradient in gradients)

    def test_zero_maps_and_dead_channels_are_finite(self, backend, options):
        students, teachers = self.maps(dtype=torch.float32)
        with torch.no_grad():
            for s, t in zip(students, teachers, strict=True):
                s[0], t[1] = 0, 0
                s[:, 0], t[:, 1] = 0, 0
            students[1].zero_()
            teachers[2].zero_()
        losses, gradients = with_gradients(self.operation, students, teachers, options)
        expected, expected_gradients = with_gradients(self.wide, students, teachers, options)
        assert losses.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients)
        torch.testing.assert_close(losses, expected)
        torch.testing.assert_close(gradients, expected_gradients)

    def test_taps_of_two_dtypes(self):
        (a, b), teachers = self.maps(self.shapes[:2], torch.float32)
        students = [a, b.detach().double().requires_grad_()]
        losses, gradients = with_gradients(self.operation, students, teachers, self.cases[0])
        assert losses.dtype == torch.float64
        assert [gradient.dtype for gradient in gradients] == [torch.float32, torch.float64]

    @pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 0, 3, 3)])
    @pytest.mark.parametrize("name", ["auto", "reference"])
    def test_an_empty_map_beside_another(self, name, options, shape):
        with use_backend(name):
            students, teachers = self.maps([shape, (3, 2, 2)])
            losses, gradients = with_gradients(self.operation, students, teachers, options)
            torch.testing.assert_close(self.losses(students, teachers, options), losses)
        assert losses[0] == 0
        assert losses[1] > 0
        assert [gradient.shape for gradient in gradients] == [s.shape for s in students]

    def test_maps_of_two_shapes(self):
        (s, *_), (t, *_) = self.maps()
        with pytest.raises(ValueError, match=r"tap 0: student map \[3, 2, 6, 7\], teacher map \[3, \d+, 6, 7\]; "):
            self.losses([s[:, :2]], [t], self.cases[0])


def maps(
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    dtype: torch.dtype = torch.float64,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> tuple[list[Tensor], list[Tensor]]:
    """Students that want gradients, and teachers."""
    return PairedContract().maps(shapes, dtype, memory_format)
