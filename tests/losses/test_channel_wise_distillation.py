"""The module over taps; the arithmetic itself is tested in tests/ops/test_channel_wise_distillation.py."""

import pytest
import torch

from hyperfast import functional
from hyperfast.losses import ChannelWiseDistillation


def maps():
    return [torch.randn(shape) for shape in ((2, 3, 4, 4), (2, 5, 3), (2, 4, 1, 1))]


def test_options_reach_the_operation():
    student, teacher = maps(), maps()
    loss = ChannelWiseDistillation(temperature=2.0, beta=3.0)
    expected = functional.channel_wise_distillation(student, teacher, temperature=2.0)
    torch.testing.assert_close(loss(student, teacher), 3 * expected.mean())
    assert torch.equal(loss.last, expected)


def test_equal_maps_and_maps_of_one_position():
    student = [features.requires_grad_() for features in maps()]
    loss = ChannelWiseDistillation()
    value = loss(student, [features.detach() for features in student])
    value.backward()
    assert value == 0 and not any(features.grad.any() for features in student)
    assert loss(student, maps()) > 0 and loss.last[2] == 0


def test_compiled_with_fullgraph():
    torch.compiler.reset()
    loss, student, teacher = ChannelWiseDistillation(weights=[1.0, 2.0, 3.0]), maps(), maps()
    expected = loss(student, teacher)
    torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="aot_eager")(student, teacher), expected)


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match="temperature is .*; expected a positive number"):
        ChannelWiseDistillation(temperature)


def test_repr_shows_the_options():
    assert repr(ChannelWiseDistillation(2)) == "ChannelWiseDistillation(temperature=2.0)"
