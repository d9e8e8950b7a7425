"""Branches behind stages: layers, shapes, where tokens go, initial weights, and what cannot be projected."""

import pytest
import torch
from torch import nn

from hyperfast.losses import StageProjector
from hyperfast.losses.projectors import PatchMerging, SeparableConv


def channels(projector):
    return [m.out_channels for m in projector.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]


@pytest.mark.parametrize(
    ("remaining", "expected"),
    [(0, [10]), (1, [4, 10]), (2, [4, 8, 8, 10]), (3, [4, 8, 8, 16, 16, 10])],
)
def test_channels_double_up_to_the_width(remaining, expected):
    projector = StageProjector((4, 16, 16), remaining, 10)
    assert channels(projector) == expected
    assert projector(torch.randn(2, 4, 16, 16)).shape == (2, 10) and projector.width == 10


def test_a_separable_convolution_halves_the_map_and_has_its_layers():
    layers = SeparableConv(4, 6)
    assert [type(layer) for layer in layers] == [nn.Conv2d, nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 2
    assert [(c.groups, c.stride, c.kernel_size) for c in layers if isinstance(c, nn.Conv2d)] == [
        (4, (2, 2), (3, 3)),
        (1, (1, 1), (1, 1)),
        (4, (1, 1), (3, 3)),
        (1, (1, 1), (1, 1)),
    ]
    assert layers(torch.randn(2, 4, 7, 8)).shape == (2, 6, 4, 4)


def test_behind_the_last_stage_it_is_the_mean_of_a_1x1_convolution():
    projector, features = StageProjector((4, 3, 3), 0, 10), torch.randn(2, 4, 3, 3)
    weight = projector.layers.weight[:, :, 0, 0]
    torch.testing.assert_close(projector(features), features.mean((2, 3)) @ weight.t() + projector.layers.bias)


@pytest.mark.parametrize(
    ("tokens", "remaining", "merged", "blocks"),
    [(64, 3, 16, 3), (64, 0, 16, 1), (65, 1, 17, 1), (196, 2, 49, 2), (197, 3, 50, 3), (49, 3, 49, 3), (81, 1, 81, 1)],
)
def test_tokens_are_merged_down_to_7x7(tokens, remaining, merged, blocks):
    projector = StageProjector((tokens, 8), remaining, 10)
    seen = []
    projector.layers.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    assert projector(torch.randn(2, tokens, 8)).shape == (2, 8) and projector.width == 8
    assert seen == [merged] and len(projector.layers) == blocks


def test_merging_takes_neighbours():
    merging = PatchMerging(3)
    merging.norm = nn.Identity()
    with torch.no_grad():
        merging.layer.weight.copy_(torch.eye(3).repeat(1, 4))
        merging.layer.bias.zero_()
    image = torch.randn(2, 3, 4, 4)
    expected = nn.functional.avg_pool2d(image, 2).flatten(2).mT * 4
    torch.testing.assert_close(merging(image.flatten(2).mT), expected)


@pytest.mark.parametrize("tokens", [16, 17])
def test_the_vector_is_the_class_token_or_the_mean(tokens):
    projector, features = StageProjector((tokens, 8), 1, 10).eval(), torch.randn(2, tokens, 8)
    out = projector.layers(features)
    torch.testing.assert_close(projector(features), out[:, 0] if tokens == 17 else out.mean(1))


@pytest.mark.parametrize(("width", "heads"), [(8, 4), (6, 2), (5, 1)])
def test_heads_divide_the_width(width, heads):
    assert StageProjector((16, width), 1, 10).layers[0].self_attn.num_heads == heads


def test_weights_start_as_documented():
    torch.manual_seed(0)
    maps, tokens = StageProjector((64, 8, 8), 1, 96), StageProjector((64, 64), 1, 1)
    pointwise = maps.layers[0][5]
    assert float(pointwise.weight.detach().std()) == pytest.approx((2 / 96) ** 0.5, rel=0.1)
    for linear in (tokens.merge[0].layer, tokens.layers[0].linear1, tokens.layers[0].self_attn.out_proj):
        assert 0.8 < float(linear.weight.detach().std()) / 0.02 < 0.95 and not linear.bias.any()
    assert not StageProjector((64, 8, 8), 0, 96).layers.bias.any()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4,), r"the map is \[4\] without the batch; expected \(C, H, W\), or tokens \(N, D\)"),
        ((7, 8), "a map has 7 tokens; expected those of a square image, h \\* h, or h \\* h \\+ 1 with a class token"),
        ((0, 8), "a map has 0 tokens"),
    ],
)
def test_what_cannot_be_projected(shape, message):
    with pytest.raises(ValueError, match=message):
        StageProjector(shape, 1, 10)
