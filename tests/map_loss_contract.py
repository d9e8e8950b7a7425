"""What every loss over feature maps promises. A test file of such an operation has a subclass of the contract.

`options` runs through `cases`; see tests/ops/conftest.py. Gradients are those of a sum that weighs every loss
differently, so that no two are exchanged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from helpers import assert_as_accurate, on_threads
from torch import Tensor, nn

from hyperfast.backends import Backend, use_backend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Shapes = Sequence[tuple[int, ...]]
    Call = tuple[Any, tuple[Any, ...]]

FORMATS = [torch.contiguous_format, torch.channels_last]


def with_gradients(
    function: Callable[..., Tensor], students: list[Tensor], *arguments: Any, scale: float = 1.0, **options: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Losses and gradients. float16 needs a loss scale."""
    losses = function(students, *arguments, **options)
    weights = torch.arange(1, len(losses) + 1, device=losses.device, dtype=losses.dtype)
    return losses.detach(), torch.autograd.grad((scale * losses * weights).sum(), students)


def lay(features: Tensor, layout: str) -> Tensor:
    """A view of a map `[4, 6, 8, 8]`, or of one that is a little larger or smaller, in the named memory layout."""
    if layout == "channels_last":
        return features.to(memory_format=torch.channels_last)
    if layout == "expanded":
        return features[:, :1].expand_as(features)
    if layout == "sliced":
        return features[:, ::2, 1:, ::2]
    if layout == "transposed":
        return features.transpose(0, 3)
    return features.flatten()[1 : 1 + 4 * 6 * 16].view(4, 6, 4, 4)


class MapLossContract:
    """The tests that all of them share.

    Attributes:
        public: the function of `hyperfast.functional`, whose result, or the first of them, are the losses.
        plain: (student, teacher, **options) -> losses, as the projects write it, in the dtype of the maps.
        cases: options of the public function; the first are its defaults.
        traced: those that the operation is traced and compiled with.
        shapes: of maps.
        accurate: shapes for the comparison of accuracies, if not these.
        many, laid_out, repeated, differentiated, compiled, empty: shapes; of `compiled` without the batch.
        no_second_derivative: what the error says.
        scale: of the loss, where gradients are to be accurate in float16.
        scale_of_1e4: of the loss, where float16 maps are as large as 1e4.
        close: relative and absolute tolerance of gradients in float32.
    """

    public: ClassVar[Callable[..., Any]]
    plain: ClassVar[Callable[..., Tensor]]
    cases: ClassVar[Sequence[dict[str, Any]]] = ({},)
    traced: ClassVar[dict[str, Any]] = {}
    shapes: ClassVar[Shapes]
    accurate: ClassVar[Shapes] = ()
    many: ClassVar[Shapes] = tuple((3, 3, 2 + i % 3, 2) for i in range(150))
    laid_out: ClassVar[Shapes] = ((4, 6, 8, 8), (4, 6, 8, 8))
    repeated: ClassVar[Shapes] = ((8, 33, 19, 17), (8, 64, 8, 8))
    differentiated: ClassVar[Shapes] = ((4, 3, 2, 3), (4, 2, 4))
    compiled: ClassVar[Shapes] = ((4, 6, 6), (6, 3, 3))
    empty: ClassVar[Shapes] = ((0, 4, 3, 3), (0, 6, 2, 2))
    no_second_derivative: ClassVar[str]
    scale: ClassVar[float] = 2.0**12
    scale_of_1e4: ClassVar[float] = 1.0
    close: ClassVar[tuple[float, float]] = (1.3e-6, 1e-5)

    def call(
        self, students: list[Tensor], teachers: list[Tensor], options: dict[str, Any], expected_grad: Tensor | None
    ) -> Call:
        """The registered operation, and what it takes."""
        raise NotImplementedError

    def more_calls(self, students: list[Tensor], teachers: list[Tensor], options: dict[str, Any]) -> Iterator[Call]:
        """The operations that belong to it, and what they take; the maps want no gradient."""
        raise NotImplementedError

    def teacher_shape(self, index: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        """That of the teacher's map where the student's has `shape`."""
        return shape

    def maps(
        self,
        shapes: Shapes | None = None,
        dtype: torch.dtype = torch.float64,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Students that want gradients, and teachers."""

        def make(shape: tuple[int, ...]) -> Tensor:
            features = torch.randn(shape).to(dtype)
            return features.to(memory_format=memory_format) if features.ndim == 4 else features

        shapes = self.shapes if shapes is None else shapes
        students = [make(shape).requires_grad_() for shape in shapes]
        return students, [make(self.teacher_shape(index, shape)) for index, shape in enumerate(shapes)]

    def operation(self, students: list[Tensor], teachers: list[Tensor], options: dict[str, Any]) -> Tensor:
        """The registered operation itself; the public function leaves it out on the reference backend."""
        operation, arguments = self.call(students, teachers, options, None)
        losses: Tensor = operation(*arguments)[0]
        return losses

    def losses(self, students: list[Tensor], teachers: list[Tensor], options: dict[str, Any], **more: Any) -> Tensor:
        """Those of the public function."""
        found = self.public(students, teachers, **options, **more)
        return found[0] if isinstance(found, tuple) else found

    def wide(self, students: list[Tensor], teachers: list[Tensor], options: dict[str, Any]) -> Tensor:
        """`plain`, in at least float32."""
        dtype = torch.promote_types(torch.float32, students[0].dtype)
        return self.plain([s.to(dtype) for s in students], [t.to(dtype) for t in teachers], **options)

    def assert_exact(self, students: list[Tensor], teachers: list[Tensor], options: dict[str, Any]) -> None:
        """Losses and gradients of float64 maps are those of plain autograd."""
        losses, gradients = with_gradients(self.operation, students, teachers, options)
        expected, expected_gradients = with_gradients(self.wide, students, teachers, options)
        torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-10, atol=1e-14)

    # Values

    def test_equals_plain_autograd(self, backend, options):
        self.assert_exact(*self.maps(), options)

    def test_many_maps(self, backend):
        self.assert_exact(*self.maps(self.many), self.cases[0])

    @pytest.mark.parametrize("layout", ["channels_last", "expanded", "sliced", "offset", "transposed"])
    @pytest.mark.parametrize("teacher_contiguous", [True, False])
    def test_noncontiguous_maps(self, backend, options, layout, teacher_contiguous):
        students, teachers = self.maps(self.laid_out)
        students = [lay(s, layout).detach().requires_grad_() for s in students]
        teachers = [lay(t, layout) for t in teachers]
        self.assert_exact(students, [t.contiguous() if teacher_contiguous else t for t in teachers], options)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_accuracy(self, backend, options, dtype):
        students, teachers = self.maps(self.accurate or self.shapes, dtype)
        losses, gradients = with_gradients(self.operation, students, teachers, options, scale=self.scale)
        eager, eager_gradients = with_gradients(self.wide, students, teachers, options, scale=self.scale)
        exact_students, exact_teachers = [s.detach().double().requires_grad_() for s in students], teachers
        exact, exact_gradients = with_gradients(
            self.wide, exact_students, [t.double() for t in exact_teachers], options, scale=self.scale
        )
        assert losses.dtype == torch.float32
        assert_as_accurate(losses, eager, exact, what="losses")
        for i, gradient in enumerate(gradients):
            assert gradient.dtype == dtype
            assert_as_accurate(gradient, eager_gradients[i], exact_gradients[i], what=f"gradient {i}")

    def test_public_function_and_operation_agree(self, backend, options):
        students, teachers = self.maps()
        expected = self.operation(students, teachers, options)
        torch.testing.assert_close(self.losses(students, teachers, options), expected, rtol=1e-12, atol=1e-14)

    def test_float16_values_of_1e4(self, backend, options):
        drawn = self.maps(dtype=torch.float32)
        students, teachers = ([(1e4 * x.detach().clamp(-6, 6)).half() for x in side] for side in drawn)
        students = [s.requires_grad_() for s in students]
        losses, gradients = with_gradients(self.operation, students, teachers, options, scale=self.scale_of_1e4)
        expected = self.wide([s.detach().double() for s in students], [t.double() for t in teachers], options)
        torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-9)
        assert all(gradient.isfinite().all() for gradient in gradients)

    # Properties

    def test_bitwise_repeatable(self, backend, options):
        students, teachers = self.maps(self.repeated, torch.float32)
        results = []
        for threads in (2, 2, 1):
            with on_threads(threads):
                losses, gradients = with_gradients(self.operation, students, teachers, options)
                results.append([losses, *gradients])
        if backend is Backend.REFERENCE:  # torch's own sums depend on their number
            results.pop()
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))

    def test_the_teacher_gets_no_gradient(self, backend):
        students, teachers = self.maps()
        teachers = [t.requires_grad_() for t in teachers]
        for function in (self.operation, self.losses):
            losses = function(students, teachers, self.cases[0])
            found = torch.autograd.grad(losses.sum(), [*students, *teachers], allow_unused=True)
            assert [gradient is None for gradient in found] == [False] * len(students) + [True] * len(teachers)
        assert not self.losses([s.detach() for s in students], teachers, self.cases[0]).requires_grad

    def test_an_unused_loss_changes_nothing_for_the_others(self, backend):
        students, teachers = self.maps()
        found = torch.autograd.grad(self.operation(students, teachers, self.cases[0])[1], students)
        loss = self.wide(students, teachers, self.cases[0])[1]
        expected = torch.autograd.grad(loss, students, allow_unused=True, materialize_grads=True)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)

    # Gradients

    @pytest.mark.parametrize("memory_format", FORMATS)
    def test_gradcheck(self, backend, options, memory_format):
        students, teachers = self.maps(self.differentiated, memory_format=memory_format)
        assert torch.autograd.gradcheck(lambda *s: self.operation(list(s), teachers, options), students)

    def test_second_derivative_is_a_clear_error(self, backend):
        students, teachers = self.maps()
        losses = self.operation(students, teachers, self.cases[0])
        gradients = torch.autograd.grad(losses.sum(), students, create_graph=True)
        with pytest.raises(RuntimeError, match=rf"{self.no_second_derivative}; .*use_backend\('reference'\)"):
            torch.autograd.grad(gradients[0].sum(), students[0])

    def test_second_derivative_of_the_reference(self, options):
        students, teachers = self.maps(self.differentiated)
        with use_backend("reference"):
            assert torch.autograd.gradgradcheck(lambda *s: self.losses(list(s), teachers, options), students)

    # PyTorch

    @pytest.mark.parametrize("memory_format", FORMATS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_opcheck(self, backend, memory_format, dtype):
        students, teachers = self.maps(self.shapes[:3], dtype, memory_format)
        torch.library.opcheck(*self.call(students, teachers, self.traced, None))
        for operation, arguments in self.more_calls([s.detach() for s in students], teachers, self.traced):
            torch.library.opcheck(operation, arguments)

    @pytest.mark.parametrize("sliced", [False, True])
    def test_compiles_to_one_graph_with_dynamic_shapes(self, backend, sliced):
        torch.compiler.reset()
        compiled = torch.compile(
            lambda students, teachers: self.losses(students, teachers, self.traced),
            fullgraph=True,
            dynamic=True,
            backend="aot_eager",
        )
        for batch in (3, 5):
            students, teachers = self.maps([(batch, *shape) for shape in self.compiled], torch.float32)
            if sliced:
                students, teachers = [s[:, ::2] for s in students], [t[:, ::2] for t in teachers]
            losses, gradients = with_gradients(compiled, students, teachers)
            expected, expected_gradients = with_gradients(self.wide, students, teachers, self.traced)
            torch.testing.assert_close(losses, expected)
            rtol, atol = self.close
            torch.testing.assert_close(gradients, expected_gradients, rtol=rtol, atol=atol)

    def test_autocast(self, backend):
        layer, images, teacher = nn.Conv2d(3, 8, 3), torch.randn(4, 3, 9, 9), torch.randn(4, 8, 7, 7).bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = layer(images)
            losses = self.losses([features], [teacher], self.cases[0])
        losses.sum().backward()
        assert features.dtype == torch.bfloat16
        assert losses.dtype == torch.float32
        assert layer.weight.grad.dtype == torch.float32
        torch.testing.assert_close(losses.detach(), self.wide([features.detach()], [teacher], self.cases[0]))

    def test_maps_of_two_dtypes(self):
        students, teachers = self.maps(dtype=torch.float32)
        narrow = [t.bfloat16() for t in teachers]
        torch.testing.assert_close(
            self.losses(students, narrow, self.cases[0]), self.wide(students, narrow, self.cases[0])
        )

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_meta(self, backend, dtype):
        students, teachers = self.maps(dtype=dtype)
        students = [s.detach().to("meta").requires_grad_() for s in students]
        losses, gradients = with_gradients(self.operation, students, [t.to("meta") for t in teachers], self.cases[0])
        assert losses.is_meta
        assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        found = [(g.shape, g.dtype, g.stride()) for g in gradients]
        assert found == [(s.shape, s.dtype, s.stride()) for s in students]

    @pytest.mark.parametrize("name", ["auto", "reference"])
    def test_empty_batch(self, name):
        with use_backend(name):
            students, teachers = self.maps(self.empty)
            losses, gradients = with_gradients(self.operation, students, teachers, self.cases[0])
            torch.testing.assert_close(self.losses(students, teachers, self.cases[0]), losses)
        assert len(losses) and not losses.any()
        assert [gradient.shape for gradient in gradients] == [s.shape for s in students]

    # Bad input

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s, t: (s, t[:1]), "2 student maps but 1 teacher maps"),
            (lambda s, t: ([], []), "no feature maps were given"),
            (lambda s, t: (s, [t[0], t[1][:1]]), r"teacher map 1 has a batch of 1, student map \d one of \d; .* same"),
            (lambda s, t: ([s[0][:, 0].flatten(), s[1]], t), r"student map 0 is torch.float64 \[\d+\]; expected"),
            (lambda s, t: (s, [t[0].long(), t[1]]), "teacher map 0 is torch.int64"),
            (lambda s, t: (s, [t[0].to("meta"), t[1]]), "student map 0 on cpu, teacher map 0 on meta"),
        ],
    )
    def test_bad_maps(self, change, message):
        students, teachers = change(*self.maps(self.shapes[:2]))
        with pytest.raises(ValueError, match=message):
            self.losses(students, teachers, self.cases[0])


class AheadContract(MapLossContract):
    """The gradient computed ahead, in the forward pass, by the losses that take `expected_grad`.

    Attributes:
        backward: where the backward operation stands: an object, and the attribute's name.
        each: what there is a loss for.
        late: how far the gradients may be from those of a backward pass, relatively.
        late_narrow: the same in float32 and in narrower dtypes.
    """

    backward: ClassVar[tuple[Any, str]]
    each: ClassVar[str] = "tap"
    late: ClassVar[float] = 0.0
    late_narrow: ClassVar[tuple[float, float]] = (0.0, 0.0)

    def ahead(self, students: list[Tensor], teachers: list[Tensor], options: dict[str, Any]) -> Tensor:
        """Losses that expect the gradient of their sum."""
        count = len(self.losses(students, teachers, options))
        return self.losses(students, teachers, options, expected_grad=torch.ones(count))

    @pytest.fixture
    def backward_runs(self, monkeypatch):
        """How often the backward operation ran."""
        runs: list[int] = []
        run = getattr(*self.backward)
        monkeypatch.setattr(*self.backward, lambda *a: runs.append(1) or run(*a))
        return runs

    @pytest.mark.parametrize("memory_format", FORMATS)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_a_gradient_computed_ahead_is_the_gradient(self, backward_runs, options, dtype, memory_format):
        students, teachers = self.maps(dtype=dtype, memory_format=memory_format)
        late_losses = self.losses(students, teachers, options)
        weights = torch.tensor([1.0, 0.0, 0.3, 1e3, 2.0, 0.1])[: len(late_losses)]
        losses = self.losses(students, teachers, options, expected_grad=weights)
        gradients = torch.autograd.grad((losses * weights).sum(), students)
        assert not backward_runs
        late = torch.autograd.grad((late_losses * weights).sum(), students)
        assert torch.equal(losses, late_losses)
        exact = dict(zip([torch.float32, torch.bfloat16], self.late_narrow, strict=True)).get(dtype, self.late)
        torch.testing.assert_close(gradients, late, rtol=exact, atol=0)
        assert [g.stride() for g in gradients] == [torch.empty_like(s).stride() for s in students]

    def test_an_unexpected_gradient_is_right_too(self, backward_runs, options):
        students, teachers = self.maps()
        gradients = torch.autograd.grad(3 * self.ahead(students, teachers, options).sum(), students)
        assert backward_runs
        late = torch.autograd.grad(3 * self.losses(students, teachers, options).sum(), students)
        torch.testing.assert_close(gradients, late, rtol=1e-14, atol=0)

    def test_weights_that_change_before_the_backward_pass(self):
        students, teachers = self.maps()
        late = self.losses(students, teachers, self.cases[0])
        weights = torch.ones(len(late))
        loss = self.losses(students, teachers, self.cases[0], expected_grad=weights).sum()
        weights.zero_()
        expected = torch.autograd.grad(late.sum(), students)
        torch.testing.assert_close(torch.autograd.grad(loss, students), expected, rtol=self.late, atol=0)

    def test_two_backward_passes_do_not_share_memory_that_either_changes(self):
        students, teachers = self.maps()
        loss = self.ahead(students, teachers, self.cases[0]).sum()
        for _ in range(2):
            loss.backward(retain_graph=True)
        once = torch.autograd.grad(loss, students)
        torch.testing.assert_close([s.grad for s in students], [2 * g for g in once], rtol=0, atol=0)

    def test_second_derivative_of_a_gradient_computed_ahead_is_a_clear_error(self):
        students, teachers = self.maps()
        losses = self.ahead(students, teachers, self.cases[0])
        gradients = torch.autograd.grad(losses.sum(), students, create_graph=True)
        with pytest.raises(RuntimeError, match="no fused second derivative"):
            torch.autograd.grad(gradients[0].sum(), students[0])

    def test_an_expectation_of_another_length(self):
        students, teachers = self.maps()
        count = len(self.losses(students, teachers, self.cases[0]))
        message = rf"expected_grad is \[{count + 1}\]; expected \[{count}\], one per {self.each}"
        with pytest.raises(ValueError, match=message):
            self.losses(students, teachers, self.cases[0], expected_grad=torch.ones(count + 1))

    def test_opcheck_with_an_expectation(self):
        students, teachers = self.maps(self.shapes[:3], torch.float32)
        count = len(self.losses(students, teachers, self.traced))
        torch.library.opcheck(*self.call(students, teachers, self.traced, torch.ones(count)))
