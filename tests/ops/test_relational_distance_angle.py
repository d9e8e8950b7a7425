"""The contract of `hyperfast::relational_distance_angle`, on every backend."""

import sys

import pytest
import torch
import torch.nn.functional as F
from gram_contract import GramContract
from helpers import golden
from map_loss_contract import with_gradients

from hyperfast import functional
from hyperfast.backends import use_backend
from hyperfast.ops.relational_distance_angle import forward_implementations

DISPATCHER = forward_implementations


def plain(students, teachers, distance=25.0, angle=50.0, normalize=False):
    """As the projects write it."""
    losses = []
    for s, t in zip(students, teachers, strict=True):
        own, other = (F.normalize(x.flatten(1), dim=1) if normalize else x.flatten(1) for x in (s, t))
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


class TestRelationalDistanceAngle(GramContract):
    name = "relational_distance_angle"
    statistics_name = "relational_statistics"
    ops = sys.modules["hyperfast.ops.relational_distance_angle"]
    parameters = (25.0, 50.0)
    plain = staticmethod(plain)
    centred = True
    batches = (2, 16, 35)

    @pytest.mark.parametrize(("distance", "angle"), [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
    def test_either_term_alone(self, backend, distance, angle):
        self.assert_exact(*self.maps(), {"distance": distance, "angle": angle})

    def test_normalised_embeddings(self, backend):
        students, teachers = self.maps()
        found = with_gradients(self.public, students, teachers, normalize=True)
        expected = with_gradients(plain, students, teachers, normalize=True)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
        known = self.statistics(teachers, normalize=True)
        again = self.public(students, statistics=known, normalize=True)
        torch.testing.assert_close(again.detach(), found[0], rtol=1e-12, atol=1e-14)

    def test_a_zero_embedding_stays_zero_when_normalised(self, backend):
        student = torch.randn(4, 6)
        student[1] = 0
        student.requires_grad_()
        loss = self.public([student], [torch.randn(4, 6)], normalize=True)
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        assert gradient.isfinite().all() and not gradient[1].any() and gradient[0].any()

    def test_a_large_common_mean_costs_no_accuracy(self, backend):
        students, teachers = self.maps([(9, 3000), (9, 40, 8, 8)], torch.float32)
        students = [(s.detach() + 1000).requires_grad_() for s in students]
        losses, gradients = with_gradients(self.operation, students, teachers, {})
        exact = [s.detach().double().requires_grad_() for s in students]
        expected, expected_gradients = with_gradients(plain, exact, [t.double() for t in teachers])
        torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=0)
        for gradient, close in zip(gradients, expected_gradients, strict=True):
            assert (gradient.double() - close).norm() < 1e-4 * close.norm()

    def test_angles_that_differ_by_more_than_the_hubers_threshold(self, backend):
        student = torch.tensor([[0.0, 0], [1, 0], [2, 0.1], [0.5, -3]], dtype=torch.float64, requires_grad=True)
        teacher = torch.tensor([[1.0, 0], [0, 0], [2, 0], [0.1, 0.2]], dtype=torch.float64)
        assert (cosines(student) - cosines(teacher)).abs().max() > 1
        found = with_gradients(self.operation, [student], [teacher], {})
        torch.testing.assert_close(found, with_gradients(plain, [student], [teacher]), rtol=1e-10, atol=1e-13)

    def test_two_samples_have_nothing_to_differ_in(self, backend):
        students, teachers = self.maps([(2, 3, 4, 4)])
        losses, gradients = with_gradients(self.operation, students, teachers, {})
        assert losses.abs().max() < 1e-14 and gradients[0].abs().max() < 1e-12

    def test_equal_samples_have_finite_gradients(self, backend):
        """Where the teacher tells apart what the student does not, the projects' gradients are 1e12 times too large."""
        students, teachers = self.maps(dtype=torch.float32)
        with torch.no_grad():
            for s in students:
                s[0] = s[1]
            students[2][:] = 1  # all of them
        losses, gradients = with_gradients(self.operation, students, teachers, {})
        assert losses.isfinite().all() and (losses > 0).all()
        for index, gradient in enumerate(gradients):
            assert gradient.isfinite().all() and gradient.abs().max() < 1e3
            assert gradient.any() == (index != 2)
        with use_backend("reference"):
            exact = [s.detach().double().requires_grad_() for s in students]
            expected, expected_gradients = with_gradients(self.public, exact, teachers)
        torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=0)
        for gradient, close in zip(gradients, expected_gradients, strict=True):
            assert (gradient.double() - close).norm() <= 1e-4 * close.norm()

    @pytest.mark.parametrize("samples", [0, 1])
    def test_empty_batch(self, samples):
        students, teachers = self.maps([(samples, 4, 3, 3)])
        message = rf"a batch of {samples}; relations need at least two samples, and three to have a loss: use drop_last"
        with pytest.raises(ValueError, match=f"{message}=True"):
            self.public(students, teachers)
        with pytest.raises(ValueError, match=f"{message}=True"):
            self.statistics(teachers)


@pytest.mark.parametrize(("case", "weights"), [("rkd_rep", {}), ("rkd_rep_d", {"distance": 1, "angle": 0})])
def test_golden(backend, case, weights):
    values = golden()
    student = values["in.s2"].requires_grad_()
    (loss,) = functional.relational_distance_angle([student], [values["in.t2"]], **weights)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(loss.detach(), values[f"{case}.loss"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, values[f"{case}.grad0"], rtol=1e-12, atol=1e-12)
