"""Shapes of the CIFAR VGGs; test_zoo.py has their sizes and names."""

import pytest
import torch

from hyperfast import models


@pytest.mark.parametrize("size", [32, 64])
def test_logits_of_images_from_32_pixels(size):
    model = models.create("vgg11_bn", num_classes=7, in_channels=1, width=4).eval()
    assert model.features(torch.randn(2, 1, 32, 32)).shape == (2, 32, 1, 1)
    assert model(torch.randn(2, 1, size, size)).shape == (2, 7)
