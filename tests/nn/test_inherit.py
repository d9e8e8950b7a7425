"""Networks that inherit their weights: the statements of the specification, exact counts, and every message."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hyperfast
from hyperfast import models
from hyperfast.nn import InheritedConv2d, InheritedLinear, fold, inherit, load_balance_loss, recalibrate_norms
from hyperfast.surgery.low_rank import Moment, MomentMeter, Spectrum


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.conv = nn.Conv2d(12, 16, 3, stride=2, padding=1, bias=False)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.mlp = nn.Linear(16, 24)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.conv(self.norm(self.stem(x)).relu()).relu())
        logits: Tensor = self.fc(self.mlp(x.mean((2, 3))).relu())
        return logits


def net() -> Net:
    torch.manual_seed(0)
    return Net().double().eval()


def low_rank(weight: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(weight.flatten(1).double(), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ v[:rank]).view(weight.shape)


def single(layer: nn.Module, **options: Any) -> Any:
    """The replacement of one layer."""
    student, _ = inherit(nn.Sequential(layer).double(), classifier=True, only_smaller=False, **options)
    return student[0]  # type: ignore[index]


GEOMETRY = list(itertools.product((1, 2), (0, 1, 2), (1, 2)))


@pytest.mark.parametrize(("stride", "padding", "dilation"), GEOMETRY)
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_a_convolution_begins_as_the_best_of_its_rank(
    stride: int, padding: int, dilation: int, padding_mode: str
) -> None:
    conv = nn.Conv2d(4, 6, 3, stride, padding, dilation, padding_mode=padding_mode).double()
    layer = single(conv, rank=3)
    assert isinstance(layer, InheritedConv2d) and layer.gate.weight.any()
    plain = copy.deepcopy(conv)
    plain.weight.data = low_rank(conv.weight.detach(), 3)
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7)])
def test_a_linear_layer_begins_as_the_best_of_its_rank(shape: tuple[int, ...]) -> None:
    linear = nn.Linear(7, 6).double()
    layer, x = single(linear, rank=2), torch.randn(shape, dtype=torch.float64)
    assert isinstance(layer, InheritedLinear)
    torch.testing.assert_close(layer(x), F.linear(x, low_rank(linear.weight.detach(), 2), linear.bias))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_the_paper_divides_by_the_number_of_heads(heads: int) -> None:
    conv = nn.Conv2d(4, 6, 3).double()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    exact, paper = (single(conv, rank=3, heads=heads, init=init)(x) for init in ("exact", "paper"))
    torch.testing.assert_close(paper, exact / heads)


@pytest.mark.parametrize("split", ["balanced", "up", "down"])
def test_splits_have_one_product_and_their_condition_numbers(split: Any) -> None:
    weight = torch.randn(8, 3, 3, 3, dtype=torch.float64)
    spectrum = Spectrum.of(weight)
    up, down = spectrum.factors(4, split)
    torch.testing.assert_close((up @ down.flatten(1)).view_as(weight), low_rank(weight, 4))
    ratio = float(spectrum.values[0] / spectrum.values[3])
    power = {"balanced": (0.5, 0.5), "up": (1.0, 0.0), "down": (0.0, 1.0)}[split]
    found = [float(torch.linalg.cond(factor.flatten(1))) for factor in (up, down)]
    assert found == pytest.approx([ratio**power[0], ratio**power[1]], rel=1e-6)


def test_errors_and_energies_are_those_of_eckart_and_young() -> None:
    weight = torch.randn(10, 14, dtype=torch.float64)
    spectrum = Spectrum.of(weight)
    values, energies = spectrum.values, [spectrum.energy(r) for r in range(1, 11)]
    for rank in (1, 4, 9):
        up, down = spectrum.factors(rank)
        error = weight - up @ down
        assert float(error.norm() ** 2) == pytest.approx(float(values[rank:].square().sum()), rel=1e-9)
        assert float(torch.linalg.matrix_norm(error, 2)) == pytest.approx(float(values[rank]), rel=1e-9)
        other = torch.randn(10, rank, dtype=torch.float64) @ torch.randn(rank, 14, dtype=torch.float64)
        assert float((weight - other).norm()) > float(error.norm())
        assert energies[rank - 1] == pytest.approx(float((up @ down).norm() ** 2 / weight.norm() ** 2))
    assert energies == sorted(energies) and energies[-1] == pytest.approx(1)
    assert [spectrum.rank_for(energy) for energy in energies] == list(range(1, 11))
    assert spectrum.rank_for(1e-9) == 1


def test_the_decomposition_is_reproducible() -> None:
    weight = torch.randn(6, 5)
    left = Spectrum.of(weight).left
    largest = left.gather(0, left.abs().argmax(0, keepdim=True))
    assert (largest > 0).all() and torch.equal(left, Spectrum.of(weight).left)


@pytest.mark.parametrize("channels", [4, 32])
def test_what_a_layer_sees_makes_its_output_better_than_its_weight_does(channels: int) -> None:
    """The error is the rest of the singular values of W C, and at most that of the plain decomposition."""
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, 6, 3, padding=1, bias=False).double()
    scale = torch.logspace(-1, 1, channels, dtype=torch.float64)[:, None, None]
    images = torch.randn(64, channels, 8, 8, dtype=torch.float64) * scale
    meter = MomentMeter(conv)
    meter.add(images)
    moment = meter.moment()
    assert moment is not None and len(moment.factor) == (channels * 9 if channels * 9 <= 256 else channels)
    errors = []
    for given in (moment, None):
        spectrum = Spectrum.of(conv.weight, given)
        up, down = spectrum.factors(3)
        difference = conv.weight.detach().flatten(1) - up @ down.flatten(1)
        errors.append(float(moment.apply(difference).norm() ** 2))
        if given is not None:
            assert errors[0] == pytest.approx(float(spectrum.values[3:].square().sum()), rel=1e-8)
    assert errors[0] < 0.9 * errors[1]


def test_moments_of_wide_linear_layers_are_their_diagonals() -> None:
    wide = nn.Linear(600, 4)
    meter = MomentMeter(wide)
    assert meter.moment() is None
    meter.add(torch.ones(3, 5, 600))
    moment = meter.moment()
    assert moment is not None and moment.factor.shape == (600,)
    matrix = torch.randn(4, 600, dtype=torch.float64)
    torch.testing.assert_close(moment.solve(moment.apply(matrix)), matrix)
    full = Moment.of(torch.eye(3, dtype=torch.float64) * 4, 3)
    torch.testing.assert_close(full.factor.diagonal().square(), torch.full((3,), 4 + 1e-5, dtype=torch.float64))


def test_calibration_lowers_the_error_of_the_whole_network() -> None:
    model = net()
    scale = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)[:, None, None]
    images = torch.randn(32, 3, 8, 8, dtype=torch.float64) * scale
    plain, _ = inherit(model, rank=2)
    aware, _ = inherit(model, rank=2, calibration=[images])
    with torch.no_grad():
        errors = [float((network(images) - model(images)).norm()) for network in (aware, plain)]
    assert errors[0] < errors[1] and not model.training


# Teacher, rank, parameters, replaced and eligible layers: exact counts of the specification, H = 3, 100 classes.
COUNTS = [
    ("resnet56", 8, 205_663, 57, 57),
    ("resnet56", 16, 383_507, 37, 57),
]


@pytest.mark.parametrize(("name", "rank", "parameters", "replaced", "layers"), COUNTS)
def test_exact_counts(name: str, rank: int, parameters: int, replaced: int, layers: int) -> None:
    teacher = models.create(name, num_classes=100, shortcut="B")
    student, report = inherit(teacher, rank=rank, only_smaller=False)
    assert report.parameters == 861_620
    assert report.inherited == parameters == sum(p.numel() for p in student.parameters())
    convolutions = [row for row in report.rows if row.kind == "Conv2d"]
    assert len(convolutions) == layers and sum(row.reason is None for row in convolutions) == replaced


def test_energy_and_budget_choose_the_ranks() -> None:
    model = net()
    _, by_energy = inherit(model, energy=0.8, only_smaller=False)
    for row in by_energy.rows:
        if row.rank is not None:
            spectrum = Spectrum.of(model.get_submodule(row.name).weight)  # type: ignore[arg-type]
            assert spectrum.energy(row.rank) >= 0.8 > spectrum.energy(row.rank - 1)
    total = sum(p.numel() for p in model.parameters())
    student, by_budget = inherit(model, budget=int(0.8 * total), only_smaller=False)
    assert by_budget.inherited == sum(p.numel() for p in student.parameters()) <= 0.8 * total
    _, more = inherit(model, energy=min(r.energy for r in by_budget.rows if r.rank) + 0.1, only_smaller=False)
    assert more.inherited > by_budget.inherited


def test_the_report_says_what_became_of_every_layer() -> None:
    _, report = inherit(net(), rank=3, exclude=["stem"])
    reasons = {row.name: row.reason for row in report.rows}
    assert reasons == {
        "stem": "excluded",
        "conv": None,
        "depthwise": "a depthwise convolution has rank 1",
        "mlp": None,
        "fc": "it is the classifier",
    }
    kept = [row.energy for row in report.rows if row.reason is None]
    assert len(kept) == 2 and report.energy == pytest.approx(sum(kept) / 2)
    text = str(report)
    assert "conv: Conv2d [16, 12, 3, 3], rank 3 of 16, energy 0." in text
    assert "depthwise: Conv2d [16, 1, 3, 3] left as it is, a depthwise convolution has rank 1" in text
    assert f"{report.parameters:,} to {report.inherited:,} parameters" in text.splitlines()[-1]


def test_layers_that_would_grow_or_have_no_smaller_rank_are_left() -> None:
    model = nn.Sequential(nn.Conv2d(32, 64, 1, bias=False), nn.Conv2d(64, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    _, report = inherit(model, rank=3)
    assert report.rows[0].reason is None
    message = "no layer was replaced: 0, it would grow from 2,048 to 3,635 parameters; 1, rank 16 is its full rank"
    with pytest.raises(ValueError, match=message):
        inherit(model, rank=16)
    _, grown = inherit(model, rank=16, only_smaller=False)
    assert grown.rows[0].inherited == 3_635 and grown.rows[1].reason == "rank 16 is its full rank"


def test_a_predicate_has_the_last_word_and_transformers_are_taken_where_they_call_their_layers() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16)
    model = nn.Sequential(nn.Linear(8, 8), encoder, nn.Linear(8, 3))
    _, report = inherit(model, rank=1, heads=1)
    reasons = {row.name: row.reason for row in report.rows}
    assert reasons["0"] is None and "TransformerEncoderLayer reads its weights itself" in str(reasons["1.linear1"])
    with pytest.raises(ValueError, match="0, the predicate says no"):
        inherit(model, rank=1, predicate=lambda name, layer: False)


def test_one_head_folds_to_the_same_network() -> None:
    student, _ = inherit(net(), rank=3, heads=1)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    plain = fold(student)
    torch.testing.assert_close(plain(x), student(x))
    assert not any(isinstance(m, InheritedConv2d | InheritedLinear) for m in plain.modules())
    assert torch.export.export(plain, (x,)) is not None


def test_several_heads_fold_under_constant_gates() -> None:
    layer = InheritedConv2d(3, 5, 3, rank=2, heads=3, bias=True)
    with torch.no_grad():
        layer.bias.normal_()  # type: ignore[union-attr]
        layer.gate.weight.zero_()
        layer.gate.bias.copy_(torch.tensor([0.5, 0.2, 0.3]).log())
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(layer.fold(torch.tensor([0.5, 0.2, 0.3]))(x), layer(x))
    with pytest.raises(ValueError, match=r"gates is \[2\]; expected \[3\], one per head"):
        layer.fold(torch.ones(2))


def test_deviations_sum_to_zero_and_tell_the_heads_apart() -> None:
    conv = nn.Conv2d(4, 6, 3).double()
    plain = single(conv, rank=3)
    apart = single(conv, rank=3, deviation=0.01, gate="zero")
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(apart(x), plain(x))
    assert not torch.allclose(apart.experts[0], apart.experts[1], rtol=1e-6)
    noise = float((apart.experts - plain.experts).std() / plain.experts[0].std())
    assert 0.005 < noise < 0.02
    apart(x).square().sum().backward()
    assert apart.gate.weight.grad.any()


def test_gates_of_the_input() -> None:
    conv = nn.Conv2d(4, 6, 3).double()
    layer = single(conv, rank=3, gate_input="input")
    assert layer.gate.weight.shape == (3, 4)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    layer(x)
    torch.testing.assert_close(layer.gates, layer.gate(x.mean((2, 3))).softmax(1))
    _, report = inherit(nn.Sequential(conv, nn.Flatten(), nn.Linear(8, 2)), rank=2, gate_input="input")
    assert report.rows[0].inherited == 2 * 36 + 3 * 2 * 6 + 3 * (4 + 1) + 3 * 6


def test_load_balance_is_zero_for_even_heads() -> None:
    student, _ = inherit(net(), rank=3, gate="zero", deviation=0.01)
    with pytest.raises(RuntimeError, match="no gates to balance"):
        load_balance_loss(student)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    student(x)
    assert float(load_balance_loss(student).detach()) == pytest.approx(0, abs=1e-12)
    layer = next(m for m in student.modules() if isinstance(m, InheritedConv2d))
    layer.gates = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
    others = [m for m in student.modules() if isinstance(m, InheritedConv2d | InheritedLinear)]
    loss = load_balance_loss(student)
    assert float(loss.detach()) == pytest.approx(2 / len(others))
    loss.backward()
    assert layer.gates.grad is not None and layer.gates.grad.any()


def test_gates_with_a_graph_stay_behind_in_a_copy() -> None:
    student, _ = inherit(net(), rank=3)
    student(torch.randn(2, 3, 8, 8, dtype=torch.float64))
    for copied in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        assert copied.conv.gates is None
        assert torch.equal(copied.conv.experts, student.conv.experts)  # type: ignore[union-attr,arg-type]
    assert student.conv.gates.requires_grad  # type: ignore[union-attr]


def test_recalibrated_norms_have_the_statistics_of_what_they_see() -> None:
    student, _ = inherit(net(), rank=1, only_smaller=False)
    batches = [torch.randn(16, 3, 8, 8, dtype=torch.float64) for _ in range(3)]
    before = student.norm.running_mean.clone()  # type: ignore[union-attr,operator]
    recalibrate_norms(student, batches)
    seen = torch.stack([student.stem(batch).mean((0, 2, 3)) for batch in batches]).mean(0)  # type: ignore[operator]
    torch.testing.assert_close(student.norm.running_mean, seen)  # type: ignore[union-attr]
    assert not torch.allclose(seen, before) and not student.training
    assert student.norm.momentum == 0.1  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="batches is empty"):
        recalibrate_norms(student, [])


def test_a_student_trains_and_its_teacher_is_left() -> None:
    teacher = net()
    before = copy.deepcopy(teacher.state_dict())
    student, _ = hyperfast.inherit(teacher, rank=3)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    x, y = torch.randn(8, 3, 8, 8, dtype=torch.float64), torch.randint(5, (8,))
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(student(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of rank, energy and budget; got none"),
        ({"rank": 2, "energy": 0.9}, "give one of rank, energy and budget; got rank, energy"),
        ({"rank": 0}, "rank is 0; it must be at least 1"),
        ({"energy": 1.5}, r"energy is 1.5; expected a share in \(0, 1\]"),
        ({"budget": 100}, r"budget is -?\d+ parameters, but the layers have [\d,]+ at rank 1"),
        ({"rank": 2, "heads": 0}, "heads is 0; it must be at least 1"),
        ({"rank": 2, "init": "random"}, "init is 'random'; choose one of 'exact', 'paper'"),
        ({"rank": 2, "split": "half"}, "split is 'half'; choose one of 'balanced', 'up', 'down'"),
        ({"rank": 2, "gate": "ones"}, "gate is 'ones'; choose one of 'random', 'zero'"),
        ({"rank": 2, "gate": "zero"}, "gate='zero' with equal heads"),
        ({"rank": 2, "deviation": -1.0}, "deviation is -1.0; it must not be negative"),
        ({"rank": 2, "include": ["block*"]}, r"include: 'block\*' matches no layer. Layers: stem, conv, depthwise"),
        ({"rank": 2, "exclude": ["x"]}, "exclude: 'x' matches no layer"),
        ({"rank": 2, "calibration": []}, "calibration shows nothing to stem, conv, mlp"),
        ({"rank": 99, "include": ["conv"]}, "layer 'conv' was asked for by name and cannot be replaced: rank 99 is"),
        ({"rank": 2, "include": ["conv", "depthwise"]}, "layer 'depthwise' .* cannot be replaced: a depthwise conv"),
    ],
)
def test_what_cannot_be_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inherit(net(), **options)


def test_weights_that_are_not_finite_are_named() -> None:
    model = net()
    model.conv.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer 'conv' cannot be decomposed: the weights are not all finite"):
        inherit(model, rank=2)


@pytest.mark.parametrize(("rank", "heads"), [(0, 3), (2, 0)])
def test_layers_refuse_what_is_empty(rank: int, heads: int) -> None:
    with pytest.raises(ValueError, match=f"rank is {rank} and heads {heads}; both must be at least 1"):
        InheritedConv2d(3, 4, 3, rank=rank, heads=heads)


def test_checkpoints_of_another_rank_do_not_load() -> None:
    first, second = (inherit(net(), rank=rank, only_smaller=False)[0] for rank in (2, 3))
    with pytest.raises(RuntimeError, match="size mismatch for stem.experts"):
        second.load_state_dict(first.state_dict())
