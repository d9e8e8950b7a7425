"""The contract of `hyperfast::relational_distance_angle`, on every backend."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_accurate, golden
from torch import nn

from hyperfast import functional, reference
from hyperfast.backends import use_backend
from hyperfast.ops._gram import gram_backward
from hyperfast.ops.relational_distance_angle import (
    forward_implementations,
    relational_distance_angle,
    relational_statistics,
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


def operation(students, teachers, statistics=None, distance=25.0, angle=50.0):
    """The registered operation itself; the public function leaves it out on the reference backend."""
    return relational_distance_angle(students, teachers, statistics, distance, angle)[0]


def plain(students, teachers, distance=25.0, angle=50.0, normalize=False):
    """As the projects write it, in at least float32."""
    losses = []
    for s, t in zip(students, teachers, strict=True):
        rows = [x.to(torch.promote_types(x.dtype, torch.float32)).flatten(1) for x in (s, t)]
        own, other = (F.normalize(x, dim=1) if normalize else x for x in rows)
        losses.append(
            distance * F.smooth_l1_loss(normalised_distances(own), normalised_distances(other))
            + angle * F.smooth_l1_loss(cosines(own), cosines(other))
        )
    return torch.stack(losses)


def normalised_distances(rows):
    squares = rows.square().sum(1)
    squared = squares[:, None] + squares[None, :] - 2 * rows @ rows.t()
    distances = squared.clamp(min=1e-12).sqrt() * (1 - torch.eye(len(rows), dtype=rows.dtype))
    return distances / distances[distances > 0].mean()


def cosines(rows):
    arms = F.normalize(rows[None] - rows[:, None], dim=2)
    return torch.bmm(arms, arms.transpose(1, 2))


def with_gradients(function, students, *arguments, scale=1.0):
    """Losses and the gradients of a sum that weighs every tap differently. float16 needs a loss scale."""
    losses = function(students, *arguments)
    weights = torch.arange(1, len(losses) + 1, device=losses.device, dtype=losses.dtype)
    return losses.detach(), torch.autograd.grad((scale * losses * weights).sum(), students)


# Values


@pytest.mark.parametrize(("case", "weights"), [("rkd_rep", {}), ("rkd_rep_d", {"distance": 1, "angle": 0})])
def test_golden(backend, case, weights):
    values = golden()
    student = values["in.s2"].requires_grad_()
    (loss,) = functional.relational_distance_angle([student], [values["in.t2"]], **weights)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(loss.detach(), values[f"{case}.loss"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, values[f"{case}.grad0"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [2, 7, 16, 35])
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
    losses = functional.relational_distance_angle(students, teachers)
    torch.testing.assert_close(losses, operation(students, teachers), rtol=1e-12, atol=1e-14)


def test_closed_form_of_the_reference_is_its_derivative():
    students, teachers = maps()
    options = (None, 25.0, 50.0)
    losses, coefficients = reference.relational_distance_angle_forward(
        [s.detach() for s in students], teachers, *options
    )
    expected, expected_gradients = with_gradients(reference.relational_distance_angle, students, teachers, *options)
    grad = torch.arange(1, len(students) + 1, dtype=torch.float64)
    gradients = reference.gram_backward(grad, [s.detach() for s in students], coefficients, True)
    torch.testing.assert_close(losses, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradients, list(expected_gradients), rtol=1e-11, atol=1e-15)


def test_statistics_stand_for_the_teachers_maps(backend):
    students, teachers = maps()
    statistics = functional.relational_statistics(teachers)
    assert statistics.shape == (5, 7, 7) and statistics.dtype == torch.float64
    torch.testing.assert_close(statistics, reference.relational_statistics(teachers), rtol=1e-12, atol=1e-14)
    expected = with_gradients(functional.relational_distance_angle, students, teachers)
    found = with_gradients(lambda s: functional.relational_distance_angle(s, statistics=statistics), students)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("distance", "angle"), [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_either_term_alone(backend, distance, angle):
    students, teachers = maps()
    losses, gradients = with_gradients(operation, students, teachers, None, distance, angle)
    expected, expected_gradients = with_gradients(plain, students, teachers, distance, angle)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-10, atol=1e-14)


def test_normalised_embeddings(backend):
    students, teachers = maps()
    found = with_gradients(lambda s, t: functional.relational_distance_angle(s, t, normalize=True), students, teachers)
    expected = with_gradients(lambda s, t: plain(s, t, normalize=True), students, teachers)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    known = functional.relational_statistics(teachers, normalize=True)
    again = functional.relational_distance_angle(students, statistics=known, normalize=True)
    torch.testing.assert_close(again.detach(), found[0], rtol=1e-12, atol=1e-14)


def test_a_zero_embedding_stays_zero_when_normalised(backend):
    student = torch.randn(4, 6)
    student[1] = 0
    student.requires_grad_()
    loss = functional.relational_distance_angle([student], [torch.randn(4, 6)], normalize=True)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert gradient.isfinite().all() and not gradient[1].any() and gradient[0].any()


def test_a_large_common_mean_costs_no_accuracy(backend):
    students, teachers = maps([(9, 3000), (9, 40, 8, 8)], torch.float32)
    students = [(s.detach() + 1000).requires_grad_() for s in students]
    losses, gradients = with_gradients(operation, students, teachers)
    exact = [s.detach().double().requires_grad_() for s in students]
    expected, expected_gradients = with_gradients(plain, exact, [t.double() for t in teachers])
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=0)
    for gradient, reference_gradient in zip(gradients, expected_gradients, strict=True):
        assert (gradient.double() - reference_gradient).norm() < 1e-4 * reference_gradient.norm()


def test_angles_that_differ_by_more_than_the_hubers_threshold(backend):
    student = torch.tensor([[0.0, 0], [1, 0], [2, 0.1], [0.5, -3]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[1.0, 0], [0, 0], [2, 0], [0.1, 0.2]], dtype=torch.float64)
    assert (cosines(student) - cosines(teacher)).abs().max() > 1
    found, expected = (with_gradients(f, [student], [teacher]) for f in (operation, plain))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


def test_many_taps(backend):
    students, teachers = maps([(3, 3, 2 + i % 3, 2) for i in range(150)])
    losses, gradients = with_gradients(operation, students, teachers)
    expected, expected_gradients = with_gradients(plain, students, teachers)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-10, atol=1e-14)


# Properties


def test_invariant_to_scale_and_shift_of_either_map_and_to_the_order_of_the_batch(backend):
    students, teachers = maps()
    expected = operation(students, teachers)
    scaled = operation([100 * s - 3 for s in students], [0.01 * t + 5 for t in teachers])
    torch.testing.assert_close(scaled, expected, rtol=1e-10, atol=1e-14)
    order = torch.randperm(7)
    permuted = operation([s[order] for s in students], [t[order] for t in teachers])
    torch.testing.assert_close(permuted, expected, rtol=1e-10, atol=1e-14)


def test_two_samples_have_nothing_to_differ_in(backend):
    students, teachers = maps([(2, 3, 4, 4)])
    losses, gradients = with_gradients(operation, students, teachers)
    assert losses.abs().max() < 1e-14 and gradients[0].abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_network_and_itself_have_zero_loss_and_gradient(backend, dtype):
    students = [torch.randn(shape).relu_() for shape in SHAPES]
    students[0][:, 1] = 0  # a dead channel
    students[1][3] = 0  # a dead sample
    students[2] = torch.ones(7, 19)  # equal samples
    students[3][2] = students[3][5]
    students = [s.to(dtype).requires_grad_() for s in students]
    teachers = [s.detach().clone() for s in students]
    for given in ((teachers,), ([], relational_statistics(teachers))):
        losses, gradients = with_gradients(operation, students, *given)
        assert not losses.any()
        assert not any(gradient.any() for gradient in gradients)


def test_equal_samples_have_finite_gradients(backend):
    """Where the teacher tells apart what the student does not, the projects' gradients are 1e12 times too large."""
    students, teachers = maps(dtype=torch.float32)
    with torch.no_grad():
        for s in students:
            s[0] = s[1]
        students[2][:] = 1  # all of them
    losses, gradients = with_gradients(operation, students, teachers)
    assert losses.isfinite().all() and (losses > 0).all()
    for index, gradient in enumerate(gradients):
        assert gradient.isfinite().all() and gradient.abs().max() < 1e3
        assert gradient.any() == (index != 2)
    with use_backend("reference"):
        exact = [s.detach().double().requires_grad_() for s in students]
        expected, expected_gradients = with_gradients(functional.relational_distance_angle, exact, teachers)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=0)
    for gradient, close in zip(gradients, expected_gradients, strict=True):
        assert (gradient.double() - close).norm() <= 1e-4 * close.norm()


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
    losses = functional.relational_distance_angle(students, [t.requires_grad_() for t in teachers])
    found = torch.autograd.grad(losses.sum(), [*students, *teachers], allow_unused=True)
    assert [gradient is None for gradient in found] == [False] * len(students) + [True] * len(teachers)
    assert not functional.relational_statistics(teachers).requires_grad


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
        assert torch.autograd.gradgradcheck(lambda s: functional.relational_distance_angle([s], teachers), students)


def test_statistics_have_no_gradient(backend):
    students, _ = maps(SHAPES[:1])
    with pytest.raises(RuntimeError, match="statistics are the teacher's, and have no gradient"):
        relational_statistics(students).sum().backward()


# PyTorch


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend, memory_format, dtype):
    students, teachers = maps(SHAPES[:3], dtype, memory_format)
    torch.library.opcheck(relational_distance_angle, (students, teachers, None, 25.0, 50.0))
    detached = [s.detach() for s in students]
    statistics = relational_statistics(detached)
    torch.library.opcheck(relational_distance_angle, (students, [], statistics, 25.0, 50.0))
    torch.library.opcheck(relational_statistics, (detached,))
    _, coefficients = relational_distance_angle(students, teachers, None, 25.0, 50.0)
    torch.library.opcheck(gram_backward, (torch.ones(3), detached, coefficients, True))


@pytest.mark.parametrize("sliced", [False, True])
def test_compiles_to_one_graph_with_dynamic_shapes(backend, sliced):
    torch.compiler.reset()
    compiled = torch.compile(functional.relational_distance_angle, fullgraph=True, dynamic=True, backend="aot_eager")
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
        losses = functional.relational_distance_angle([features], [teacher.bfloat16()])
    losses.sum().backward()
    assert features.dtype == torch.bfloat16
    assert losses.dtype == torch.float32
    assert layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(losses.detach(), plain([features.detach()], [teacher.bfloat16()]))


def test_maps_of_two_dtypes(backend):
    students, teachers = maps(dtype=torch.float32)
    found = functional.relational_distance_angle(students, [t.bfloat16() for t in teachers])
    torch.testing.assert_close(found, plain(students, [t.bfloat16() for t in teachers]))


def test_students_of_two_dtypes():
    students, teachers = maps(dtype=torch.float32)
    mixed = [students[0].detach().double().requires_grad_(), *students[1:]]
    losses, gradients = with_gradients(functional.relational_distance_angle, mixed, teachers)
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


@pytest.mark.parametrize("batch", [0, 1])
def test_no_relations_in_a_batch(batch):
    students, teachers = maps([(batch, 4, 3, 3)])
    message = rf"a batch of {batch}; relations need at least two samples, and three to have a loss: use drop_last=True"
    with pytest.raises(ValueError, match=message):
        functional.relational_distance_angle(students, teachers)
    with pytest.raises(ValueError, match=message):
        functional.relational_statistics(teachers)


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
        functional.relational_distance_angle(students, teachers)


def test_teacher_or_statistics():
    students, teachers = maps(SHAPES[:2])
    for given, options in (("both", {"statistics": torch.ones(2, 7, 7)}), ("neither", {})):
        arguments = (students, teachers) if given == "both" else (students,)
        with pytest.raises(
            ValueError, match=rf"{given} given; give the teacher's maps, or .*relational_statistics\(\)"
        ):
            functional.relational_distance_angle(*arguments, **options)


@pytest.mark.parametrize("statistics", [torch.ones(2, 7, 6), torch.ones(7, 7), torch.ones(2, 7, 7).long()])
def test_bad_statistics(statistics):
    students, _ = maps(SHAPES[:2])
    message = (
        r"statistics is torch.* on cpu; expected floats \[2, 7, 7\] on cpu, as relational_statistics\(\) makes them"
    )
    with pytest.raises(ValueError, match=message):
        functional.relational_distance_angle(students, statistics=statistics)
