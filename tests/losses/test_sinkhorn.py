"""Optimal transport: the plan, both gradients, and the loss over logits; test_plain_losses.py has the one over maps."""

import pytest
import torch

from hyperfast.losses import LocalWasserstein, SinkhornDistillation, transport_cost


def literal(cost, epsilon=0.1, iterations=20):
    """Kernels multiplied and divided, as in the authors' code: the value and the plan."""
    plan = (-cost / epsilon).exp()
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return (plan * cost).sum(), plan


def literal_sinkd(student, teacher):
    p, q = (student / 2).softmax(1), (teacher / 2).softmax(1)
    return literal((p[:, None] - q[None]).abs().sum(2))[0]


def costs(rows=5, columns=5, seed=0):
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logits(dtype=torch.float64, seed=0, batch=6):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(batch, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


@pytest.mark.parametrize(("rows", "columns"), [(5, 5), (4, 7)])
@pytest.mark.parametrize("iterations", [1, 20])
def test_value_and_unrolled_gradient_are_those_of_the_kernels(rows, columns, iterations):
    cost = costs(rows, columns).requires_grad_()
    found, expected = transport_cost(cost, 0.1, iterations), literal(cost, 0.1, iterations)[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, cost)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-14)
    assert torch.autograd.gradcheck(lambda c: transport_cost(c, 0.1, iterations), cost)


def test_the_envelope_gradient_is_the_plan_and_another_one():
    cost = costs().requires_grad_()
    value, plan = literal(cost)
    envelope = transport_cost(cost, 0.1, 20, "envelope")
    torch.testing.assert_close(envelope, value, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(envelope, cost)
    torch.testing.assert_close(gradient, plan.detach(), rtol=1e-10, atol=1e-14)
    assert not torch.allclose(gradient, torch.autograd.grad(transport_cost(cost, 0.1, 20), cost)[0], rtol=0.01)


def test_rows_and_columns_of_the_plan_sum_to_one():
    cost = costs().requires_grad_()
    (plan,) = torch.autograd.grad(transport_cost(cost, 0.1, 200, "envelope"), cost)
    ones = torch.ones(5, dtype=torch.float64)
    torch.testing.assert_close(plan.sum(0), ones, rtol=1e-12, atol=0)
    torch.testing.assert_close(plan.sum(1), ones, rtol=1e-6, atol=0)


def test_a_sharp_plan_is_an_assignment_and_underflows_nowhere():
    cost = (1 - torch.eye(4)[[2, 0, 3, 1]]).requires_grad_()
    assert not literal(cost, 1e-3)[0].isnan() and transport_cost(cost + 50, 1e-3, 20).item() == pytest.approx(200)
    assert literal(cost + 50, 1e-3)[0].isnan()  # every kernel is 0
    (plan,) = torch.autograd.grad(transport_cost(cost + 50, 1e-3, 20, "envelope"), cost)
    torch.testing.assert_close(plan, 1 - cost.detach())


@pytest.mark.parametrize("gradient", ["unrolled", "envelope"])
def test_no_images_cost_nothing(gradient):
    cost = torch.zeros(0, 0, requires_grad=True)
    loss = transport_cost(cost, 0.1, 20, gradient)
    loss.backward()
    assert loss == 0


def test_distillation_of_logits_written_out():
    student, teacher = logits()
    found, expected = SinkhornDistillation()([student], [teacher]), literal_sinkd(student, teacher)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-14)


def test_gradcheck():
    (a, s), (b, t) = logits(seed=1), logits(seed=2)
    loss = SinkhornDistillation(weights=[1.0, 0.3], iterations=5)
    assert torch.autograd.gradcheck(lambda *pair: loss(pair, (s, t)), (a, b))


def test_the_envelope_gradient_of_logits():
    """P times the sign of every difference, through the softmax."""
    student, teacher = logits()
    SinkhornDistillation(gradient="envelope")([student], [teacher]).backward()
    p, q = (student.detach() / 2).softmax(1), (teacher / 2).softmax(1)
    difference = p[:, None] - q[None]
    plan = literal(difference.abs().sum(2))[1]
    by_p = (plan[:, :, None] * difference.sign()).sum(1)
    expected = p * (by_p - (p * by_p).sum(1, keepdim=True)) / 2
    torch.testing.assert_close(student.grad, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_arithmetic_is_float32_also_under_autocast(dtype):
    student, teacher = logits(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = SinkhornDistillation()([student], [teacher])
    found.backward()
    assert found.dtype == torch.float32 and student.grad.dtype == dtype
    expected = literal_sinkd(student.detach().double(), teacher.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_the_order_of_the_batch_is_free():
    student, teacher = logits()
    for kind in (SinkhornDistillation, LocalWasserstein):
        loss = kind(iterations=100)
        torch.testing.assert_close(loss([student], [teacher.roll(2, 0)]), loss([student], [teacher]))


def test_it_is_a_sum_over_the_batch():
    student, teacher = (x.detach() for x in logits())
    once, twice = (SinkhornDistillation()([s], [t]) for s, t in ((student, teacher), (student.repeat(2, 1),) * 2))
    assert once > 0 and twice > SinkhornDistillation()([student], [student])
    torch.testing.assert_close(
        SinkhornDistillation()([student.repeat(2, 1)], [teacher.repeat(2, 1)]), 2 * once, rtol=1e-9, atol=0
    )


def test_compiled_with_fullgraph():
    torch.compiler.reset()
    student, teacher = logits(torch.float32)
    loss = SinkhornDistillation(iterations=3)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled([student], [teacher]), loss([student], [teacher]))


@pytest.mark.parametrize("kind", [SinkhornDistillation, LocalWasserstein])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 0}, "epsilon is 0; expected a positive number"),
        ({"iterations": 0}, "iterations is 0; it must be at least 1"),
        ({"gradient": "implicit"}, "gradient is 'implicit'; choose one of 'unrolled', 'envelope'"),
    ],
)
def test_options(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_bad_input():
    with pytest.raises(ValueError, match="temperature is -1; expected a positive number"):
        SinkhornDistillation(temperature=-1)
    for student, teacher in ((torch.randn(6, 7), torch.randn(6, 5)), (torch.randn(6, 7, 1),) * 2):
        with pytest.raises(ValueError, match=r"student logits \[6, 7.*, teacher logits .*expected \[B, classes\] for"):
            SinkhornDistillation()([student], [teacher])
