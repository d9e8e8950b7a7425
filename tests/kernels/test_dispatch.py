"""The operations reach the Triton kernels, and give what the reference gives."""

import pytest
import torch

import hyperfast
from hyperfast import functional

pytestmark = pytest.mark.interpreter


def _results(backend):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 5, 5, requires_grad=True), torch.randn(2, 6, 5, 5)
    weight, bias = torch.randn(5, 2, requires_grad=True), torch.randn(5, requires_grad=True)
    head, theta0 = torch.randn(40, 5, requires_grad=True), torch.randn(40, requires_grad=True)
    with hyperfast.use_backend(backend):
        losses = functional.attention_transfer([student], [teacher])
        theta = functional.generate(torch.tensor([0.3]), [weight], [bias], head, theta0)
        total = 1000 * losses.sum() + theta.square().sum()
        return [losses, theta, *torch.autograd.grad(total, [student, weight, bias, head, theta0])]


def test_triton_through_the_operations():
    for found, expected in zip(_results("triton"), _results("reference"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
