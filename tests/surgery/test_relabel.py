from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hyperfast import models
from hyperfast.surgery import cover, relabel

from .networks import MobileNetV2, ResNet18, SqueezeNet, ViT


def _lively(module: nn.Module) -> nn.Module:
    """`module` in float64 and eval mode, with norms that tell channels apart."""
    module = module.double().eval()
    for part in module.modules():
        if isinstance(part, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)):
            nn.init.normal_(part.weight, 1.0, 0.3)
            nn.init.normal_(part.bias)
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
        if isinstance(part, nn.PReLU):
            nn.init.uniform_(part.weight)
        if isinstance(part, (nn.Linear, nn.Conv2d)) and part.bias is not None:
            nn.init.normal_(part.bias)
    return module


def _check_same(module: nn.Module, x: Tensor) -> tuple[nn.Module, list[str]]:
    """The relabelled module and the layers whose outputs moved; the function must not have changed."""
    module, x = _lively(module), x.double()
    before = copy.deepcopy(module.state_dict())
    result, report = relabel(module)
    torch.testing.assert_close(result(x), module(x), rtol=1e-9, atol=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), before.values(), strict=True))
    for group in report.groups:
        assert group.order.sort().values.tolist() == list(range(len(group.order)))
        in_order = group.order.tolist() == list(range(len(group.order)))
        assert not in_order or len(group.order) < 5, "a random network is hardly in order"
    changed = {name for name, t in result.state_dict().items() if not torch.equal(t, before[name])}
    assert changed <= {name for group in report.groups for name in group.tensors}
    return result, [writer for group in report.groups for writer in group.writers]


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_resnet20_computes_the_same_in_single_precision(shortcut: str) -> None:
    module = _lively(models.create("resnet20", shortcut=shortcut)).float()
    result, report = relabel(module)
    x = torch.randn(4, 3, 32, 32)
    expected = module(x).detach()
    torch.testing.assert_close(result(x), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    writers = [writer for group in report.groups for writer in group.writers]
    inner = [f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(3)]
    assert set(inner) <= set(writers)
    # Zero padding of channels (option A) holds on to the residual streams, a 1x1 convolution does not.
    assert (set(inner) == set(writers)) == (shortcut == "A")
    assert "fc" in [writer for kept in report.kept for writer in kept.writers]


def test_hidden_channels_of_a_trained_looking_network_become_smoother() -> None:
    module = models.create("resnet20").eval()
    result, _ = relabel(module)

    def similarity(network: nn.Module) -> float:
        weight = network.layer3[1].conv1.weight.flatten(1)
        return float(nn.functional.cosine_similarity(weight[1:], weight[:-1]).sum().detach())

    assert similarity(result) > similarity(module) + 1
    assert cover(result, policy="nern") == cover(module, policy="nern")


def test_vgg_is_one_chain_of_layers() -> None:
    _, writers = _check_same(models.create("vgg11_bn", width=4), torch.randn(2, 3, 32, 32))
    assert len(writers) == 10


def test_flattened_positions_move_with_their_channel() -> None:
    module = nn.Sequential(
        *(nn.Conv2d(2, 5, 3), nn.PReLU(5), nn.MaxPool2d(2), nn.Flatten(), nn.BatchNorm1d(20), nn.Dropout()),
        *(nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 3)),
    )
    _, writers = _check_same(module, torch.randn(7, 2, 6, 6))
    assert writers == ["0", "6"]


def test_residual_streams_move_as_one() -> None:
    _, writers = _check_same(ResNet18(width=4), torch.randn(2, 3, 33, 33))
    assert {"conv1", "layer1.0.conv2", "layer1.1.conv2", "layer4.0.downsample.0"} <= set(writers)


def test_depthwise_filters_move_with_their_channels() -> None:
    module = MobileNetV2()
    result, writers = _check_same(module, torch.randn(2, 3, 32, 32))
    assert "features.2.conv.0.0" in writers
    before, after = (m.features[2].conv[1][0].weight for m in (module, result))
    assert not torch.equal(before, after)


def test_hidden_features_of_a_transformer_move_and_its_stream_stays() -> None:
    _, writers = _check_same(ViT(), torch.randn(2, 3, 16, 16))
    assert writers == ["blocks.0.mlp.0", "blocks.1.mlp.0"]


def test_what_is_concatenated_stays() -> None:
    _, writers = _check_same(SqueezeNet(), torch.randn(2, 3, 17, 17))
    assert writers == ["features.0", "features.2.squeeze", "features.3.squeeze"]


class _Everything(nn.Module):
    """Layers in the ways that a forward may use them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.again = nn.Conv2d(6, 6, 3, padding=1)
        self.group = nn.GroupNorm(1, 6)
        self.up = nn.ConvTranspose2d(6, 8, 2, 2)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.gate = nn.Conv2d(8, 8, 1)
        self.tied = nn.Conv2d(8, 8, 1)
        self.tied.weight = self.gate.weight
        self.direct = nn.Conv2d(8, 5, 1)
        self.hidden = nn.Linear(5, 9)
        self.norm = nn.LayerNorm(9)
        self.last = nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = self.again(self.again(x)) + x
        x = self.up(self.group(x).relu() * 2)
        x = self.grouped(x)
        x = self.tied(x) * torch.sigmoid(self.gate(x))
        x = self.direct(x)
        x = torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1)
        return self.last(self.norm(nn.functional.gelu(self.hidden(x)))) + self.direct.weight[1].sum()


def test_what_is_called_twice_tied_or_read_directly_is_kept_or_consistent() -> None:
    module = _lively(_Everything())
    _, report = relabel(module)
    _, writers = _check_same(module, torch.randn(2, 3, 8, 8))
    assert writers == ["first", "again", "hidden"]
    kept = {writer: kept.reason for kept in report.kept for writer in kept.writers}
    assert kept["up"] == "read by call_module grouped"
    assert "shared between modules" in kept["tied"]
    assert kept["direct"] == "direct.weight is read by the forward itself"
    assert kept["last"] == "read by call_function add"
    assert "6 channels of first, again: relabelled" in str(report)
    assert "channels of up: kept, read by call_module grouped" in str(report)


class _CalledOnDifferentChannels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1)
        self.norm, self.c = nn.BatchNorm2d(6), nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x))
        return self.c(torch.cat([y, self.norm(self.b(x)[:, :6])], 1))


def test_a_layer_that_is_called_on_different_channels_holds_them() -> None:
    _, writers = _check_same(_CalledOnDifferentChannels(), torch.randn(2, 3, 4, 4))
    assert writers == []


class _Tokens(nn.Module):
    """Linear layers over [B, T, C], read along the wrong dimension or in ways that cannot be followed."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.b = how, nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.how == "transpose":
            x = x.transpose(1, 2)
        elif self.how == "flatten":
            return x.flatten(1)[:, :3] + self.b(x)[:, 0]
        elif self.how == "mean":
            return self.b(x) * x.mean(-1, keepdim=True)
        elif self.how == "view":
            x = x.view(x.shape[0], -1, 6)
        return self.b(x)


@pytest.mark.parametrize(("how", "moves"), [("plain", 1), ("transpose", 0), ("flatten", 0), ("mean", 0), ("view", 0)])
def test_what_is_not_understood_is_a_barrier(how: str, moves: int) -> None:
    _, writers = _check_same(_Tokens(how), torch.randn(2, 6, 4))
    assert len(writers) == moves


def test_convolutions_read_along_their_last_dimension_hold_their_channels() -> None:
    _, writers = _check_same(nn.Sequential(nn.Conv2d(2, 5, 1), nn.Linear(5, 3)), torch.randn(2, 2, 4, 5))
    assert writers == []


class _Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else x


def test_a_network_that_cannot_be_traced_is_an_error() -> None:
    with pytest.raises(ValueError, match="_Branches cannot be traced by torch.fx.*Relabel the parts"):
        relabel(_Branches())


def test_weights_that_are_no_numbers_are_named() -> None:
    module = models.create("resnet8")
    with torch.no_grad():
        module.layer1[0].bn1.bias[2] = torch.nan
    with pytest.raises(ValueError, match="layer1.0.bn1.bias has NaN or infinite entries"):
        relabel(module)


def test_a_network_without_hidden_channels_is_copied() -> None:
    module = nn.Linear(3, 4)
    result, report = relabel(module)
    assert result is not module
    assert torch.equal(result.weight, module.weight)
    assert report.groups == ()
