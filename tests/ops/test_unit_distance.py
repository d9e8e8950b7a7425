"""The contract of `hyperfast::unit_distance`: factor transfer's distance and that of NeRN's feature maps."""

import pytest
import torch
from helpers import golden
from map_loss_contract import with_gradients
from paired_contract import PairedContract, maps

from hyperfast import functional
from hyperfast.ops.unit_distance import loss

DISPATCHER = loss.forward_implementations
NERN = {"p": 2, "eps": 1e-3, "added": True, "reduction": "batch"}


def plain(students, teachers, p=1, eps=1e-12, added=False, reduction="mean"):
    """Sample by sample."""
    losses = []
    for s, t in zip(students, teachers, strict=True):
        total = 0 * s.sum()
        for x, y in zip(s.flatten(1), t.flatten(1), strict=True):
            # The norm of a zero row has no gradient; torch's is zero.
            if added:
                difference = x / (x.norm() + eps) - y / (y.norm() + eps)
            elif x.norm() > eps and y.norm() > eps:
                difference = x / x.norm() - y / y.norm()
            else:
                continue
            total = total + (difference.abs().sum() if p == 1 else difference.square().sum())
        losses.append(total / max(s.numel() if reduction == "mean" else len(s), 1))
    return torch.stack(losses)


class TestUnitDistance(PairedContract):
    loss = loss
    public = staticmethod(functional.unit_distance)
    plain = staticmethod(plain)
    cases = ({"p": 1}, {"p": 2, "reduction": "batch"}, {"p": 1, "eps": 1e-3, "added": True}, NERN)
    arguments = staticmethod(lambda p, eps=1e-12, added=False, reduction="mean": (p, eps, added, reduction))


def test_golden(backend):
    values = golden()
    student = values["in.s0"].requires_grad_()
    losses = functional.unit_distance([student], [values["in.t0"]])
    (gradient,) = torch.autograd.grad(losses.sum(), student)
    torch.testing.assert_close(losses[0].detach(), values["ft_zoo.loss"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, values["ft_zoo.grad0"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("p", [1, 2])
def test_a_sample_without_direction_contributes_nothing(backend, p):
    students, teachers = maps([(4, 5, 6)])
    with torch.no_grad():
        students[0][0] = 0
        teachers[0][1] = 0
        students[0][2] *= 1e-14
    losses, (gradient,) = with_gradients(lambda s, t: functional.unit_distance(s, t, p=p), students, teachers)
    alone = functional.unit_distance([students[0][3:]], [teachers[0][3:]], p=p)
    torch.testing.assert_close(losses, alone.detach() / 4)
    assert gradient[:3].any() == False and gradient[3].all()  # noqa: E712


def test_where_eps_is_added_a_zero_sample_is_the_origin(backend):
    students, teachers = maps([(2, 5, 6)])
    students[0].data[:] = 0
    losses, (gradient,) = with_gradients(lambda s, t: functional.unit_distance(s, t, **NERN), students, teachers)
    unit = teachers[0] / (teachers[0].flatten(1).norm(dim=1).view(2, 1, 1) + 1e-3)
    torch.testing.assert_close(losses[0], unit.square().sum() / 2)
    torch.testing.assert_close(gradient, -unit / 1e-3)


@pytest.mark.parametrize("p", [1, 2])
def test_invariant_to_the_scale_of_every_sample(backend, p):
    students, teachers = maps()
    losses = functional.unit_distance(students, teachers, p=p)
    scales = torch.tensor([1e-3, 1.0, 50.0], dtype=torch.float64)

    def scaled(features):
        return features * scales.view(-1, *[1] * (features.ndim - 1))

    found = functional.unit_distance([scaled(s) for s in students], [scaled(t.flip(0)).flip(0) for t in teachers], p=p)
    torch.testing.assert_close(found, losses, rtol=1e-12, atol=0)
    assert (functional.unit_distance([s + 1 for s in students], teachers, p=p) != losses).all()
    assert (functional.unit_distance([s + 1 for s in students], [t + 1 for t in teachers], p=p) != losses).all()


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("added", [False, True])
def test_reductions_convert(backend, p, added):
    students, teachers = maps()
    mean, batch = (
        functional.unit_distance(students, teachers, p=p, added=added, reduction=r) for r in ("mean", "batch")
    )
    torch.testing.assert_close(batch, mean * torch.tensor([s[0].numel() for s in students]))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"p": 3}, "p is 3; choose 1 or 2"), ({"reduction": "sum"}, "reduction is 'sum'; choose one of 'mean', 'batch'")],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        functional.unit_distance(*maps(), **options)
