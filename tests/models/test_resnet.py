"""Shortcuts and shapes of the CIFAR ResNets; test_zoo.py has their sizes and names."""

import pytest
import torch
import torch.nn.functional as F

from hyperfast import models
from hyperfast.models.resnet import ZeroPadShortcut


def test_shortcut_a_has_no_parameters():
    with_a, with_b = (models.create("resnet20", shortcut=shortcut).state_dict() for shortcut in "AB")
    only_b = {name for name in with_b if name.split(".")[2:3] == ["downsample"]}
    assert with_b.keys() - with_a.keys() == only_b
    assert {name.rpartition(".downsample.")[0] for name in only_b} == {"layer2.0", "layer3.0"}
    assert with_a.keys() < with_b.keys()


def test_shortcut_a_subsamples_and_pads_channels_with_zeros_on_both_sides():
    x = torch.randn(2, 4, 6, 6)
    y = ZeroPadShortcut(4, 8, 2)(x)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert not y[:, :2].any()
    assert not y[:, 6:].any()


def test_a_block_is_what_it_says():
    block = models.resnet8(width=4, shortcut="B").eval().layer2[0]
    x = torch.randn(2, 4, 8, 8)
    inner = F.relu(block.bn1(block.conv1(x)))
    expected = F.relu(block.bn2(block.conv2(inner)) + block.downsample(x))
    assert torch.equal(block(x), expected)


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_stage_shapes(shortcut):
    model = models.create("resnet20", num_classes=7, shortcut=shortcut).eval()
    shapes = []
    for stage in (model.layer1, model.layer2, model.layer3):
        stage.register_forward_hook(lambda module, inputs, output: shapes.append(list(output.shape)))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert shapes == [[2, 16, 32, 32], [2, 32, 16, 16], [2, 64, 8, 8]]


def test_resnet8_takes_digits():
    model = models.create("resnet8", in_channels=1)
    assert model(torch.randn(5, 1, 8, 8)).shape == (5, 10)
    assert sum(parameter.numel() for parameter in model.parameters()) < 20_000


def test_an_unknown_shortcut_is_named():
    with pytest.raises(ValueError, match="shortcut is 'C'; choose 'A' or 'B'"):
        models.resnet20(shortcut="C")
