"""What every operation over pairs of maps promises. A test file of such an operation has a subclass of the contract.

`options` runs through `cases`; see tests/ops/conftest.py. Gradients are those of a sum that weighs every tap
differently, so that no two are exchanged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from helpers import assert_as_accurate
from torch import Tensor, nn

from hyperfast.backends import use_backend

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hyperfast.ops._paired import PairedLoss

# One to three spatial axes, none; sizes that fill no vector, and one of several work items.
SHAPES = [(3, 5, 6, 7), (3, 8, 4, 4), (3, 4, 9), (3, 70, 2, 3, 3), (3, 33), (3, 13, 33, 29)]
FORMATS = [torch.contiguous_format, torch.channels_last]


def maps(
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    dtype: torch.dtype = torch.float64,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> tuple[list[Tensor], list[Tensor]]:
    """Students that want gradients, and teachers."""

    def make(shape: tuple[int, ...]) -> Tensor:
        features = torch.randn(shape).to(dtype)
        return features.to(memory_format=memory_format) if features.ndim == 4 else features

    return [make(shape).requires_grad_() for shape in shapes], [make(shape) for shape in shapes]


def with_gradients(
    function: Callable[..., Tensor], students: list[Tensor], *arguments: Any, scale: float = 1.0
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Losses and gradients. float16 needs a loss scale."""
    losses = function(students, *arguments)
    weights = torch.arange(1, len(losses) + 1, device=losses.device, dtype=losses.dtype)
    return losses.detach(), torch.autograd.grad((scale * losses * weights).sum(), students)


class PairedContract:
    """The tests that all operations share.

    Attributes:
        loss: the operation.
        public: the function of `hyperfast.functional`, whose first result are the losses.
        plain: (student, teacher, **options) -> losses, as the projects write it, in the dtype of the maps.
        cases: options of the public function.
        arguments: what the operation takes for the options of a case.
        shapes: of maps.
        zero_for_equal_maps: whether a map compared with itself has loss and gradient 0.
    """

    loss: ClassVar[PairedLoss]
    public: ClassVar[Callable[..., Any]]
    plain: ClassVar[Callable[..., Tensor]]
    cases: ClassVar[Sequence[dict[str, Any]]]
    arguments: ClassVar[Callable[..., tuple[Any, ...]]]
    shapes: ClassVar[list[tuple[int, ...]]] = SHAPES
    zero_for_equal_maps: ClassVar[bool] = True

    def operation(self, students: list[Tensor], teachers: list[Tensor], options: dict[str, Any]) -> Tensor:
        """The registered operation itself; the public function leaves it out on the reference backend."""
        losses: Tensor = self.loss.forward(students, teachers, *self.arguments(**options), None)[0]
        return losses

    def losses(self, students: list[Tensor], teachers: list[Tensor], options: dict[str, Any], **more: Any) -> Tensor:
        """Those of the public function."""
        found = self.public(students, teachers, **options, **more)
        return found[0] if isinstance(found, tuple) else found

    def wide(self, students: list[Tensor], teachers: list[Tensor], options: dict[str, Any]) -> Tensor:
        """`plain`, in at least float32."""
        dtype = torch.promote_types(torch.float32, students[0].dtype)
        return self.plain([s.to(dtype) for s in students], [t.to(dtype) for t in teachers], **options)

    def test_equals_plain_autograd(self, backend, options):
        students, teachers = maps(self.shapes)
        losses, gradients = with_gradients(self.operation, students, teachers, options)
        expected, expected_gradients = with_gradients(self.wide, students, teachers, options)
        torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-10, atol=1e-14)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_accuracy(self, backend, options, dtype):
        students, teachers = maps(self.shapes, dtype)
        scale = 2.0**10
        losses, gradients = with_gradients(self.operation, students, teachers, options, scale=scale)
        eager, eager_gradients = with_gradients(self.wide, students, teachers, options, scale=scale)
        exact_students, exact_teachers = [s.detach().double().requires_grad_() for s in students], teachers
        exact, exact_gradients = with_gradients(
            self.plain_of(options), exact_students, [t.double() for t in exact_teachers], scale=scale
        )
        assert losses.dtype == torch.float32
        assert_as_accurate(losses, eager, exact, what="losses")
        for i, gradient in enumerate(gradients):
            assert gradient.dtype == dtype
            assert_as_accurate(gradient, eager_gradients[i], exact_gradients[i], what=f"gradient {i}")

    def plain_of(self, options: dict[str, Any]) -> Callable[..., Tensor]:
        """`plain` with the options of a case."""
        return lambda students, teachers: self.plain(students, teachers, **options)

    def test_public_function_and_operation_agree(self, backend, options):
        students, teachers = maps(self.shapes)
        expected = self.operation(students, teachers, options)
        torch.testing.assert_close(self.losses(students, teachers, options), expected, rtol=1e-12, atol=1e-14)

    def test_many_taps(self, backend):
        students, teachers = maps([(2, 3, 2 + i % 3, 2) for i in range(150)])
        losses, gradients = with_gradients(self.operation, students, teachers, self.cases[0])
        expected, expected_gradients = with_gradients(self.wide, students, teachers, self.cases[0])
        torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-10, atol=1e-14)

    def test_one_sample(self, backend, options):
        students, teachers = maps([(1, 3, 5, 5), (1, 2, 1, 1)])
        losses, gradients = with_gradients(self.operation, students, teachers, options)
        expected, expected_gradients = with_gradients(self.wide, students, teachers, options)
        torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-10, atol=1e-14)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_equal_maps_have_zero_loss_and_gradient(self, backend, options, dtype):
        if not self.zero_for_equal_maps:
            pytest.skip("a margin is wanted between them")
        students, _ = maps(self.shapes, dtype)
        losses, gradients = with_gradients(self.operation, students, [s.detach() for s in students], options)
        assert not losses.any()
        assert not any(gradient.any() for gradient in gradients)

    def test_zero_maps_and_dead_channels_are_finite(self, backend, options):
        students, teachers = maps(self.shapes, torch.float32)
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

    def test_float16_values_of_1e4(self, backend, options):
        drawn = maps(self.shapes, torch.float32)
        students, teachers = ([(1e4 * x.detach().clamp(-6, 6)).half() for x in side] for side in drawn)
        students = [s.requires_grad_() for s in students]
        losses, gradients = with_gradients(self.operation, students, teachers, options, scale=2.0**-8)
        expected = self.plain([s.detach().double() for s in students], [t.double() for t in teachers], **options)
        torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-9)
        assert all(gradient.isfinite().all() for gradient in gradients)

    def test_bitwise_repeatable(self, backend, options):
        students, teachers = maps([(8, 33, 19, 17), (8, 64, 8, 8)], torch.float32)
        first, first_gradients = with_gradients(self.operation, students, teachers, options)
        second, second_gradients = with_gradients(self.operation, students, teachers, options)
        assert torch.equal(first, second)
        assert all(map(torch.equal, first_gradients, second_gradients))

    def test_the_teacher_gets_no_gradient(self, backend):
        students, teachers = maps(self.shapes)
        losses = self.operation(students, [t.requires_grad_() for t in teachers], self.cases[0])
        found = torch.autograd.grad(losses.sum(), [*students, *teachers], allow_unused=True)
        assert [gradient is None for gradient in found] == [False] * len(students) + [True] * len(teachers)
        assert not self.losses([s.detach() for s in students], teachers, self.cases[0]).requires_grad

    def test_an_unused_tap_changes_nothing_for_the_others(self, backend):
        students, teachers = maps(self.shapes)
        losses = self.operation(students, teachers, self.cases[0])
        (gradient,) = torch.autograd.grad(losses[1], students[1])
        (expected,) = torch.autograd.grad(self.wide(students, teachers, self.cases[0])[1], students[1])
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)

    @pytest.mark.parametrize("layout", ["channels_last", "expanded", "sliced", "offset", "transposed"])
    @pytest.mark.parametrize("teacher_contiguous", [True, False])
    def test_noncontiguous_maps(self, backend, options, layout, teacher_contiguous):
        def lay(features):
            if layout == "channels_last":
                return features.to(memory_format=torch.channels_last)
            if layout == "expanded":
                return features[:, :1].expand_as(features)
            if layout == "sliced":
                return features[:, ::2, 1:, ::2]
            if layout == "transposed":
                return features.transpose(0, 2)
            return features.flatten()[1 : 1 + 2 * 6 * 16].view(2, 6, 4, 4)

        base, other = torch.randn(2, 6, 8, 8, dtype=torch.float64), torch.randn(2, 6, 8, 8, dtype=torch.float64)
        student, teacher = lay(base).detach().requires_grad_(), lay(other)
        teacher = teacher.contiguous() if teacher_contiguous else teacher
        losses, gradients = with_gradients(self.operation, [student], [teacher], options)
        expected, expected_gradients = with_gradients(self.wide, [student], [teacher], options)
        torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-10, atol=1e-14)

    @pytest.mark.parametrize("memory_format", FORMATS)
    def test_gradcheck(self, backend, options, memory_format):
        students, teachers = maps([(2, 3, 2, 3), (2, 2, 4)], memory_format=memory_format)
        assert torch.autograd.gradcheck(lambda *s: self.operation(list(s), teachers, options), students)

    def test_second_derivative_is_a_clear_error(self, backend):
        students, teachers = maps(self.shapes)
        losses = self.operation(students, teachers, self.cases[0])
        gradients = torch.autograd.grad(losses.sum(), students, create_graph=True)
        with pytest.raises(RuntimeError, match=rf"{self.loss.name} has no fused second derivative.*'reference'\)"):
            torch.autograd.grad(gradients[0].sum(), students[0])

    def test_second_derivative_of_the_reference(self, options):
        students, teachers = maps([(2, 3, 2, 3)])
        with use_backend("reference"):
            assert torch.autograd.gradgradcheck(lambda s: self.losses([s], teachers, options), students)

    # The gradient computed ahead

    @pytest.fixture
    def backward_runs(self, monkeypatch):
        """How often the backward operation ran."""
        runs: list[int] = []
        run = self.loss.backward
        monkeypatch.setattr(self.loss, "backward", lambda *a: runs.append(1) or run(*a))
        return runs

    @pytest.mark.parametrize("memory_format", FORMATS)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_a_gradient_computed_ahead_is_the_gradient(self, backward_runs, options, dtype, memory_format):
        students, teachers = maps(self.shapes, dtype, memory_format)
        weights = torch.tensor([1.0, 0.0, 0.3, 2.0, 1e3, 0.1])
        losses = self.losses(students, teachers, options, expected_grad=weights)
        gradients = torch.autograd.grad((losses * weights).sum(), students)
        assert not backward_runs
        late_losses = self.losses(students, teachers, options)
        late = torch.autograd.grad((late_losses * weights).sum(), students)
        assert torch.equal(losses, late_losses)
        exact = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
        torch.testing.assert_close(gradients, late, rtol=exact, atol=0)
        assert [g.stride() for g in gradients] == [torch.empty_like(s).stride() for s in students]

    def test_an_unexpected_gradient_is_right_too(self, backward_runs, options):
        students, teachers = maps(self.shapes)
        losses = self.losses(students, teachers, options, expected_grad=torch.ones(len(students)))
        gradients = torch.autograd.grad(3 * losses.sum(), students)
        assert backward_runs
        late = torch.autograd.grad(3 * self.losses(students, teachers, options).sum(), students)
        torch.testing.assert_close(gradients, late, rtol=1e-14, atol=0)

    def test_weights_that_change_before_the_backward_pass(self):
        students, teachers = maps(self.shapes)
        weights = torch.ones(len(students))
        loss = self.losses(students, teachers, self.cases[0], expected_grad=weights).sum()
        weights.zero_()
        expected = torch.autograd.grad(self.losses(students, teachers, self.cases[0]).sum(), students)
        torch.testing.assert_close(torch.autograd.grad(loss, students), expected, rtol=1e-14, atol=0)

    def test_second_derivative_of_a_gradient_computed_ahead_is_a_clear_error(self):
        students, teachers = maps(self.shapes)
        losses = self.losses(students, teachers, self.cases[0], expected_grad=torch.ones(len(students)))
        gradients = torch.autograd.grad(losses.sum(), students, create_graph=True)
        with pytest.raises(RuntimeError, match="no fused second derivative"):
            torch.autograd.grad(gradients[0].sum(), students[0])

    def test_an_expectation_of_another_length(self):
        students, teachers = maps(self.shapes)
        with pytest.raises(ValueError, match=r"expected_grad is \[2\]; expected \[6\], one per tap"):
            self.losses(students, teachers, self.cases[0], expected_grad=torch.ones(2))

    # PyTorch

    @pytest.mark.parametrize("memory_format", FORMATS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_opcheck(self, backend, memory_format, dtype):
        students, teachers = maps(self.shapes[:3], dtype, memory_format)
        arguments = self.arguments(**self.cases[-1])
        torch.library.opcheck(self.loss.forward, (students, teachers, *arguments, None))
        detached = [s.detach() for s in students]
        torch.library.opcheck(self.loss.backward, (torch.ones(3), detached, teachers, *arguments))

    def test_opcheck_with_an_expectation(self):
        students, teachers = maps(self.shapes[:3], torch.float32)
        torch.library.opcheck(self.loss.forward, (students, teachers, *self.arguments(**self.cases[-1]), torch.ones(3)))

    @pytest.mark.parametrize("sliced", [False, True])
    def test_compiles_to_one_graph_with_dynamic_shapes(self, backend, sliced):
        torch.compiler.reset()
        compiled = torch.compile(
            lambda students, teachers: self.losses(students, teachers, self.cases[-1]),
            fullgraph=True,
            dynamic=True,
            backend="aot_eager",
        )
        for batch in (2, 5):
            students, teachers = maps([(batch, 4, 6, 6), (batch, 6, 3, 3)], torch.float32)
            if sliced:
                students, teachers = [s[:, ::2] for s in students], [t[:, ::2] for t in teachers]
            losses, gradients = with_gradients(compiled, students, teachers)
            expected, expected_gradients = with_gradients(self.wide, students, teachers, self.cases[-1])
            torch.testing.assert_close(losses, expected)
            torch.testing.assert_close(gradients, expected_gradients)

    def test_autocast(self, backend):
        layer, images, teacher = nn.Conv2d(3, 8, 3), torch.randn(2, 3, 9, 9), torch.randn(2, 8, 7, 7).bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = layer(images)
            losses = self.losses([features], [teacher], self.cases[0])
        losses.sum().backward()
        assert features.dtype == torch.bfloat16
        assert losses.dtype == torch.float32
        assert layer.weight.grad.dtype == torch.float32
        torch.testing.assert_close(losses.detach(), self.wide([features.detach()], [teacher], self.cases[0]))

    def test_maps_of_two_dtypes(self):
        students, teachers = maps(self.shapes, torch.float32)
        narrow = [t.bfloat16() for t in teachers]
        torch.testing.assert_close(
            self.losses(students, narrow, self.cases[0]), self.wide(students, narrow, self.cases[0])
        )

    def test_taps_of_two_dtypes(self):
        (a, b), teachers = maps(self.shapes[:2], torch.float32)
        students = [a, b.detach().double().requires_grad_()]
        losses, gradients = with_gradients(self.operation, students, teachers, self.cases[0])
        assert losses.dtype == torch.float64
        assert [gradient.dtype for gradient in gradients] == [torch.float32, torch.float64]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_meta(self, backend, dtype):
        students, teachers = maps(self.shapes, dtype)
        students = [s.detach().to("meta").requires_grad_() for s in students]
        losses, gradients = with_gradients(self.operation, students, [t.to("meta") for t in teachers], self.cases[0])
        assert losses.is_meta
        assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        found = [(g.shape, g.dtype, g.stride()) for g in gradients]
        assert found == [(s.shape, s.dtype, s.stride()) for s in students]

    @pytest.mark.parametrize("name", ["auto", "reference"])
    @pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 0, 3, 3)])
    def test_empty_maps(self, name, options, shape):
        with use_backend(name):
            students, teachers = maps([shape, (3, 2, 2)])
            losses, gradients = with_gradients(self.operation, students, teachers, options)
            torch.testing.assert_close(self.losses(students, teachers, options), losses)
        assert losses[0] == 0
        assert losses[1] > 0
        assert [gradient.shape for gradient in gradients] == [s.shape for s in students]

    # Bad input

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s, t: (s, t[:1]), "2 student maps but 1 teacher maps"),
            (lambda s, t: ([], []), "no feature maps were given"),
            (lambda s, t: (s, [t[0], t[1][:1]]), "tap 1: student batch 3, teacher batch 1; .* on the same images"),
            (
                lambda s, t: ([s[0].flatten(), s[1]], t),
                r"student map 0 is torch.float64 \[630\]; expected floats \[B, ",
            ),
            (lambda s, t: (s, [t[0].long(), t[1]]), "teacher map 0 is torch.int64"),
            (lambda s, t: (s, [t[0].to("meta"), t[1]]), "student map 0 on cpu, teacher map 0 on meta"),
            (lambda s, t: ([s[0][:, :2], s[1]], t), r"tap 0: student map \[3, 2, 6, 7\], teacher map \[3, 5, 6, 7\]; "),
        ],
    )
    def test_bad_maps(self, change, message):
        students, teachers = change(*maps(SHAPES[:2]))
        with pytest.raises(ValueError, match=message):
            self.losses(students, teachers, self.cases[0])
