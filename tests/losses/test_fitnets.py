"""The module over taps; the arithmetic itself is tested in tests/ops/test_fitnets.py."""

import torch
from helpers import golden as load_golden

from hyperfast.losses import FitNets

GOLDEN = load_golden()


def golden(name):
    return [GOLDEN[f"in.{name}{i}"] for i in range(3)]


def test_golden():
    student = GOLDEN["in.s0"].requires_grad_()
    loss = FitNets()([student], [GOLDEN["in.t0"]])
    torch.testing.assert_close(loss.detach(), GOLDEN["fitnet_rep.loss"], rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, GOLDEN["fitnet_rep.grad0"], rtol=1e-12, atol=1e-12)


def test_options_reach_the_operation():
    students, teachers = golden("s"), golden("t")
    loss = FitNets(normalize="teacher", reduction="batch", weights=[1.0] * 3)(students, teachers)
    pairs = zip(students, teachers, strict=True)
    expected = sum((s - t).square().sum() / 2 / len(s) / t.var(correction=0) for s, t in pairs)
    torch.testing.assert_close(loss, expected)


def test_equal_maps():
    student = [features.requires_grad_() for features in golden("s")]
    loss = FitNets("teacher")(student, [features.detach() for features in student])
    loss.backward()
    assert loss == 0 and not any(features.grad.any() for features in student)


def test_compiled_with_fullgraph():
    torch.compiler.reset()
    loss = FitNets("teacher", weights=[1.0, 2.0, 3.0])
    expected = loss(golden("s"), golden("t"))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(golden("s"), golden("t")), expected)


def test_repr_shows_the_options():
    assert repr(FitNets("teacher")) == "FitNets(normalize='teacher', reduction='mean')"
