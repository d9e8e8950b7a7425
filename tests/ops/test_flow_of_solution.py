"""The contract of `hyperfast::flow_of_solution`, on every backend."""

import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import golden
from map_loss_contract import AheadContract, with_gradients

from hyperfast import functional, reference
from hyperfast.ops.flow_of_solution import (
    flow_of_solution,
    flow_of_solution_backward,
    flow_statistics,
    forward_implementations,
)

DISPATCHER = forward_implementations
# Sizes that fill no vector, more than one panel and more than one block of steps.
SHAPES = [(3, 5, 12, 13), (3, 70, 12, 13), (3, 9, 12, 13)]
PAIRS = [(0, 1), (1, 2), (0, 0), (0, 2)]  # a map with itself, and one that is in three pairs
FLAT = [tap for pair in PAIRS for tap in pair]


def pairs_of(maps):
    """Pairs for so many taps; those of two are the default."""
    return {1: [(0, 0)], 2: [(0, 1)], 3: PAIRS}.get(len(maps)) or [(i, j) for i in range(len(maps)) for j in range(5)]


def plain(students, teachers, reduction="mean", normalize=False, pairs=None):
    """As RepDistiller writes it, but for its broadcast product."""

    def matrix(maps, i, j):
        first, second = (maps[k].flatten(2) for k in (i, j))
        return torch.einsum("bcn,bdn->bcd", first, second) / first.shape[2]

    losses = []
    for i, j in pairs or pairs_of(students):
        own, other = matrix(students, i, j), matrix(teachers, i, j)
        squares = (own - other).square()
        if normalize:
            squares = squares / other.square().sum((1, 2), keepdim=True)
        losses.append(squares.mean() if reduction == "mean" else squares.sum() / len(squares))
    return torch.stack(losses)


class TestFlowOfSolution(AheadContract):
    plain = staticmethod(plain)
    cases = tuple({"reduction": r, "normalize": n} for r in ("mean", "sum") for n in (False, True))
    traced = cases[-1]
    shapes = SHAPES
    many = ((2, 3, 4, 2),) * 20
    repeated = ((8, 33, 19, 17), (8, 64, 19, 17), (8, 5, 19, 17))
    differentiated = ((2, 3, 2, 3), (2, 2, 2, 3), (2, 2, 2, 3))
    compiled = ((4, 6, 6), (6, 6, 6))
    empty = ((0, 4, 3, 3), (0, 6, 3, 3))
    scale_of_1e4 = 1e-12
    no_second_derivative = "flow_of_solution has no fused second derivative"
    close = (1e-4, 1e-6)
    backward = (sys.modules["hyperfast.ops.flow_of_solution"], "flow_of_solution_backward")
    each = "pair"

    @staticmethod
    def public(students, teachers, **options):
        pairs = None if len(students) == 2 else pairs_of(students)
        return functional.flow_of_solution(students, teachers, pairs=pairs, **options)

    def teacher_shape(self, index, shape):
        """One row of positions less."""
        batch, channels, first, *rest = shape
        return (batch, channels, first - 1, *rest)

    def call(self, students, teachers, options, expected_grad, statistics=()):
        flat = [tap for pair in pairs_of(students) for tap in pair]
        arguments = students, teachers, list(statistics), flat, options["reduction"], options["normalize"]
        return flow_of_solution, (*arguments, expected_grad)

    def more_calls(self, students, teachers, options):
        operation, arguments = self.call(students, teachers, options, None)
        yield flow_statistics, (students, FLAT)
        wanting = [s.clone().requires_grad_() for s in students]
        yield self.call(wanting, [], self.cases[0], None, flow_statistics(students, FLAT))
        _, differences, scales, _ = operation(*arguments)
        yield flow_of_solution_backward, (torch.ones(len(PAIRS)), students, differences, scales, FLAT)

    # Values

    def test_closed_form_of_the_reference_is_its_derivative(self, options):
        students, teachers = self.maps()
        arguments = ([], FLAT, *options.values())
        detached = [s.detach() for s in students]
        losses, differences, scales, _ = reference.flow_of_solution_forward(detached, teachers, *arguments)
        expected, expected_gradients = with_gradients(reference.flow_of_solution, students, teachers, *arguments)
        grad = torch.arange(1, len(PAIRS) + 1, dtype=torch.float64)
        gradients = reference.flow_of_solution_backward(grad, detached, differences, scales, FLAT)
        torch.testing.assert_close(losses, expected, rtol=1e-13, atol=0)
        torch.testing.assert_close(gradients, list(expected_gradients), rtol=1e-11, atol=1e-15)

    def test_consecutive_taps_are_the_default(self, backend):
        students, teachers = self.maps()
        losses = functional.flow_of_solution(students, teachers)
        torch.testing.assert_close(losses, plain(students, teachers, pairs=[(0, 1), (1, 2)]), rtol=1e-12, atol=1e-14)
        named = functional.flow_of_solution(students, teachers, pairs=[(2, 0)])
        torch.testing.assert_close(named, plain(students, teachers, pairs=[(2, 0)]), rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("pool", ["avg", "max"])
    @pytest.mark.parametrize("sizes", [((8, 8), (4, 4)), ((4, 4), (8, 8)), ((7, 5), (3, 6))])
    def test_the_larger_map_of_a_pair_is_pooled(self, backend, pool, sizes):
        pools = {"avg": F.adaptive_avg_pool2d, "max": F.adaptive_max_pool2d}
        students = [torch.randn(2, 3 + i, *size, dtype=torch.float64).requires_grad_() for i, size in enumerate(sizes)]
        # Taps of the teacher have one size: only the student pools.
        teachers = [torch.randn(2, 3 + i, 6, 5, dtype=torch.float64) for i in range(2)]
        size = [min(pair) for pair in zip(*sizes, strict=True)]

        def pooled(students, teachers):
            return plain([pools[pool](s, size) for s in students], teachers)

        found = with_gradients(functional.flow_of_solution, students, teachers, pool=pool)
        torch.testing.assert_close(found, with_gradients(pooled, students, teachers), rtol=1e-10, atol=1e-14)

    def test_a_tap_is_pooled_for_one_pair_and_not_for_another(self, backend):
        shapes = [(2, 3, 8, 8), (2, 4, 8, 8), (2, 5, 4, 4)]
        students, teachers = ([torch.randn(shape, dtype=torch.float64) for shape in shapes] for _ in range(2))
        students = [s.requires_grad_() for s in students]

        def pooled(students, teachers):
            small = [[m[0], m[1], F.adaptive_avg_pool2d(m[1], 4), m[2]] for m in (students, teachers)]
            return plain(*small, pairs=[(0, 1), (2, 3)])

        found = with_gradients(functional.flow_of_solution, students, teachers)
        torch.testing.assert_close(found, with_gradients(pooled, students, teachers), rtol=1e-10, atol=1e-14)

    @pytest.mark.parametrize("axes", [1, 3])
    def test_one_and_three_spatial_axes(self, backend, axes):
        students, teachers = self.maps([(2, 3, *[4] * axes), (2, 5, *[2] * axes)])
        assert functional.flow_of_solution(students, teachers).shape == (1,)

    # Properties

    @pytest.mark.parametrize("normalize", [False, True])
    def test_grows_with_the_fourth_power_of_a_common_scale_unless_normalised(self, backend, normalize):
        students, teachers = self.maps()
        options = {"reduction": "mean", "normalize": normalize}
        scaled = self.operation([3 * s for s in students], [3 * t for t in teachers], options)
        expected = (1 if normalize else 81) * self.operation(students, teachers, options)
        torch.testing.assert_close(scaled, expected, rtol=1e-10, atol=1e-14)

    def test_invariant_to_the_order_of_the_batch_but_to_no_shift(self, backend):
        students, teachers = self.maps()
        expected, order = self.operation(students, teachers, self.cases[0]), torch.randperm(3)
        permuted = self.operation([s[order] for s in students], [t[order] for t in teachers], self.cases[0])
        torch.testing.assert_close(permuted, expected, rtol=1e-10, atol=1e-14)
        assert (self.operation([s + 1 for s in students], teachers, self.cases[0]) > expected + 0.1).all()

    @pytest.mark.parametrize("normalize", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_a_network_and_itself_have_zero_loss_and_gradient(self, backend, dtype, normalize):
        students = [torch.randn(shape).relu_() for shape in SHAPES]
        students[0][:, 1] = 0  # a dead channel
        students[1][2] = 0  # a dead sample
        students[2][:] = 1  # constant maps
        students = [s.to(dtype).requires_grad_() for s in students]
        teachers = [s.detach().clone() for s in students]
        options = {"reduction": "mean", "normalize": normalize}
        for given, statistics in ((teachers, ()), ([], flow_statistics(teachers, FLAT))):
            operation, (_, *arguments) = self.call(students, given, options, None, statistics)
            losses, gradients = with_gradients(lambda s, op=operation, a=arguments: op(s, *a)[0], students)
            assert not losses.any()
            assert not any(gradient.any() for gradient in gradients)

    def test_a_dead_teacher_has_no_loss_where_it_would_be_divided_by(self, backend):
        students, teachers = self.maps()
        teachers[1][0] = 0
        losses, gradients = with_gradients(self.operation, students, teachers, self.cases[1])
        alive = with_gradients(plain, [s[1:] for s in students], [t[1:] for t in teachers], normalize=True)
        torch.testing.assert_close(losses[:2], alive[0][:2] * 2 / 3, rtol=1e-10, atol=1e-14)
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert not gradients[1][0].any()

    def test_gradients_of_float16_values_of_1e4_do_not_vanish(self, backend):
        students, teachers = self.maps(dtype=torch.float32)
        students = [(1e4 * s.detach().clamp(-6, 6)).half().requires_grad_() for s in students]
        teachers = [(1e4 * t.clamp(-6, 6)).half() for t in teachers]
        _, gradients = with_gradients(self.operation, students, teachers, self.cases[0], scale=self.scale_of_1e4)
        assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)

    # Statistics

    def test_statistics_stand_for_the_teachers_maps(self, backend, options):
        students, teachers = self.maps()
        statistics = functional.flow_statistics(teachers, pairs=PAIRS)
        assert [list(g.shape) for g in statistics] == [[3, 5, 70], [3, 70, 9], [3, 5, 5], [3, 5, 9]]
        torch.testing.assert_close(statistics, reference.flow_statistics(teachers, FLAT), rtol=1e-12, atol=1e-14)
        expected = with_gradients(functional.flow_of_solution, students, teachers, pairs=PAIRS, **options)
        known = {"statistics": statistics, "pairs": PAIRS}
        found = with_gradients(functional.flow_of_solution, students, **known, **options)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)

    def test_statistics_of_single_samples_make_those_of_a_batch(self, backend):
        _, teachers = self.maps()
        alone = [functional.flow_statistics([t[b : b + 1] for t in teachers]) for b in range(3)]
        joined = [torch.cat(parts) for parts in zip(*alone, strict=True)]
        torch.testing.assert_close(joined, functional.flow_statistics(teachers), rtol=1e-12, atol=1e-14)

    def test_statistics_have_no_gradient(self, backend):
        students, _ = self.maps()
        assert not any(g.requires_grad for g in functional.flow_statistics(students))
        with pytest.raises(RuntimeError, match="statistics are the teacher's, and have no gradient"):
            flow_statistics(students, FLAT)[0].sum().backward()

    def test_an_unexpected_gradient_is_right_with_statistics_too(self, backward_runs):
        students, teachers = self.maps()
        known = {"statistics": functional.flow_statistics(teachers, pairs=PAIRS), "pairs": PAIRS}
        losses = functional.flow_of_solution(students, expected_grad=torch.ones(4), **known)
        gradients = torch.autograd.grad(3 * losses.sum(), students)
        assert backward_runs
        losses = functional.flow_of_solution(students, teachers, pairs=PAIRS)
        torch.testing.assert_close(gradients, torch.autograd.grad(3 * losses.sum(), students), rtol=1e-12, atol=1e-15)


def test_golden(backend):
    values = golden()
    students = [values[f"in.s{i}"].requires_grad_() for i in range(2)]
    losses = functional.flow_of_solution(students, [values[f"in.t{i}"] for i in range(2)])
    gradients = torch.autograd.grad(losses.sum(), students)
    torch.testing.assert_close(losses.sum().detach(), values["fsp_rep.loss"], rtol=1e-12, atol=1e-12)
    for i, gradient in enumerate(gradients):
        torch.testing.assert_close(gradient, values[f"fsp_rep.grad{i}"], rtol=1e-12, atol=1e-12)
