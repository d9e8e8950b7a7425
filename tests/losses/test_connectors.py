"""A connector has the teacher's shape, the documented layers and start, and says what it cannot connect."""

import math

import pytest
import torch
from torch import nn

from hyperfast.losses import Connector


@pytest.mark.parametrize(
    ("student", "teacher", "layer", "kernel"),
    [
        ((4, 8, 8), (6, 8, 8), nn.Conv2d, (1, 1)),
        ((4, 8, 8), (6, 4, 4), nn.Conv2d, (3, 3)),
        ((4, 4, 4), (6, 8, 8), nn.ConvTranspose2d, (4, 4)),
        ((4, 9, 9), (6, 4, 4), nn.Conv2d, (1, 1)),
        ((4, 3, 3), (6, 8, 8), nn.Conv2d, (1, 1)),
        ((4, 8, 4), (6, 4, 4), nn.Conv2d, (1, 1)),
    ],
)
@pytest.mark.parametrize("kind", ["conv", "regressor"])
def test_shapes_and_layers(student, teacher, layer, kernel, kind):
    connector = Connector(student, teacher, kind)
    found = connector(torch.randn(5, *student))
    assert found.shape == (5, *teacher)
    assert type(connector.layer) is layer and connector.layer.kernel_size == kernel and connector.layer.bias is None
    assert (found.min() >= 0) == (kind == "regressor")
    found.square().mean().backward()
    assert connector.layer.weight.grad.any()


def test_vectors():
    connector = Connector((4,), (6,))
    assert connector(torch.randn(5, 4)).shape == (5, 6) and isinstance(connector.layer, nn.Linear)


def test_a_size_of_the_same_kind_is_only_convolved():
    connector = Connector((4, 8, 8), (6, 8, 8)).eval()
    images = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(connector(images), connector.norm(connector.layer(images)))


@pytest.mark.parametrize(("shapes", "taps"), [(((64, 8, 8), (96, 8, 8)), 1), (((64, 8, 8), (96, 4, 4)), 9)])
def test_weights_start_from_the_documented_variance(shapes, taps):
    torch.manual_seed(0)
    connector = Connector(*shapes)
    assert float(connector.layer.weight.detach().std()) == pytest.approx(math.sqrt(2 / (taps * 96)), rel=0.05)
    assert (connector.norm.weight == 1).all() and (connector.norm.bias == 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((4, 8), (6, 8)), r"no connector leads from a map \[4, 8\] to one \[6, 8\]"),
        (((4, 8, 8), (6,)), r"no connector leads from a map \[4, 8, 8\] to one \[6\]"),
        (((4,), (6,), "linear"), "kind is 'linear'; choose one of 'conv', 'regressor'"),
    ],
)
def test_what_cannot_be_connected(arguments, message):
    with pytest.raises(ValueError, match=message):
        Connector(*arguments)
