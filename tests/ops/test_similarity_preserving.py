"""The contract of `hyperfast::similarity_preserving`, on every backend."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_accurate, golden
from torch import nn

from hyperfast import functional, reference
from hyperfast.backends import use_backend
from hyperfast.ops._gram import gram_backward
from hyperfast.ops.similarity_preserving import (
    forward_implementations,
    similarity_preserving,
    similarity_statistics,
)

DISPATCHER = forward_implementations
# Sizes that fill no vector, no block of rows, more than one panel and more than one piece.
SHAPES = [(7, 5, 6, 7), (7, 8, 4, 4), (7, 19), (7, 3, 2, 3, 3), (7, 70, 61, 1)]


def maps(shapes=SHAPES, dtype=torch.float64, memory_format=torch.contiguous_format):
    """Students that want gradients, and teachers with one channel more in the second tap."""

    def make(index, shape, extra):
        batch, channels, *spatial = shape
        features = torch.randn(batch, channels + (extra if index == 1 else 0), *spatial).to(dtype)
        return features.to(memory_format=memory_format) if features.ndim == 4 else features

    students = [make(i, shape, 0).requires_grad_() for i, shape in enumerate(shapes)]
    return students, [make(i, shape, 1) for i, shape in enumerate(shapes)]


def operation(students, teachers, statistics=None):
    """The registered operation itself; the public function leaves it out on the reference backend."""
    return similarity_preserving(students, teachers, statistics)[0]


def plain(students, teachers):
    """As the projects write it, in at least float32."""
    losses = []
    for s, t in zip(students, teachers, strict=True):
        rows = [x.to(torch.promote_types(x.dtype, torch.float32)).flatten(1) for x in (s, t)]
        own, other = (F.normalize(x @ x.t(), dim=1) for x in rows)
        losses.append((other - own).square().sum() / len(s) ** 2)
    return torch.stack(losses)


def with_gradients(function, students, *arguments, scale=1.0):
    """Losses and the gradients of a sum that weighs every tap differently. float16 needs a loss scale."""
    losses = function(students, *arguments)
    weights = torch.arange(1, len(losses) + 1, device=losses.device, dtype=losses.dtype)
    return losses.detach(), torch.autograd.grad((scale * losses * weights).sum(), students)


# Values


def test_golden(backend):
    values = golden()
    students = [values[f"in.s{i}"].requires_grad_() for i in range(3)]
    losses = functional.similarity_preserving(students, [values[f"in.t{i}"] for i in range(3)])
    gradients = torch.autograd.grad(losses.sum(), students)
    torch.testing.assert_close(losses.sum().detach(), values["sp_rep.loss"], rtol=1e-12, atol=1e-12)
    for i, gradient in enumerate(gradients):
        torch.testing.assert_close(gradient, values[f"sp_rep.grad{i}"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [2, 7, 16, 35, 130])
def test_equals_plain_autograd(backend, batch):
    students, teachers = maps([(batch, *shape[1:]) for shape in SHAPES])
    losses, gradients = with_gradients(operation, students, teachers)
    expected, expected_gradients = with_gradients(plain, students, teachers)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accuracy(backend, dtype):
    students, teachers = maps([*SHAPES[:3], (7, 33, 17, 19)], dtype)
    scale = 2.0**12
    losses, gradients = with_gradients(operation, students, teachers, scale=scale)
    eager, eager_gradients = with_gradients(plain, students, teachers, scale=scale)
    exact_students = [s.detach().double().requires_grad_() for s in students]
    exact, exact_gradients = with_gradients(plain, exact_students, [t.double() for t in teachers], scale=scale)
    assert losses.dtype == torch.float32
    assert_as_accurate(losses, eager, exact, what="losses")
    for i, gradient in enumerate(gradients):
        assert gradient.dtype == dtype
        assert_as_accurate(gradient, eager_gradients[i], exact_gradients[i], what=f"gradient {i}")


def test_public_function_and_operation_agree(backend):
    students, teachers = maps()
    losses = functional.similarity_preserving(students, teachers)
    torch.testing.assert_close(losses, operation(students, teachers), rtol=1e-12, atol=1e-14)


def test_closed_form_of_the_reference_is_its_derivative():
    students, teachers = maps()
    losses, coefficients = reference.similarity_preserving_forward([s.detach() for s in students], teachers)
    expected, expected_gradients = with_gradients(reference.similarity_preserving, students, teachers)
    grad = torch.arange(1, len(students) + 1, dtype=torch.float64)
    gradients = reference.gram_backward(grad, [s.detach() for s in students], coefficients, False)
    torch.testing.assert_close(losses, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradients, list(expected_gradients), rtol=1e-11, atol=1e-15)


def test_statistics_stand_for_the_teachers_maps(backend):
    students, teachers = maps()
    statistics = functional.similarity_statistics(teachers)
    assert statistics.shape == (5, 7, 7) and statistics.dtype == torch.float64
    torch.testing.assert_close(statistics, reference.similarity_statistics(teachers), rtol=1e-12, atol=1e-14)
    expected = with_gradients(functional.similarity_preserving, students, teachers)
    found = with_gradients(lambda s: functional.similarity_preserving(s, statistics=statistics), students)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


def test_many_taps(backend):
    students, teachers = maps([(3, 3, 2 + i % 3, 2) for i in range(150)])
    losses, gradients = with_gradients(operation, students, teachers)
    expected, expected_gradients = with_gradients(plain, students, teachers)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-10, atol=1e-14)


# Properties


def test_invariant_to_the_scale_of_either_map_and_to_the_order_of_the_batch(backend):
    students, teachers = maps()
    expected = operation(students, teachers)
    scaled = operation([100 * s for s in students], [0.01 * t for t in teachers])
    torch.testing.assert_close(scaled, expected, rtol=1e-10, atol=1e-14)
    order = torch.randperm(7)
    permuted = operation([s[order] for s in students], [t[order] for t in teachers])
    torch.testing.assert_close(permuted, expected, rtol=1e-10, atol=1e-14)


def test_not_invariant_to_a_shift(backend):
    students, teachers = maps()
    shifted = operation([s + 1 for s in students], teachers)
    assert ((shifted - operation(students, teachers)).abs() > 1e-3).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_network_and_itself_have_zero_loss_and_gradient(backend, dtype):
    students = [torch.randn(shape).relu_() for shape in SHAPES]
    students[0][:, 1] = 0  # a dead channel
    students[1][3] = 0  # a dead sample
    students[2] = torch.ones(7, 19)  # equal samples
    students[3][2] = students[3][5]
    students = [s.to(dtype).requires_grad_() for s in students]
    teachers = [s.detach().clone() for s in students]
    for given in ((teachers,), ([], similarity_statistics(teachers))):
        losses, gradients = with_gradients(operation, students, *given)
        assert not losses.any()
        assert not any(gradient.any() for gradient in gradients)


def test_dead_samples_have_finite_gradients(backend):
    students, teachers = maps(dtype=torch.float32)
    with torch.no_grad():
        for s, t in zip(students, teachers, strict=True):
            s[0] = 0
            t[1] = 0
    losses, gradients = with_gradients(operation, students, teachers)
    assert losses.isfinite().all()
    for gradient in gradients:
        assert gradient.isfinite().all() and gradient.abs().max() < 1
        assert gradient[2].any()
    with use_backend("reference"):
        _, expected = with_gradients(functional.similarity_preserving, students, teachers)
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-6)


def test_float16_values_of_1e4(backend):
    students, teachers = maps(dtype=torch.float32)
    students = [(1e4 * s.detach().clamp(-6, 6)).half().requires_grad_() for s in students]
    teachers = [(1e4 * t.clamp(-6, 6)).half() for t in teachers]
    losses, gradients = with_gradients(operation, students, teachers)
    expected = plain([s.detach().double() for s in students], [t.double() for t in teachers])
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-9)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_nan_is_not_hidden(backend):
    students, teachers = maps(dtype=torch.float32)
    with torch.no_grad():
        students[0][1, 0] = torch.nan
    losses = operation(students, teachers)
    assert losses[0].isnan() and losses[1:].isfinite().all()


def test_bitwise_repeatable(backend):
    students, teachers = maps([(8, 33, 19, 17), (8, 64, 8, 8)], torch.float32)
    first, first_gradients = with_gradients(operation, students, teachers)
    second, second_gradients = with_gradients(operation, students, teachers)
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(first_gradients, second_gradients, strict=True))


def test_the_teacher_gets_no_gradient(backend):
    students, teachers = maps()
    losses = functional.similarity_preserving(students, [t.requires_grad_() for t in teachers])
    found = torch.autograd.grad(losses.sum(), [*students, *teachers], allow_unused=True)
    assert [gradient is None for gradient in found] == [False] * len(students) + [True] * len(teachers)
    assert not functional.similarity_statistics(teachers).requires_grad


def test_an_unused_tap_changes_nothing_for_the_others(backend):
    students, teachers = maps()
    losses = operation(students, teachers)
    (gradient,) = torch.autograd.grad(losses[1], students[1])
    (expected,) = torch.autograd.grad(plain(students, teachers)[1], students[1])
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)


# Layouts


@pytest.mark.parametrize("layout", ["channels_last", "expanded", "sliced", "offset"])
def test_noncontiguous_maps(backend, layout):
    def lay(features):
        if layout == "channels_last":
            return features.to(memory_format=torch.channels_last)
        if layout == "expanded":
            return features[:, :1].expand_as(features)
        return features[:, ::2, 1:] if layout == "sliced" else features[1:]

    student, teacher = lay(torch.randn(5, 6, 5, 4, dtype=torch.float64)), lay(torch.randn(5, 8, 5, 4).double())
    student = student.detach().requires_grad_()
    losses, gradients = with_gradients(operation, [student], [teacher])
    expected, expected_gradients = with_gradients(plain, [student], [teacher])
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-10, atol=1e-14)


def test_gradients_larger_than_the_caches(backend):
    student = torch.randn(3, 1_500_001, requires_grad=True)
    teacher = torch.randn(3, 50)
    _, (gradient,) = with_gradients(operation, [student], [teacher])
    _, (expected,) = with_gradients(plain, [student.detach().double().requires_grad_()], [teacher.double()])
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-6 * expected.abs().max().item())


# Gradients


def test_gradcheck(backend):
    students, teachers = maps([(4, 3, 2, 3), (4, 2, 4)])
    assert torch.autograd.gradcheck(lambda *s: operation(list(s), teachers), students)


def test_second_derivative_is_a_clear_error(backend):
    students, teachers = maps()
    gradients = torch.autograd.grad(operation(students, teachers).sum(), students, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no fused second derivative.*use_backend\('reference'\)"):
        torch.autograd.grad(gradients[0].sum(), students[0])


def test_second_derivative_of_the_reference():
    students, teachers = maps([(3, 3, 2, 3)])
    with use_backend("reference"):
        assert torch.autograd.gradgradcheck(lambda s: functional.similarity_preserving([s], teachers), students)


def test_statistics_have_no_gradient(backend):
    students, _ = maps(SHAPES[:1])
    with pytest.raises(RuntimeError, match="statistics are the teacher's, and have no gradient"):
        similarity_statistics(students).sum().backward()


# PyTorch


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend, memory_format, dtype):
    students, teachers = maps(SHAPES[:3], dtype, memory_format)
    torch.library.opcheck(similarity_preserving, (students, teachers, None))
    detached = [s.detach() for s in students]
    statistics = similarity_statistics(detached)
    torch.library.opcheck(similarity_preserving, (students, [], statistics))
    torch.library.opcheck(similarity_statistics, (detached,))
    _, coefficients = similarity_preserving(students, teachers, None)
    torch.library.opcheck(gram_backward, (torch.ones(3), detached, coefficients, False))


@pytest.mark.parametrize("sliced", [False, True])
def test_compiles_to_one_graph_with_dynamic_shapes(backend, sliced):
    torch.compiler.reset()
    compiled = torch.compile(functional.similarity_preserving, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (3, 5):
        students, teachers = maps([(batch, 4, 6, 6), (batch, 6, 3, 3)], torch.float32)
        if sliced:
            students = [s[:, ::2] for s in students]
        losses, gradients = with_gradients(compiled, students, teachers)
        expected, expected_gradients = with_gradients(plain, students, teachers)
        torch.testing.assert_close(losses, expected)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-6)


def test_autocast(backend):
    layer, images = nn.Conv2d(3, 8, 3), torch.randn(4, 3, 9, 9)
    teacher = torch.randn(4, 8, 7, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = layer(images)
        losses = functional.similarity_preserving([features], [teacher.bfloat16()])
    losses.sum().backward()
    assert features.dtype == torch.bfloat16
    assert losses.dtype == torch.float32
    assert layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(losses.detach(), plain([features.detach()], [teacher.bfloat16()]))


def test_maps_of_two_dtypes(backend):
    students, teachers = maps(dtype=torch.float32)
    found = functional.similarity_preserving(students, [t.bfloat16() for t in teachers])
    torch.testing.assert_close(found, plain(students, [t.bfloat16() for t in teachers]))


def test_students_of_two_dtypes():
    students, teachers = maps(dtype=torch.float32)
    mixed = [students[0].detach().double().requires_grad_(), *students[1:]]
    losses, gradients = with_gradients(functional.similarity_preserving, mixed, teachers)
    torch.testing.assert_close(losses.float(), plain(students, teachers))
    assert [g.dtype for g in gradients] == [torch.float64] + [torch.float32] * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_meta(backend, dtype):
    students, teachers = maps(dtype=dtype)
    students = [s.detach().to("meta").requires_grad_() for s in students]
    losses, gradients = with_gradients(operation, students, [t.to("meta") for t in teachers])
    assert losses.is_meta
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert [(g.shape, g.dtype, g.stride()) for g in gradients] == [(s.shape, s.dtype, s.stride()) for s in students]


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_empty_batch(name):
    with use_backend(name):
        students, teachers = maps([(0, 4, 3, 3), (0, 6, 2, 2)])
        losses, gradients = with_gradients(operation, students, teachers)
        torch.testing.assert_close(functional.similarity_preserving(students, teachers), losses)
    assert losses.tolist() == [0, 0]
    assert [gradient.shape for gradient in gradients] == [s.shape for s in students]


def test_one_sample_is_like_itself(backend):
    students, teachers = maps([(1, 3, 4, 4)])
    losses, gradients = with_gradients(operation, students, teachers)
    assert losses.abs().max() < 1e-15 and gradients[0].abs().max() < 1e-12


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, t: (s, t[:1]), "2 student maps but 1 teacher maps"),
        (lambda s, t: ([], []), "no feature maps were given"),
        (lambda s, t: (s, [t[0], t[1][:1]]), "teacher map 1 has a batch of 1, student map 0 one of 7; .* same images"),
        (lambda s, t: ([s[0], s[1][:2]], t), "student map 1 has a batch of 2, student map 0 one of 7"),
        (
            lambda s, t: ([s[0][:, 0, 0, 0], s[1]], t),
            r"student map 0 is torch.float64 \[7\]; expected floats \[B, ...\]",
        ),
        (lambda s, t: (s, [t[0].long(), t[1]]), "teacher map 0 is torch.int64"),
        (lambda s, t: (s, [t[0].to("meta"), t[1]]), "teacher map 0 is on meta, student map 0 on cpu; move one"),
    ],
)
def test_bad_maps(change, message):
    students, teachers = change(*maps(SHAPES[:2]))
    with pytest.raises(ValueError, match=message):
        functional.similarity_preserving(students, teachers)


def test_teacher_or_statistics():
    students, teachers = maps(SHAPES[:2])
    for given, options in (("both", {"statistics": torch.ones(2, 7, 7)}), ("neither", {})):
        arguments = (students, teachers) if given == "both" else (students,)
        with pytest.raises(
            ValueError, match=rf"{given} given; give the teacher's maps, or .*similarity_statistics\(\)"
        ):
            functional.similarity_preserving(*arguments, **options)


@pytest.mark.parametrize("statistics", [torch.ones(2, 7, 6), torch.ones(7, 7), torch.ones(2, 7, 7).long()])
def test_bad_statistics(statistics):
    students, _ = maps(SHAPES[:2])
    message = (
        r"statistics is torch.* on cpu; expected floats \[2, 7, 7\] on cpu, as similarity_statistics\(\) makes them"
    )
    with pytest.raises(ValueError, match=message):
        functional.similarity_preserving(students, statistics=statistics)
