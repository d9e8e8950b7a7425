"""The contract of `hyperfast::similarity_preserving`, on every backend."""

import sys

import torch
import torch.nn.functional as F
from gram_contract import GramContract
from helpers import golden
from map_loss_contract import with_gradients

from hyperfast import functional
from hyperfast.backends import use_backend
from hyperfast.ops.similarity_preserving import forward_implementations

DISPATCHER = forward_implementations


def plain(students, teachers):
    """As the projects write it."""
    losses = []
    for s, t in zip(students, teachers, strict=True):
        own, other = (F.normalize(x @ x.t(), dim=1) for x in (s.flatten(1), t.flatten(1)))
        losses.append((other - own).square().sum() / max(len(s), 1) ** 2)
    return torch.stack(losses)


class TestSimilarityPreserving(GramContract):
    name = "similarity_preserving"
    statistics_name = "similarity_statistics"
    ops = sys.modules["hyperfast.ops.similarity_preserving"]
    plain = staticmethod(plain)
    centred = False
    batches = (2, 16, 35, 130)

    def test_dead_samples_have_finite_gradients(self, backend):
        students, teachers = self.maps(dtype=torch.float32)
        with torch.no_grad():
            for s, t in zip(students, teachers, strict=True):
                s[0] = 0
                t[1] = 0
        losses, gradients = with_gradients(self.operation, students, teachers, {})
        assert losses.isfinite().all()
        for gradient in gradients:
            assert gradient.isfinite().all() and gradient.abs().max() < 1
            assert gradient[2].any()
        with use_backend("reference"):
            _, expected = with_gradients(functional.similarity_preserving, students, teachers)
        torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-6)

    def test_gradients_larger_than_the_caches(self, backend):
        student, teacher = torch.randn(3, 1_500_001, requires_grad=True), torch.randn(3, 50)
        _, (gradient,) = with_gradients(self.operation, [student], [teacher], {})
        _, (expected,) = with_gradients(plain, [student.detach().double().requires_grad_()], [teacher.double()])
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-6 * expected.abs().max().item())

    def test_one_sample_is_like_itself(self, backend):
        students, teachers = self.maps([(1, 3, 4, 4)])
        losses, gradients = with_gradients(self.operation, students, teachers, {})
        assert losses.abs().max() < 1e-15 and gradients[0].abs().max() < 1e-12


def test_golden(backend):
    values = golden()
    students = [values[f"in.s{i}"].requires_grad_() for i in range(3)]
    losses = functional.similarity_preserving(students, [values[f"in.t{i}"] for i in range(3)])
    gradients = torch.autograd.grad(losses.sum(), students)
    torch.testing.assert_close(losses.sum().detach(), values["sp_rep.loss"], rtol=1e-12, atol=1e-12)
    for i, gradient in enumerate(gradients):
        torch.testing.assert_close(gradient, values[f"sp_rep.grad{i}"], rtol=1e-12, atol=1e-12)
