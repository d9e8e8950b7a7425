"""Selections find the right parameters, describe them, and say what they could have matched."""

import pytest
import torch
from torch import nn

from hyperfast.surgery import select_parameters


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, stride=2, groups=2)
        self.bn = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose1d(6, 10, 4, stride=2, bias=False)
        self.ln = nn.LayerNorm(5)
        self.act = nn.PReLU()
        self.fc = nn.Linear(7, 3)


def names(model, *args, **kwargs):
    return [target.name for target in select_parameters(model, *args, **kwargs)]


def test_default_is_every_convolution_and_linear_layer():
    assert names(Net()) == ["conv.weight", "conv.bias", "up.weight", "fc.weight", "fc.bias"]


def test_norm_generate_adds_affine_parameters_in_model_order():
    assert names(Net(), norm="generate") == [
        "conv.weight", "conv.bias", "bn.weight", "bn.bias", "up.weight", "ln.weight", "ln.bias", "fc.weight", "fc.bias",
    ]  # fmt: skip


@pytest.mark.parametrize("layer", [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_default_covers_convolutions_of_every_kind(layer):
    assert names(nn.Sequential(layer(2, 3, 2))) == ["0.weight", "0.bias"]


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(4), nn.SyncBatchNorm(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True), nn.LayerNorm(4),
    ],
)  # fmt: skip
def test_norm_generate_covers_norms_of_every_kind(layer):
    roles = [target.role for target in select_parameters(nn.Sequential(layer), norm="generate")]
    assert roles == ["norm_weight", "norm_bias"]


def test_roles_fans_layers_and_shapes():
    targets = {target.name: target for target in select_parameters(Net(), norm="generate")}
    assert targets["bn.weight"].role == "norm_weight"
    assert targets["ln.bias"].role == "norm_bias"
    assert targets["fc.bias"].role == "bias"
    assert targets["fc.weight"].role == "weight"
    assert targets["fc.weight"].shape == torch.Size([3, 7])
    assert targets["fc.weight"].layer == "fc"
    assert targets["fc.weight"].names == ("fc.weight",)
    fans = {name: (target.fan_in, target.fan_out) for name, target in targets.items()}
    assert fans["fc.weight"] == fans["fc.bias"] == (7, 3)
    assert fans["conv.weight"] == (2 * 9, 4 * 9 / 4)  # each input reaches a fourth of the 4 * 9 outputs
    assert fans["up.weight"] == (6 * 4 / 2, 10 * 4)  # each output sums over half of the 6 * 4 inputs
    assert [targets[name].has_bias for name in ("conv.weight", "up.weight")] == [True, False]


def test_has_bias_means_that_the_bias_is_generated_too():
    assert not select_parameters(nn.Linear(2, 3), "weight")[0].has_bias


def test_a_bare_layer_has_undotted_names():
    assert names(nn.Linear(2, 3)) == ["weight", "bias"]
    assert select_parameters(nn.Linear(2, 3))[0].layer == ""


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        (nn.Linear, ["fc.weight", "fc.bias"]),
        ((nn.Linear, nn.PReLU), ["act.weight", "fc.weight", "fc.bias"]),
        ("conv.*", ["conv.weight", "conv.bias"]),
        (["*.bias", "act.*"], ["conv.bias", "act.weight", "fc.bias"]),
        (lambda name, module, parameter: parameter.ndim == 3, ["up.weight"]),
        (lambda name, module, parameter: isinstance(module, nn.Linear) and name.endswith("bias"), ["fc.bias"]),
    ],
)
def test_selection_by_type_glob_and_predicate(select, expected):
    assert names(Net(), select) == expected


def test_a_glob_takes_norm_parameters_only_under_generate():
    assert "bn.bias" in names(Net(), "*.bias", norm="generate")
    with pytest.raises(ValueError, match=r"normalisation layers only \(bn.weight, bn.bias\).*norm='generate'"):
        select_parameters(Net(), "bn.*")
    with pytest.raises(ValueError, match="normalisation layers only"):
        select_parameters(Net(), nn.BatchNorm2d)


def test_shared_parameters_and_shared_modules_are_one_target():
    net = nn.Module()
    net.embedding = nn.Embedding(7, 4)
    net.first = nn.Linear(4, 4)
    net.second = net.first
    net.decoder = nn.Linear(4, 7, bias=False)
    net.decoder.weight = net.embedding.weight
    targets = select_parameters(net)
    assert [target.names for target in targets] == [
        ("embedding.weight", "decoder.weight"),
        ("first.weight", "second.weight"),
        ("first.bias", "second.bias"),
    ]
    assert targets[0].layer == "decoder"  # selected as the linear layer's
    assert targets[0].fan_in == 4


def test_parameters_used_outside_their_module_and_parametrised_ones_can_be_named():
    assert names(nn.MultiheadAttention(4, 2), "in_proj*") == ["in_proj_weight", "in_proj_bias"]
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 3))
    assert names(normed, "*original*") == ["parametrizations.weight.original0", "parametrizations.weight.original1"]


def test_a_glob_that_matches_nothing_lists_near_names_first():
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(30)))
    with pytest.raises(ValueError, match=r"'29.wieght' matches no parameter. Parameters: 29.weight") as error:
        select_parameters(model, "29.wieght")
    assert "and 40 more" in str(error.value)
    with pytest.raises(ValueError, match=r"the glob 'nothing\*' matches no parameter"):
        select_parameters(model, ["0.*", "nothing*"])


@pytest.mark.parametrize("select", [lambda *_: False, []])
def test_a_selection_of_nothing_lists_the_parameters(select):
    with pytest.raises(ValueError, match=r"matches no parameter. Parameters: conv.weight, conv.bias"):
        select_parameters(Net(), select)


def test_a_type_that_is_not_there_lists_the_types_that_are():
    with pytest.raises(ValueError, match=r"no module of type Conv3d has parameters.*Conv2d, BatchNorm2d"):
        select_parameters(Net(), nn.Conv3d)


def test_bad_arguments():
    with pytest.raises(TypeError, match="select is 3; expected None, a module type"):
        select_parameters(Net(), 3)
    with pytest.raises(ValueError, match="norm is 'maybe'; choose one of 'keep', 'generate'"):
        select_parameters(Net(), norm="maybe")


@pytest.mark.parametrize("select", [None, "*", nn.Linear])
def test_a_model_without_parameters(select):
    with pytest.raises(ValueError, match=r"the model \(Sequential\) has no parameters"):
        select_parameters(nn.Sequential(nn.ReLU()), select)


def test_parameters_that_cannot_be_generated():
    integer = nn.Module()
    integer.scale = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"scale is torch.int8; only floating point"):
        select_parameters(integer, "*")
    with pytest.raises(ValueError, match="0.weight has no shape yet"):
        select_parameters(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(ValueError, match="weight_ih_l0 belongs to a LSTM"):
        select_parameters(nn.LSTM(2, 3), "*")


@pytest.mark.parametrize("select", [None, nn.Linear])
def test_a_parametrised_layer_is_refused_with_the_names_to_select_instead(select):
    model = nn.Sequential(nn.Linear(2, 2), nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)))
    with pytest.raises(ValueError, match=r"the weight of 1 .* computed from parametrizations.weight.original0"):
        select_parameters(model, select)
