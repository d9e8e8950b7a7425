"""Variances of what the schemes draw, and of what the generated layers then do."""

import pytest
import torch
from torch import nn

from hyperfast.nn import hypernetize, initialize

from .networks import small_net


def parts(student):
    """Head rows and theta0 by target."""
    sizes = [target.numel for target in student.targets]
    rows, values = student.head.weight.detach().split(sizes), student.theta0.detach().split(sizes)
    return {t.name: (w, v) for t, w, v in zip(student.targets, rows, values, strict=True)}


def wide_net():
    return nn.Sequential(nn.Conv2d(32, 64, 3), nn.BatchNorm2d(64), nn.Flatten(), nn.Linear(200, 100, bias=False))


def test_hyperlight_variances():
    student = hypernetize(wide_net(), norm="generate")
    found = parts(student)
    for name, fan_in in (("0.weight", 32 * 9), ("3.weight", 200)):
        rows, values = found[name]
        assert rows.std().item() == pytest.approx((2 / len(values)) ** 0.5, rel=0.01)
        assert values.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.03)
        assert abs(values.mean().item()) < 0.02 * values.std().item() + 1e-3
    for name, start in (("0.bias", 0), ("1.weight", 1), ("1.bias", 0)):
        rows, values = found[name]
        assert not rows.any() and (values == start).all()
    for layer, fan_out in zip(student.trunk, (16, 64, 128), strict=True):
        assert layer.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.35 if fan_out == 16 else 0.1)
        assert not layer.bias.any()


def test_bias_hyperinit_starts_at_the_model():
    model = small_net()
    student = hypernetize(model, init="bias_hyperinit")
    x = torch.randn(6, 3, 8, 8)
    assert torch.equal(student(x), model(x)) and not student.head.weight.any()
    student(x).square().sum().backward()
    assert student.head.weight.grad.any()


@pytest.mark.parametrize("init", ["hyperlight", "hyperfan_in", "hyperfan_out"])
def test_theta0_from_the_model(init):
    model = small_net()
    with torch.no_grad():
        model[1].weight.uniform_()
    student = hypernetize(model, init=init, theta0="model", norm="generate")
    for name, (_, values) in parts(student).items():
        assert torch.equal(values, model.get_parameter(name).flatten()), name


def test_norm_parameters_start_as_one_and_zero_with_zero_head_rows():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True))
    for init in ("hyperlight", "hyperfan_in", "hyperfan_out"):
        weights = hypernetize(model, init=init, norm="generate").generate(torch.rand(3, 1))
        for name in ("1", "2"):
            assert (weights[f"{name}.weight"] == 1).all() and (weights[f"{name}.bias"] == 0).all()


def test_parameters_without_a_rule_keep_the_model_s_value():
    model = nn.Sequential(nn.PReLU(3, init=0.7), nn.Linear(2, 2))
    model.register_parameter("token", nn.Parameter(torch.randn(1, 1, 4)))
    for init in ("hyperlight", "hyperfan_in"):
        weights = hypernetize(model, ["0.*", "token", "1.*"], init=init).generate(torch.rand(1))
        assert torch.equal(weights["0.weight"], model[0].weight) and torch.equal(weights["token"], model.token)


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("encoding", ["cos|sin", "z|1-z", "none"])
def test_hyperfan_variances(scale, encoding):
    power = {"cos|sin": 0.5, "z|1-z": 0.25, "none": 0.25}[encoding]  # of a constant 0.5
    model = nn.Sequential(nn.Linear(120, 80), nn.Linear(50, 200, bias=False))
    width = 128 * power
    student = hypernetize(model, init="hyperfan_in", variance_scale=scale, encoding=encoding)
    found = {name: rows.var().item() for name, (rows, _) in parts(student).items()}
    assert found["0.weight"] == pytest.approx(scale / (2 * 120 * width), rel=0.02)
    assert found["0.bias"] == pytest.approx(scale / (2 * width), rel=0.05)
    assert found["1.weight"] == pytest.approx(scale / (50 * width), rel=0.02)
    assert not student.theta0.any()

    student = hypernetize(model, init="hyperfan_out", variance_scale=scale, encoding=encoding)
    found = {name: rows.var().item() for name, (rows, _) in parts(student).items()}
    assert found["0.weight"] == pytest.approx(scale / (80 * width), rel=0.02)
    assert found["0.bias"] == 0  # 1 - m_in / m_out < 0
    wide = hypernetize(nn.Linear(50, 200), init="hyperfan_out", variance_scale=scale, encoding=encoding)
    assert parts(wide)["bias"][0].var().item() == pytest.approx(scale * 0.75 / width, rel=0.05)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(128, 96),
        nn.Linear(128, 96, bias=False),
        nn.Conv1d(32, 24, 5, groups=2),
        nn.ConvTranspose1d(32, 24, 4, 2),
    ],
)
def test_hyperfan_in_keeps_the_variance_of_activations(layer):
    x = torch.randn(32, 128) if isinstance(layer, nn.Linear) else torch.randn(16, 32, 40)
    powers = []
    for _ in range(20):
        student = hypernetize(layer, init="hyperfan_in", hidden=(128,), condition="external", condition_size=8)
        y = student(x, condition=torch.rand(8)).detach()
        powers.append((y if y.ndim == 2 else y[..., 4:-4]).relu().square().mean())
    assert torch.stack(powers).mean().item() == pytest.approx(1, abs=0.15)


def test_hyperfan_out_keeps_the_variance_of_gradients():
    powers = []
    for _ in range(20):
        student = hypernetize(nn.Linear(96, 128), init="hyperfan_out", hidden=(128,), condition_size=8)
        x = torch.randn(32, 96, requires_grad=True)
        student(x).backward(torch.randn(32, 128))
        powers.append(x.grad.square().mean() / 2)  # a ReLU in front lets half of it through
    assert torch.stack(powers).mean().item() == pytest.approx(1, abs=0.15)


def spread(encoding):
    """Variance of theta - theta0 over many networks, for five conditions."""
    conditions = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])[:, None].expand(-1, 16)
    total = torch.zeros(5)
    for _ in range(40):
        student = hypernetize(nn.Linear(32, 32), hidden=(64, 64), condition_size=16, encoding=encoding)
        total += (student.generate(conditions)["weight"] - student.theta0[:1024].view(32, 32)).detach().var(dim=(1, 2))
    return total / total.max()


def test_the_norm_of_the_encoding_does_not_depend_on_the_condition():
    student = hypernetize(nn.Linear(4, 4), condition_size=16)
    norms = student.encode(torch.rand(50, 16)).norm(dim=1)
    torch.testing.assert_close(norms, torch.full((50,), 4.0))
    assert (
        hypernetize(nn.Linear(4, 4), condition_size=16, encoding="none").encode(torch.rand(50, 16)).norm(dim=1).std()
        > 0.1
    )


def test_the_variance_of_generated_weights_does_not_depend_on_the_condition():
    assert spread("cos|sin").min() > 0.85
    assert spread("none").min() < 0.05  # what the encoding is for


def test_draws_follow_the_seed():
    def draw():
        torch.manual_seed(3)
        return hypernetize(small_net(), condition="per_layer").state_dict()

    first, second = draw(), draw()
    # The model itself is drawn too, so that all of it agrees.
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_initialize_again_in_place():
    student = hypernetize(small_net())
    before = student.head.weight.clone()
    initialize(student, "hyperfan_in")
    assert not torch.equal(student.head.weight, before) and not student.theta0.any()


def test_unknown_scheme():
    with pytest.raises(ValueError, match="init is 'orthogonal'; choose one of 'hyperlight', 'bias_hyperinit'"):
        initialize(hypernetize(small_net()), "orthogonal")
