"""The contract of `hyperfast::fitnets`, and the normalisation by the teacher's variance."""

import pytest
import torch
from helpers import golden
from paired_contract import PairedContract, maps

from hyperfast import functional
from hyperfast.ops.fitnets import loss

DISPATCHER = loss.forward_implementations


def plain(students, teachers, normalize, reduction):
    losses = []
    for s, t in zip(students, teachers, strict=True):
        total = (s - t).square().sum()
        total = total / max(s.numel(), 1) if reduction == "mean" else total / (2 * max(len(s), 1))
        constant = not t.numel() or bool((t == t.flatten()[0]).all())
        if normalize == "teacher":
            total = total * 0 if constant else total / t.var(correction=0)
        losses.append(total)
    return torch.stack(losses)


class TestFitNets(PairedContract):
    loss = loss
    public = staticmethod(functional.fitnets)
    plain = staticmethod(plain)
    cases = tuple({"normalize": n, "reduction": r} for n in ("none", "teacher") for r in ("mean", "batch"))
    arguments = staticmethod(lambda normalize, reduction: (normalize == "teacher", reduction))


def test_golden(backend):
    values = golden()
    student = values["in.s0"].requires_grad_()
    losses = functional.fitnets([student], [values["in.t0"]])
    (gradient,) = torch.autograd.grad(losses.sum(), student)
    torch.testing.assert_close(losses[0].detach(), values["fitnet_rep.loss"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, values["fitnet_rep.grad0"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("value", [0.1, 1000.3])
def test_a_constant_teacher_has_no_scale(backend, dtype, value):
    student = torch.randn(3, 7, 31, 33).to(dtype).requires_grad_()
    losses = functional.fitnets([student], [torch.full_like(student, value)], normalize="teacher")
    losses.sum().backward()
    assert losses == 0 and not student.grad.any()


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_variance_of_a_map_far_from_zero(backend, offset):
    student, teacher = torch.randn(4, 16, 33, 33), torch.randn(4, 16, 33, 33) + offset
    losses = functional.fitnets([student], [teacher], normalize="teacher")
    expected = plain([student.double()], [teacher.double()], "teacher", "mean")
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("normalize", ["none", "teacher"])
def test_invariances(backend, normalize):
    students, teachers = maps()

    def losses(change_student, change_teacher):
        pair = [change_student(s) for s in students], [change_teacher(t) for t in teachers]
        return functional.fitnets(*pair, normalize=normalize)

    same = losses(lambda x: x, lambda x: x)
    torch.testing.assert_close(losses(lambda x: x + 3, lambda x: x + 3), same)
    assert (losses(lambda x: x + 3, lambda x: x) != same).all()
    assert (losses(lambda x: 2 * x, lambda x: x) != same).all()
    together = losses(lambda x: 2 * x, lambda x: 2 * x)
    torch.testing.assert_close(together, same if normalize == "teacher" else 4 * same)


@pytest.mark.parametrize("normalize", ["none", "teacher"])
def test_reductions_convert(backend, normalize):
    students, teachers = maps()
    mean, batch = (functional.fitnets(students, teachers, normalize=normalize, reduction=r) for r in ("mean", "batch"))
    torch.testing.assert_close(batch, mean * torch.tensor([s[0].numel() / 2 for s in students]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize": "batch"}, "normalize is 'batch'; choose one of 'none', 'teacher'"),
        ({"reduction": "sum"}, "reduction is 'sum'; choose one of 'mean', 'batch'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        functional.fitnets(*maps(), **options)
