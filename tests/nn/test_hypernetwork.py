"""A hypernetwork is called like its model, under every machinery of PyTorch, and can be baked into one."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from hyperfast.nn import Hypernetwork, hypernetize
from hyperfast.surgery import select_parameters, taps

from .networks import TiedNet, images, small_net

KINDS = ["constant", "learned", "per_layer", "per_target", "external", "stochastic"]


def rows(student: Hypernetwork, *batch: int) -> torch.Tensor:
    segments = student.condition.segments
    return torch.rand(*batch, *([segments] if segments else []), student.condition.size)


def test_the_model_is_left_alone_and_its_generated_parameters_leave_the_copy():
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    student = hypernetize(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert student.primary[0].weight is None
    assert [n for n, _ in student.named_parameters() if n.startswith("primary")] == [
        "primary.1.weight",
        "primary.1.bias",
    ]
    assert student.theta0.shape == (student.head.weight.shape[0],) == (4 * 27 + 4 + 4 * 5 + 5,)


def test_mode_dtype_and_repr():
    student = hypernetize(small_net().eval().double(), condition="external", condition_size=2)
    assert not student.training and not student.trunk.training
    assert {p.dtype for p in student.parameters()} == {torch.float64}
    assert student(images().double(), condition=torch.rand(2)).dtype == torch.float64
    assert repr(student) == (
        "Hypernetwork(Sequential, 4 generated tensors, P=137, hidden=[16, 64, 128], H=128, "
        "condition=external(size=2), encoding='cos|sin')"
    )


def test_forward_is_the_model_under_the_generated_weights_and_trains_every_parameter():
    student = hypernetize(small_net(), condition="learned")
    x = images()
    weights = student.generate()
    expected = torch.nn.functional.conv2d(x, weights["0.weight"], weights["0.bias"])
    with taps(student, at="0") as record:
        student(x).square().sum().backward()
    torch.testing.assert_close(next(iter(record.student.values())), expected)
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["keep", "generate"])
def test_a_materialised_model_gives_the_same_logits(kind, norm):
    student = hypernetize(small_net(), condition=kind, condition_size=2, norm=norm)
    x = images()
    student(x, condition=rows(student))  # moves the batch norm statistics
    student.eval()
    condition = rows(student) if kind == "external" else None
    plain = student.materialize(condition)
    assert torch.equal(plain(x), student(x, condition=condition))
    assert type(plain) is nn.Sequential and not plain.training
    assert list(plain.state_dict()) == list(small_net().state_dict())
    given = rows(student, 1)
    assert torch.equal(student.materialize(given)(x), student(x, condition=given))


def test_materialise_keeps_the_mode_and_gives_free_parameters():
    student = hypernetize(small_net(), condition="stochastic").train()
    plain = student.materialize()
    assert plain.training and student.condition.training
    torch.testing.assert_close(plain[0].weight, student.eval().generate()["0.weight"])
    plain(images()).sum().backward()
    assert isinstance(plain[0].weight, nn.Parameter) and plain[0].weight.grad is not None
    assert plain[0].weight.is_contiguous() and plain[0].weight.untyped_storage().nbytes() == 4 * 4 * 27
    with pytest.raises(ValueError, match=r"materialize bakes one condition, but 2 are given"):
        student.materialize(torch.rand(2, 1))


def test_shared_parameters_are_generated_once_and_stay_shared():
    model = TiedNet()
    student = hypernetize(model, init="bias_hyperinit")
    tokens = torch.tensor([1, 5, 2])
    for _ in range(2):  # a slot that is filled twice would keep the first call's weights
        assert torch.equal(student(tokens), model(tokens))
        assert student.primary.first.weight is None
    student(tokens).sum().backward()
    model(tokens).sum().backward()
    expected = torch.cat(
        [model.embedding.weight.grad.flatten(), model.first.weight.grad.flatten(), model.first.bias.grad]
    )
    torch.testing.assert_close(student.theta0.grad, expected)
    plain = student.materialize()
    assert plain.decoder.weight is plain.embedding.weight and plain.second is plain.first


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(3, 6, 3, groups=3), nn.Conv2d(3, 4, 3), nn.Conv3d(3, 4, 2), nn.ConvTranspose1d(3, 4, 2),
        nn.ConvTranspose2d(3, 4, 2), nn.ConvTranspose3d(3, 4, 2), nn.LayerNorm(5), nn.GroupNorm(3, 3),
        nn.InstanceNorm2d(3, affine=True), nn.BatchNorm2d(3),
    ],
)  # fmt: skip
def test_every_kind_of_layer_can_be_generated(layer):
    spatial = 3 if "3d" in type(layer).__name__ else 1 if "1d" in type(layer).__name__ else 2
    x = torch.randn(2, 3, *[5] * spatial)
    student = hypernetize(layer, norm="generate", init="bias_hyperinit")
    assert torch.equal(student(x), layer(x))
    student(x).square().sum().backward()
    assert student.head.weight.grad.any()


def test_parametrised_and_attention_parameters_can_be_generated_by_name():
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    x = torch.randn(2, 4)
    student = hypernetize(normed, "*original*", init="bias_hyperinit")
    assert torch.equal(student(x), normed(x))
    assert torch.equal(student.materialize()(x), normed(x))
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    student = hypernetize(layer, "*", norm="generate", init="bias_hyperinit")
    tokens = torch.randn(2, 5, 8)
    torch.testing.assert_close(student(tokens), layer(tokens))


# Batches of conditions


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_every_group_runs_under_its_own_condition(kind, training):
    student = hypernetize(small_net(), condition=kind, condition_size=2).train(training)
    conditions, x = rows(student, 3), images(6)
    reference = copy.deepcopy(student)
    expected = torch.cat([reference(x[2 * i : 2 * i + 2], condition=conditions[i]) for i in range(3)])
    outputs = student(x, condition=conditions)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(student.primary[1].running_mean, reference.primary[1].running_mean)
    outputs.square().sum().backward()
    expected.square().sum().backward()
    for (name, own), other in zip(student.named_parameters(), reference.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_a_batch_is_generated_with_a_leading_dimension():
    student = hypernetize(small_net())
    weights = student.generate(torch.rand(3, 1))
    assert {name: list(w.shape) for name, w in weights.items()} == {
        "0.weight": [3, 4, 3, 3, 3], "0.bias": [3, 4], "5.weight": [3, 5, 4], "5.bias": [3, 5],
    }  # fmt: skip


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 3)

    def forward(self, x, other, table, scale=1.0):
        y = self.fc(x + other) * scale + table.sum()
        return {"y": y, "parts": (y.mean(), x)}


@pytest.mark.parametrize("in_turn", [False, True])
def test_only_tensors_with_a_row_per_sample_are_cut_and_structures_come_back(in_turn):
    student = hypernetize(Structured()).eval()
    if in_turn:
        student.primary.fc.register_forward_hook(lambda *_: None)
    x, other, table = torch.randn(4, 2), torch.randn(4, 2), torch.randn(3)
    conditions = torch.rand(2, 1)
    outputs = student(x, other, table, scale=2.0, condition=conditions)
    first = student(x[:2], other[:2], table, scale=2.0, condition=conditions[0])
    torch.testing.assert_close(outputs["y"][:2], first["y"])
    torch.testing.assert_close(outputs["parts"][0][0], first["parts"][0])
    assert outputs["parts"][0].shape == (2,)
    assert torch.equal(outputs["parts"][1], x)


def test_dropout_differs_between_groups():
    student = hypernetize(nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5)))
    dropped = student(torch.ones(2, 4), condition=torch.rand(2, 1)) == 0
    assert not torch.equal(dropped[0], dropped[1])


def test_taps_see_plain_tensors_of_every_group():
    student = hypernetize(small_net()).eval()
    with taps(student, at="0") as record:
        student(images(6), condition=torch.rand(3, 1))
    assert [(str(key), len(features)) for key, features in record.student.items()] == [("0", 2), ("0#1", 2), ("0#2", 2)]


def test_batches_that_cannot_be_cut():
    student = hypernetize(small_net())
    with pytest.raises(ValueError, match="6 samples cannot be cut into 4 equal groups"):
        student(images(6), condition=torch.rand(4, 1))
    with pytest.raises(ValueError, match="2 conditions are applied to groups .* no positional tensor"):
        student(input=images(6), condition=torch.rand(2, 1))


# Machinery of PyTorch


@pytest.mark.parametrize("kind", ["constant", "per_layer"])
def test_compiles_to_one_graph(kind):
    student = hypernetize(small_net(), condition=kind)
    compiled, x = torch.compile(copy.deepcopy(student), fullgraph=True, backend="aot_eager"), images()
    expected, actual = student(x), compiled(x)
    torch.testing.assert_close(actual, expected)
    actual.square().sum().backward()
    expected.square().sum().backward()
    for own, other in zip(compiled.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_compiles_to_one_graph_with_a_batch_of_conditions_that_is_still_checked():
    student = hypernetize(small_net()).eval()
    compiled, x, conditions = torch.compile(student, fullgraph=True), images(), torch.rand(3, 1)
    torch.testing.assert_close(compiled(x, condition=conditions), student(x, condition=conditions))
    with pytest.raises(RuntimeError, match=r"condition holds a value outside \[0, 1\] or NaN"):
        compiled(x, condition=conditions + 1)


def test_autocast_leaves_the_generated_weights_in_float32():
    student = hypernetize(small_net())
    x = images()
    expected = student.generate()["0.weight"]
    with torch.autocast("cpu", torch.bfloat16):
        logits = student(x)
        weight = student.generate()["0.weight"]
    assert logits.dtype == torch.bfloat16
    assert torch.equal(weight, expected)
    logits.float().square().sum().backward()
    assert student.head.weight.grad.dtype == torch.float32 and student.head.weight.grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles(kind):
    student = hypernetize(small_net(), condition=kind).eval()
    x, condition = images(), rows(student) if kind == "external" else None
    student(x, condition=condition).sum().backward()
    for twin in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        assert torch.equal(twin(x, condition=condition), student(x, condition=condition))
        with torch.no_grad():
            twin.theta0.add_(1)
        assert not torch.equal(twin(x, condition=condition), student(x, condition=condition))


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_both_ways(kind):
    student = hypernetize(small_net(), condition=kind).eval()
    other = hypernetize(small_net(), condition=kind).eval()
    x, condition = images(), rows(student) if kind == "external" else None
    file = io.BytesIO()
    torch.save(student.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(other(x, condition=condition), student(x, condition=condition))
    assert not any(name.startswith("primary.0") or "offsets" in name for name in student.state_dict())


def test_a_materialised_model_exports():
    student = hypernetize(small_net()).eval()
    x = images()
    program = torch.export.export(student.materialize(), (x,))
    torch.testing.assert_close(program.module()(x), student(x))


@pytest.mark.filterwarnings("ignore")
def test_a_materialised_model_goes_through_onnx():
    pytest.importorskip("onnxscript")
    student = hypernetize(small_net()).eval()
    program = torch.onnx.export(student.materialize(), (images(2),), dynamo=True, verbose=False)
    initializers = program.model.graph.initializers
    assert "0.weight" in initializers and not any("theta0" in name for name in initializers)


# Step sizes


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_parameter_groups_give_theta_the_step_of_an_ordinary_network(kind):
    student = hypernetize(nn.Linear(6, 4).double(), condition_size=3)
    groups = student.parameter_groups(1e-3, optimizer=kind)
    assert [group["name"] for group in groups] == ["theta0", "head", "trunk"]
    assert sum(len(group["params"]) for group in groups) == len(list(student.parameters()))
    assert groups[2]["lr"] == 1e-3
    groups[2]["lr"] = 0.0  # the trunk's share has no closed form
    optimizer = torch.optim.SGD(groups) if kind == "sgd" else torch.optim.Adam(groups, eps=0.0)
    before = student.generate()["weight"].detach()
    student(torch.randn(5, 6).double()).square().sum().backward()
    optimizer.step()
    gradient = student.theta0.grad[:24].view(4, 6)
    expected = before - 1e-3 * (gradient if kind == "sgd" else gradient.sign())
    torch.testing.assert_close(student.generate()["weight"], expected)


def test_step_factors_of_the_default_are_those_that_were_measured():
    factors = [hypernetize(nn.Linear(2, 2)).step_factors() for _ in range(100)]
    assert sum(f.sgd for f in factors) / 100 == pytest.approx(2.0, abs=0.25)
    assert sum(f.adam for f in factors) / 100 == pytest.approx(7.0, abs=0.6)


def test_parameter_groups_options():
    student = hypernetize(nn.Linear(2, 2), hidden=())
    groups = student.parameter_groups(0.1, weight_decay=0.5)  # no trunk, nothing left in the model
    assert [(group["name"], group["weight_decay"]) for group in groups] == [("theta0", 0.5), ("head", 0.5)]
    with pytest.raises(ValueError, match="optimizer is 'lion'; choose 'sgd' or 'adam'"):
        student.parameter_groups(0.1, optimizer="lion")


# Construction


def test_parameters_of_several_dtypes_are_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(ValueError, match=r"of several kinds \(torch.float32 on cpu, torch.float64 on cpu\)"):
        hypernetize(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoding": "fourier"}, "encoding is 'fourier'; choose one of"),
        ({"activation": "elu"}, "activation is 'elu'; choose one of"),
        ({"init": "xavier"}, "init is 'xavier'; choose one of 'hyperlight'"),
        ({"theta0": "zero"}, "theta0 is 'zero'; choose one of 'init', 'model'"),
        ({"condition": "random"}, "condition is 'random'; choose one of 'constant'"),
        ({"condition_size": 0}, "condition_size is 0; expected at least 1"),
        ({"hidden": (16, 0)}, r"hidden is \(16, 0\); every width must be at least 1"),
        ({"select": "nothing"}, "matches no parameter"),
    ],
)
def test_unknown_choices(options, message):
    with pytest.raises(ValueError, match=message):
        hypernetize(small_net(), **options)


def test_the_bare_class_computes_what_the_model_computed():
    from hyperfast.nn import ConstantCondition

    model = small_net()
    primary = copy.deepcopy(model)
    student = Hypernetwork(primary, select_parameters(primary), ConstantCondition())
    x = images()
    assert torch.equal(student(x), model(x))


@pytest.mark.parametrize("encoding", ["cos|sin", "z|1-z", "none"])
@pytest.mark.parametrize("activation", ["leaky_relu", "relu", "gelu", "tanh"])
def test_every_encoding_and_activation(encoding, activation):
    student = hypernetize(small_net(), encoding=encoding, activation=activation, hidden=(8,), condition_size=3)
    assert student(images(), condition=torch.rand(3)).isfinite().all()
    assert student.trunk[0].in_features == (3 if encoding == "none" else 6)
