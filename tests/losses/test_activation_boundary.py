"""The module over taps; the arithmetic itself is tested in tests/ops/test_activation_boundary.py."""

import pytest
import torch
from helpers import golden as load_golden
from torch import nn

from hyperfast import functional
from hyperfast.losses import ActivationBoundary
from hyperfast.surgery import taps

GOLDEN = load_golden()


def golden(name):
    return [GOLDEN[f"in.{name}{i}"] for i in range(3)]


def test_halving_is_the_official_total():
    student = [features.requires_grad_() for features in golden("s")]
    loss = ActivationBoundary(reduction="batch", halving=True)(student, golden("t"))
    torch.testing.assert_close(loss.detach(), GOLDEN["ab_rep.loss"], rtol=1e-12, atol=1e-12)
    for index, gradient in enumerate(torch.autograd.grad(loss, student)):
        torch.testing.assert_close(gradient, GOLDEN[f"ab_rep.grad{index}"], rtol=1e-12, atol=1e-12)


def test_options_reach_the_operation():
    loss = ActivationBoundary(margin=2.0)(golden("s")[:1], golden("t")[:1])
    torch.testing.assert_close(loss, GOLDEN["ab_zoo_m2.loss"], rtol=1e-12, atol=1e-12)


def test_default_weights_are_one_over_the_number_of_taps():
    loss = ActivationBoundary()
    torch.testing.assert_close(loss(golden("s"), golden("t")), loss.last.mean())


def test_packed_teachers_and_the_mismatch():
    loss = ActivationBoundary()
    assert loss.mismatch is None
    expected = loss(golden("s"), golden("t"))
    mismatch = torch.stack(
        [((s > 0) != (t > 0)).double().mean() for s, t in zip(golden("s"), golden("t"), strict=True)]
    )
    torch.testing.assert_close(loss.mismatch, mismatch)
    known = loss.compress(golden("t"))
    assert loss.per_sample and all(map(torch.equal, known, functional.pack_signs(golden("t"))))
    torch.testing.assert_close(loss(golden("s"), statistics=known), expected)


def test_on_taps_of_two_networks_steps_lower_loss_and_mismatch():
    def network():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 3, stride=2), nn.ReLU())

    student, teacher, images = network(), network().eval(), torch.randn(4, 3, 9, 9)
    loss, optimiser = ActivationBoundary(), torch.optim.SGD(student.parameters(), lr=0.1)
    values = []
    for _ in range(30):
        with taps(student, teacher, at="activations") as record:
            student(images)
            with torch.no_grad():
                teacher(images)
        value = loss(record.student, record.teacher)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        values.append((value.item(), loss.mismatch.mean().item()))
    assert values[-1] < values[0] and values[-1][1] < values[0][1]
    assert len(loss.last_names) == 2


def test_compiled_with_fullgraph():
    torch.compiler.reset()
    loss = ActivationBoundary(weights=[1.0, 2.0, 3.0])
    expected = loss(golden("s"), golden("t"))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(golden("s"), golden("t")), expected)


def test_halving_and_weights_are_two_ways_to_say_the_same():
    with pytest.raises(ValueError, match="weights were given and halving is on"):
        ActivationBoundary(halving=True, weights=[1.0])


def test_repr_shows_the_options():
    assert repr(ActivationBoundary()) == "ActivationBoundary(margin=1.0, reduction='mean')"
    expected = "ActivationBoundary(margin=2.0, reduction='batch', halving=True)"
    assert repr(ActivationBoundary(2.0, "batch", halving=True)) == expected
