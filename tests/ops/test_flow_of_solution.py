"""The contract of `hyperfast::flow_of_solution`, on every backend."""

import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_accurate, golden
from torch import nn

from hyperfast import functional, reference
from hyperfast.backends import use_backend
from hyperfast.ops.flow_of_solution import (
    flow_of_solution,
    flow_of_solution_backward,
    flow_statistics,
    forward_implementations,
)

DISPATCHER = forward_implementations
# A pair of a map with itself, a map in three pairs; sizes that fill no vector, more than one panel and block of steps.
SHAPES = [(3, 5, 12, 13), (3, 70, 12, 13), (3, 9, 12, 13)]
PAIRS = [(0, 1), (1, 2), (0, 0), (0, 2)]
FLAT = [tap for pair in PAIRS for tap in pair]
OPTIONS = [("mean", False), ("mean", True), ("sum", False), ("sum", True)]


def maps(shapes=SHAPES, dtype=torch.float64, memory_format=torch.contiguous_format):
    """Students that want gradients, and teachers with one row of positions less."""

    def make(shape, less):
        batch, channels, first, *rest = shape
        features = torch.randn(batch, channels, first - less, *rest).to(dtype)
        return features.to(memory_format=memory_format) if features.ndim == 4 else features

    students = [make(shape, 0).requires_grad_() for shape in shapes]
    return students, [make(shape, 1) for shape in shapes]


def operation(students, teachers, reduction="mean", normalize=False, pairs=FLAT, statistics=()):
    """The registered operation itself; the public function leaves it out on the reference backend."""
    return flow_of_solution(students, teachers, list(statistics), pairs, reduction, normalize, None)[0]


def plain(students, teachers, reduction="mean", normalize=False, pairs=PAIRS):
    """As RepDistiller writes it, but for its broadcast product, in at least float32."""

    def matrix(maps, i, j):
        first, second = (maps[k].to(torch.promote_types(maps[k].dtype, torch.float32)).flatten(2) for k in (i, j))
        return torch.einsum("bcn,bdn->bcd", first, second) / first.shape[2]

    losses = []
    for i, j in pairs:
        own, other = matrix(students, i, j), matrix(teachers, i, j)
        squares = (own - other).square()
        if normalize:
            squares = squares / other.square().sum((1, 2), keepdim=True)
        losses.append(squares.mean() if reduction == "mean" else squares.sum() / len(squares))
    return torch.stack(losses)


def with_gradients(function, students, *arguments, scale=1.0, **options):
    """Losses and the gradients of a sum that weighs every pair differently. float16 needs a loss scale."""
    losses = function(students, *arguments, **options)
    weights = torch.arange(1, len(losses) + 1, device=losses.device, dtype=losses.dtype)
    return losses.detach(), torch.autograd.grad((scale * losses * weights).sum(), students)


# Values


def test_golden(backend):
    values = golden()
    students = [values[f"in.s{i}"].requires_grad_() for i in range(2)]
    losses = functional.flow_of_solution(students, [values[f"in.t{i}"] for i in range(2)])
    gradients = torch.autograd.grad(losses.sum(), students)
    torch.testing.assert_close(losses.sum().detach(), values["fsp_rep.loss"], rtol=1e-12, atol=1e-12)
    for i, gradient in enumerate(gradients):
        torch.testing.assert_close(gradient, values[f"fsp_rep.grad{i}"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("reduction", "normalize"), OPTIONS)
def test_equals_plain_autograd(backend, reduction, normalize):
    students, teachers = maps()
    losses, gradients = with_gradients(operation, students, teachers, reduction, normalize)
    expected, expected_gradients = with_gradients(plain, students, teachers, reduction, normalize)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accuracy(backend, dtype):
    students, teachers = maps(dtype=dtype)
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


@pytest.mark.parametrize(("reduction", "normalize"), OPTIONS)
def test_closed_form_of_the_reference_is_its_derivative(reduction, normalize):
    students, teachers = maps()
    options = ([], FLAT, reduction, normalize)
    detached = [s.detach() for s in students]
    losses, differences, scales, _ = reference.flow_of_solution_forward(detached, teachers, *options)
    expected, expected_gradients = with_gradients(reference.flow_of_solution, students, teachers, *options)
    grad = torch.arange(1, len(PAIRS) + 1, dtype=torch.float64)
    gradients = reference.flow_of_solution_backward(grad, detached, differences, scales, FLAT)
    torch.testing.assert_close(losses, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradients, list(expected_gradients), rtol=1e-11, atol=1e-15)


def test_consecutive_taps_are_the_default(backend):
    students, teachers = maps()
    losses = functional.flow_of_solution(students, teachers)
    torch.testing.assert_close(losses, plain(students, teachers, pairs=[(0, 1), (1, 2)]), rtol=1e-12, atol=1e-14)
    named = functional.flow_of_solution(students, teachers, pairs=[(2, 0)])
    torch.testing.assert_close(named, plain(students, teachers, pairs=[(2, 0)]), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize("sizes", [((8, 8), (4, 4)), ((4, 4), (8, 8)), ((7, 5), (3, 6))])
def test_the_larger_map_of_a_pair_is_pooled(backend, pool, sizes):
    pools = {"avg": F.adaptive_avg_pool2d, "max": F.adaptive_max_pool2d}
    students = [torch.randn(2, 3 + i, *size, dtype=torch.float64).requires_grad_() for i, size in enumerate(sizes)]
    # Taps of the teacher have one size: only the student pools.
    teachers = [torch.randn(2, 3 + i, 6, 5, dtype=torch.float64) for i in range(2)]
    size = [min(pair) for pair in zip(*sizes, strict=True)]

    def pooled(students, teachers):
        return plain([pools[pool](s, size) for s in students], teachers, pairs=[(0, 1)])

    found = with_gradients(functional.flow_of_solution, students, teachers, pool=pool)
    torch.testing.assert_close(found, with_gradients(pooled, students, teachers), rtol=1e-10, atol=1e-14)


def test_a_tap_is_pooled_for_one_pair_and_not_for_another(backend):
    shapes = [(2, 3, 8, 8), (2, 4, 8, 8), (2, 5, 4, 4)]
    students, teachers = ([torch.randn(shape, dtype=torch.float64) for shape in shapes] for _ in range(2))
    students = [s.requires_grad_() for s in students]

    def pooled(students, teachers):
        small = [[m[0], m[1], F.adaptive_avg_pool2d(m[1], 4), m[2]] for m in (students, teachers)]
        return plain(*small, pairs=[(0, 1), (2, 3)])

    found = with_gradients(functional.flow_of_solution, students, teachers)
    torch.testing.assert_close(found, with_gradients(pooled, students, teachers), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("reduction", "normalize"), OPTIONS)
def test_statistics_stand_for_the_teachers_maps(backend, reduction, normalize):
    students, teachers = maps()
    statistics = functional.flow_statistics(teachers, pairs=PAIRS)
    assert [list(g.shape) for g in statistics] == [[3, 5, 70], [3, 70, 9], [3, 5, 5], [3, 5, 9]]
    torch.testing.assert_close(statistics, reference.flow_statistics(teachers, FLAT), rtol=1e-12, atol=1e-14)
    options = {"pairs": PAIRS, "reduction": reduction, "normalize": normalize}
    expected = with_gradients(functional.flow_of_solution, students, teachers, **options)
    found = with_gradients(functional.flow_of_solution, students, statistics=statistics, **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


def test_statistics_of_single_samples_make_those_of_a_batch(backend):
    _, teachers = maps()
    alone = [functional.flow_statistics([t[b : b + 1] for t in teachers]) for b in range(3)]
    joined = [torch.cat(parts) for parts in zip(*alone, strict=True)]
    torch.testing.assert_close(joined, functional.flow_statistics(teachers), rtol=1e-12, atol=1e-14)


def test_many_pairs(backend):
    students, teachers = maps([(2, 3, 4, 2)] * 20)
    pairs = [(i, j) for i in range(20) for j in range(5)]
    flat = [tap for pair in pairs for tap in pair]
    found = with_gradients(operation, students, teachers, pairs=flat)
    expected = with_gradients(plain, students, teachers, pairs=pairs)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


# Properties


@pytest.mark.parametrize("normalize", [False, True])
def test_grows_with_the_fourth_power_of_a_common_scale_unless_normalised(backend, normalize):
    students, teachers = maps()
    scaled = operation([3 * s for s in students], [3 * t for t in teachers], normalize=normalize)
    expected = (1 if normalize else 81) * operation(students, teachers, normalize=normalize)
    torch.testing.assert_close(scaled, expected, rtol=1e-10, atol=1e-14)


def test_invariant_to_the_order_of_the_batch_but_to_no_shift(backend):
    students, teachers = maps()
    expected, order = operation(students, teachers), torch.randperm(3)
    permuted = operation([s[order] for s in students], [t[order] for t in teachers])
    torch.testing.assert_close(permuted, expected, rtol=1e-10, atol=1e-14)
    assert (operation([s + 1 for s in students], teachers) > expected + 0.1).all()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_network_and_itself_have_zero_loss_and_gradient(backend, dtype, normalize):
    students = [torch.randn(shape).relu_() for shape in SHAPES]
    students[0][:, 1] = 0  # a dead channel
    students[1][2] = 0  # a dead sample
    students[2][:] = 1  # constant maps
    students = [s.to(dtype).requires_grad_() for s in students]
    teachers = [s.detach().clone() for s in students]
    for given, statistics in ((teachers, ()), ([], flow_statistics(teachers, FLAT))):
        losses, gradients = with_gradients(operation, students, given, normalize=normalize, statistics=statistics)
        assert not losses.any()
        assert not any(gradient.any() for gradient in gradients)


def test_a_dead_teacher_has_no_loss_where_it_would_be_divided_by(backend):
    students, teachers = maps()
    teachers[1][0] = 0
    losses, gradients = with_gradients(operation, students, teachers, normalize=True)
    alive = with_gradients(plain, [s[1:] for s in students], [t[1:] for t in teachers], normalize=True)
    torch.testing.assert_close(losses[:2], alive[0][:2] * 2 / 3, rtol=1e-10, atol=1e-14)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[1][0].any()


def test_float16_values_of_1e4(backend):
    students, teachers = maps(dtype=torch.float32)
    students = [(1e4 * s.detach().clamp(-6, 6)).half().requires_grad_() for s in students]
    teachers = [(1e4 * t.clamp(-6, 6)).half() for t in teachers]
    losses, gradients = with_gradients(operation, students, teachers, scale=1e-12)
    expected = plain([s.detach().double() for s in students], [t.double() for t in teachers])
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=0)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


def test_bitwise_repeatable(backend):
    students, teachers = maps([(8, 33, 19, 17), (8, 64, 19, 17), (8, 5, 19, 17)], torch.float32)
    first, first_gradients = with_gradients(operation, students, teachers)
    second, second_gradients = with_gradients(operation, students, teachers)
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(first_gradients, second_gradients, strict=True))


def test_the_teacher_gets_no_gradient(backend):
    students, teachers = maps()
    losses = functional.flow_of_solution(students, [t.requires_grad_() for t in teachers])
    found = torch.autograd.grad(losses.sum(), [*students, *teachers], allow_unused=True)
    assert [gradient is None for gradient in found] == [False] * 3 + [True] * 3
    assert not any(g.requires_grad for g in functional.flow_statistics(teachers))


def test_an_unused_pair_changes_nothing_for_the_others(backend):
    students, teachers = maps()
    losses = operation(students, teachers)
    found = torch.autograd.grad(losses[1], students)
    expected = torch.autograd.grad(plain(students, teachers)[1], students[1:])
    torch.testing.assert_close(found[1:], expected, rtol=1e-10, atol=1e-14)
    assert not found[0].any()


# Layouts


@pytest.mark.parametrize("layout", ["channels_last", "expanded", "sliced", "offset"])
def test_noncontiguous_maps(backend, layout):
    def lay(features):
        if layout == "channels_last":
            return features.to(memory_format=torch.channels_last)
        if layout == "expanded":
            return features[:, :1].expand_as(features)
        return features[:, ::2, 1:] if layout == "sliced" else features[1:]

    students = [lay(torch.randn(5, c, 5, 4, dtype=torch.float64)).detach().requires_grad_() for c in (6, 8)]
    teachers = [lay(torch.randn(5, c, 5, 4, dtype=torch.float64)) for c in (6, 8)]
    found = with_gradients(operation, students, teachers, pairs=[0, 1])
    expected = with_gradients(plain, students, teachers, pairs=[(0, 1)])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("axes", [1, 3])
def test_one_and_three_spatial_axes(backend, axes):
    shapes = [(2, 3, *[4] * axes), (2, 5, *[2] * axes)]
    students, teachers = maps(shapes)
    assert functional.flow_of_solution(students, teachers).shape == (1,)


# Gradients


@pytest.mark.parametrize(("reduction", "normalize"), OPTIONS)
def test_gradcheck(backend, reduction, normalize):
    students, teachers = maps([(2, 3, 2, 3), (2, 2, 2, 3)])
    pairs = [0, 1, 1, 1]
    assert torch.autograd.gradcheck(lambda *s: operation(list(s), teachers, reduction, normalize, pairs), students)


def test_second_derivative_is_a_clear_error(backend):
    students, teachers = maps()
    gradients = torch.autograd.grad(operation(students, teachers).sum(), students, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no fused second derivative.*use_backend\('reference'\)"):
        torch.autograd.grad(gradients[0].sum(), students[0])


def test_second_derivative_of_the_reference():
    students, teachers = maps([(2, 2, 2, 3), (2, 3, 2, 3)])
    with use_backend("reference"):
        assert torch.autograd.gradgradcheck(lambda *s: functional.flow_of_solution(list(s), teachers), students)


def test_statistics_have_no_gradient(backend):
    students, _ = maps()
    with pytest.raises(RuntimeError, match="statistics are the teacher's, and have no gradient"):
        flow_statistics(students, FLAT)[0].sum().backward()


# The gradient computed ahead


def ahead(students, teachers, expected, factor=1.0, **options):
    """Loss and gradients where the forward pass was told to expect the gradient `expected`."""
    losses = functional.flow_of_solution(students, teachers, pairs=PAIRS, expected_grad=expected, **options)
    return losses.detach(), torch.autograd.grad((losses * expected * factor).sum(), students)


@pytest.fixture
def backward_runs(monkeypatch):
    """How often the backward operation ran."""
    runs = []
    module = sys.modules["hyperfast.ops.flow_of_solution"]
    run = module.flow_of_solution_backward
    monkeypatch.setattr(module, "flow_of_solution_backward", lambda *a: runs.append(1) or run(*a))
    return runs


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("reduction", "normalize"), OPTIONS)
def test_a_gradient_computed_ahead_is_the_gradient(backward_runs, reduction, normalize, dtype, memory_format):
    students, teachers = maps(dtype=dtype, memory_format=memory_format)
    expected, options = torch.tensor([1.0, 0.0, 0.3, 1e3]), {"reduction": reduction, "normalize": normalize}
    losses, gradients = ahead(students, teachers, expected, **options)
    assert not backward_runs
    late_losses = functional.flow_of_solution(students, teachers, pairs=PAIRS, **options)
    late = torch.autograd.grad((late_losses * expected).sum(), students)
    assert torch.equal(losses, late_losses) and all(map(torch.equal, gradients, late))
    assert [g.stride() for g in gradients] == [torch.empty_like(s).stride() for s in students]


@pytest.mark.parametrize("compressed", [False, True])
def test_an_unexpected_gradient_is_right_too(backward_runs, compressed):
    students, teachers = maps()
    known = {"statistics": functional.flow_statistics(teachers, pairs=PAIRS)} if compressed else {}
    _, gradients = ahead(students, None if compressed else teachers, torch.ones(4), factor=3.0, **known)
    assert backward_runs
    losses = functional.flow_of_solution(students, teachers, pairs=PAIRS)
    torch.testing.assert_close(gradients, torch.autograd.grad(3 * losses.sum(), students), rtol=1e-12, atol=1e-15)


def test_weights_that_change_before_the_backward_pass():
    students, teachers = maps()
    weights = torch.ones(2)
    loss = functional.flow_of_solution(students, teachers, expected_grad=weights).sum()
    weights.zero_()
    expected = torch.autograd.grad(functional.flow_of_solution(students, teachers).sum(), students)
    assert all(map(torch.equal, torch.autograd.grad(loss, students), expected))


def test_two_backward_passes_do_not_share_memory_that_either_changes():
    students, teachers = maps()
    loss = functional.flow_of_solution(students, teachers, expected_grad=torch.ones(2)).sum()
    for _ in range(2):
        loss.backward(retain_graph=True)
    once = torch.autograd.grad(loss, students)
    torch.testing.assert_close([s.grad for s in students], [2 * g for g in once], rtol=0, atol=0)


def test_second_derivative_of_a_gradient_computed_ahead_is_a_clear_error():
    students, teachers = maps()
    losses = functional.flow_of_solution(students, teachers, expected_grad=torch.ones(2))
    gradients = torch.autograd.grad(losses.sum(), students, create_graph=True)
    with pytest.raises(RuntimeError, match="no fused second derivative"):
        torch.autograd.grad(gradients[0].sum(), students[0])


def test_opcheck_with_an_expectation():
    students, teachers = maps(dtype=torch.float32)
    torch.library.opcheck(flow_of_solution, (students, teachers, [], FLAT, "mean", False, torch.ones(4)))


def test_an_expectation_of_another_length():
    with pytest.raises(ValueError, match=r"expected_grad is \[3\]; expected \[2\], one per pair"):
        functional.flow_of_solution(*maps(), expected_grad=torch.ones(3))


# PyTorch


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend, memory_format, dtype):
    students, teachers = maps(dtype=dtype, memory_format=memory_format)
    torch.library.opcheck(flow_of_solution, (students, teachers, [], FLAT, "sum", True, None))
    detached = [s.detach() for s in students]
    statistics = flow_statistics(detached, FLAT)
    torch.library.opcheck(flow_of_solution, (students, [], statistics, FLAT, "mean", False, None))
    torch.library.opcheck(flow_statistics, (detached, FLAT))
    _, differences, scales, _ = flow_of_solution(detached, teachers, [], FLAT, "mean", False, None)
    torch.library.opcheck(flow_of_solution_backward, (torch.ones(4), detached, differences, scales, FLAT))


@pytest.mark.parametrize("sliced", [False, True])
def test_compiles_to_one_graph_with_dynamic_shapes(backend, sliced):
    torch.compiler.reset()
    compiled = torch.compile(functional.flow_of_solution, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (3, 5):
        students, teachers = maps([(batch, 4, 6, 6), (batch, 6, 6, 6)], torch.float32)
        if sliced:
            students, teachers = [s[:, ::2] for s in students], [t[:, ::2] for t in teachers]
        losses, gradients = with_gradients(compiled, students, teachers)
        expected, expected_gradients = with_gradients(plain, students, teachers, pairs=[(0, 1)])
        torch.testing.assert_close(losses, expected)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-6)


def test_autocast(backend):
    layer, images = nn.Conv2d(3, 8, 3), torch.randn(4, 3, 9, 9)
    teacher = torch.randn(4, 8, 7, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = layer(images)
        losses = functional.flow_of_solution([features], [teacher.bfloat16()], pairs=[(0, 0)])
    losses.sum().backward()
    assert features.dtype == torch.bfloat16
    assert losses.dtype == torch.float32
    assert layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(losses.detach(), plain([features.detach()], [teacher.bfloat16()], pairs=[(0, 0)]))


def test_maps_of_two_dtypes():
    students, teachers = maps(dtype=torch.float32)
    found = functional.flow_of_solution(students, [t.bfloat16() for t in teachers], pairs=PAIRS)
    torch.testing.assert_close(found, plain(students, [t.bfloat16() for t in teachers]))


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
        students, teachers = maps([(0, 4, 3, 3), (0, 6, 3, 3)])
        losses, gradients = with_gradients(operation, students, teachers, pairs=[0, 1])
        torch.testing.assert_close(functional.flow_of_solution(students, teachers), losses)
    assert losses.tolist() == [0]
    assert [gradient.shape for gradient in gradients] == [s.shape for s in students]
