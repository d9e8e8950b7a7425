"""HyperLight's weights give HyperLight's outputs and gradients."""

import pytest
import torch
from helpers import golden
from torch import nn

from hyperfast.nn import hypernetize, load_hyperlight

GOLDEN = golden()
STATE = {name.removeprefix("hl.state."): value for name, value in GOLDEN.items() if name.startswith("hl.state.")}
ORDER = ["0.weight", "0.bias", "1.weight", "3.weight", "3.bias"]


def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 1, bias=False), nn.Flatten(), nn.Linear(6, 5))


def student():
    return hypernetize(net(), condition="external", condition_size=3)


def test_golden_outputs_and_gradients():
    hypernetwork = student()
    load_hyperlight(hypernetwork, STATE)
    condition = torch.cat([GOLDEN["hl.in.alpha"], GOLDEN["hl.in.beta"]])  # alphabetical
    weights = hypernetwork.generate(condition)
    assert list(weights) == ORDER
    for name, weight in weights.items():
        torch.testing.assert_close(weight, GOLDEN[f"hl.out.{name}"], rtol=1e-6, atol=1e-6)
    loss = sum(weight.square().sum() for weight in weights.values())
    torch.testing.assert_close(loss.double(), GOLDEN["hl.loss"], rtol=1e-6, atol=0)
    loss.backward()
    own = {
        **{
            f"backbone.block{i}_lin.{n}": p
            for i, layer in enumerate(hypernetwork.trunk)
            for n, p in layer.named_parameters()
        },
        "backbone.output.weight": hypernetwork.head.weight,
        "backbone.output.bias": hypernetwork.theta0,
    }
    for name, parameter in own.items():
        expected = GOLDEN[f"hl.grad.{name}"]
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            parameter.grad, expected, rtol=1e-6, atol=1e-6 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("order", [None, ["3.bias", "1.weight", "0.weight", "3.weight", "0.bias"]])
def test_live_hyperlight(order):
    hyperlight = pytest.importorskip("hyperlight")
    model = net()
    primary = hyperlight.hypernetize(model, modules=[model[0], model[1], model[3]])
    shapes = primary.external_shapes()
    assert list(shapes) == ORDER
    shapes = shapes if order is None else {name: shapes[name] for name in order}
    peer = hyperlight.HyperNet(input_shapes={"h": (3,)}, output_shapes=shapes, hidden_sizes=[16, 64, 128])
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    hypernetwork = student()
    load_hyperlight(hypernetwork, peer.state_dict(), None if order is None else shapes)
    condition, x = torch.rand(3), torch.randn(2, 3, 3, 3)
    with primary.using_externals(peer(h=condition)):
        expected = primary(x)
    actual = hypernetwork(x, condition=condition)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    expected.sum().backward()
    actual.sum().backward()
    torch.testing.assert_close(
        hypernetwork.trunk[0].weight.grad, peer.backbone.block0_lin.weight.grad, rtol=1e-4, atol=1e-5
    )


def test_the_scheme_called_hyperlight_draws_what_hyperlight_draws():
    hyperlight = pytest.importorskip("hyperlight")
    shapes = {"0.weight": (64, 32, 3, 3), "0.bias": (64,)}
    peer = hyperlight.HyperNet(input_shapes={"h": (1,)}, output_shapes=shapes, hidden_sizes=[16, 64, 128])
    own = hypernetize(nn.Sequential(nn.Conv2d(32, 64, 3)))
    count = 64 * 32 * 9
    for mine, theirs in (
        (own.head.weight[:count], peer.backbone.output.weight[:count]),
        (own.theta0[:count], peer.backbone.output.bias[:count]),
        (own.trunk[2].weight, peer.backbone.block2_lin.weight),
    ):
        assert mine.std().item() == pytest.approx(theirs.std().item(), rel=0.05)
    assert not own.head.weight[count:].any() and not own.theta0[count:].any()


def test_without_an_additive_bias_theta0_is_zero():
    hypernetwork = student()
    load_hyperlight(hypernetwork, {name: value for name, value in STATE.items() if name != "backbone.output.bias"})
    assert not hypernetwork.theta0.any()


@pytest.mark.parametrize(
    ("state", "order", "message"),
    [
        ({"weight": torch.ones(1)}, None, r"missing keys \['backbone.block0_lin.bias'.*unexpected keys \['weight'\]"),
        ({**STATE, "backbone.block3_lin.weight": torch.ones(1)}, None, "more trunk layers than this hypernetwork's 3"),
        (
            {**STATE, "backbone.output.weight": torch.ones(9, 128)},
            None,
            r"is \[9, 128\]; this hypernetwork needs \[171",
        ),
        (STATE, ["0.weight", "2.weight"], "'2.weight' is not one of the generated parameters"),
        (STATE, ["0.weight", "0.weight"], "'0.weight' is not one of the generated parameters, or is there twice"),
        (STATE, ["0.weight"], "shapes_order lacks the generated parameters 0.bias, 1.weight"),
        (STATE, {"0.weight": (4, 3, 3)}, r"'0.weight' is \[4, 3, 3\], but \[4, 3, 3, 3\] here"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_overwritten(state, order, message):
    hypernetwork = student()
    before = {name: value.clone() for name, value in hypernetwork.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_hyperlight(hypernetwork, state, order)
    assert all(torch.equal(value, before[name]) for name, value in hypernetwork.state_dict().items())
