"""Counts and names of the CIFAR VGGs."""

import pytest
import torch
from torch import nn

from hyperfast import models


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [
        ("vgg11_bn", 9_802_596, 38),
        ("vgg13_bn", 9_987_492, 46),
        ("vgg16_bn", 15_299_748, 58),
        ("vgg19_bn", 20_612_004, 70),
    ],
)
def test_the_zoo_s_counts(name, parameters, tensors):
    with torch.device("meta"):
        model = models.create(name, num_classes=100)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert len(list(model.parameters())) == tensors


def test_the_zoo_s_names():
    model = models.vgg19_bn(width=2)
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    indices = (0, 3, 7, 10, 14, 17, 20, 23, 27, 30, 33, 36, 40, 43, 46, 49)
    assert convolutions == [f"features.{k}" for k in indices]
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert linears == ["classifier.0", "classifier.3", "classifier.6"]


@pytest.mark.parametrize("size", [32, 64])
def test_logits_of_images_from_32_pixels(size):
    model = models.create("vgg11_bn", num_classes=7, in_channels=1, width=4).eval()
    assert model.features(torch.randn(2, 1, 32, 32)).shape == (2, 32, 1, 1)
    assert model(torch.randn(2, 1, size, size)).shape == (2, 7)
