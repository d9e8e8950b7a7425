"""Attention maps of a network's taps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hyperfast
from hyperfast import models
from hyperfast.analysis import attention_maps


def test_maps_are_unit_vectors_of_summed_squares() -> None:
    network = models.create("resnet8", in_channels=1)
    images = torch.randn(3, 1, 8, 8)
    maps = attention_maps(network, images)
    assert {name: tuple(values.shape) for name, values in maps.items()} == {
        "layer1": (3, 8, 8),
        "layer2": (3, 4, 4),
        "layer3": (3, 2, 2),
    }
    network.eval()
    with torch.no_grad():
        features = network.layer1(network.relu(network.bn1(network.conv1(images))))  # type: ignore[operator]
    energy = features.square().sum(1)
    torch.testing.assert_close(maps["layer1"], energy / energy.flatten(1).norm(dim=1).view(-1, 1, 1))


def test_hypernetwork_and_its_model_have_the_same_names_and_the_mode_stays() -> None:
    model = models.create("resnet8", in_channels=1)
    student = hyperfast.hypernetize(model)
    images = torch.randn(2, 1, 8, 8)
    assert list(attention_maps(student, images)) == list(attention_maps(model, images))
    assert student.training
    before = {name: buffer.clone() for name, buffer in student.named_buffers()}
    attention_maps(student, images)
    assert all(torch.equal(buffer, before[name]) for name, buffer in student.named_buffers())


def test_no_picture_without_two_dimensions() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"taps no map \[B, C, H, W\].*1 \[3, 2\]"):
        attention_maps(network, torch.randn(3, 1, 2, 2), at="1")
