"""NeRN's numbers, its parameter counts and its file; every option; skips against the plain MLP; bad input."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_accurate, golden

from hyperfast.nn import WeightPredictor, load_nern, nern_state_dict

NERN = golden("nern")
STATE = {name.removeprefix("A_w."): value for name, value in NERN.items() if name.startswith("A_w.")}
TOY = [NERN[f"B_target{i}"] for i in range(3)]
SMALL = (3, 4, 5)


def nern_predictor(count=64, **options):
    return WeightPredictor((512, 512, 512), 140, NERN["A_indices"][:count], **options)


def toy():
    """The three-layer network of golden group B: coordinates, targets, and which elements of a row there are."""
    coordinates = [
        torch.cartesian_prod(torch.tensor([i]), *(torch.arange(n) for n in w.shape[:2])) for i, w in enumerate(TOY)
    ]
    targets, mask = [], []
    for weight in TOY:
        rows, side = weight.flatten(0, 1), weight.shape[-1]
        edge = (3 - side) // 2
        targets.append(F.pad(rows, [edge] * 4).flatten(1))
        mask.append(F.pad(torch.ones_like(rows), [edge] * 4).flatten(1))
    return torch.cat(coordinates), torch.cat(targets), torch.cat(mask)


def toy_predictor():
    coordinates, targets, mask = toy()
    predictor = WeightPredictor((3, 8, 8), 16, coordinates)
    load_nern(predictor, {n.removeprefix("B_init."): v for n, v in NERN.items() if n.startswith("B_init.")})
    return predictor, targets, mask


def embedding(predictor):
    """The features `[N, E]` of every kernel, as NeRN stores them."""
    parts = [table[predictor.indices[:, j]] for j, table in enumerate(predictor.embeddings)]
    return sum(parts) if predictor.fusion == "sum" else torch.cat(parts, 1)


def plain(predictor, features, activation=F.relu):
    """The MLP as it is written down, with its skips, on features `[N, E]`."""
    layers = list(predictor.layers)
    z = start = layers[0](features)
    for i, layer in enumerate(layers[1:], 1):
        x = activation(z)
        if predictor.skip == "nerf" and i == len(layers) // 2:
            x = torch.cat((x, features), 1)
        z = layer(x)
        if predictor.skip == "residual" and i == 2:
            z = z + start
    return z


def test_nern_outputs():
    predictor = nern_predictor()
    load_nern(predictor, STATE)
    torch.testing.assert_close(predictor(), NERN["A_output"], rtol=0, atol=1e-6)
    torch.testing.assert_close(embedding(predictor), NERN["A_embedding"], rtol=0, atol=1e-4)


def test_the_same_seed_starts_as_nern_does():
    torch.manual_seed(1234)
    for key, value in nern_state_dict(nern_predictor()).items():
        torch.testing.assert_close(value, STATE[key], rtol=0, atol=0)


def test_nern_reconstruction_loss_and_gradients():
    predictor, targets, mask = toy_predictor()
    loss = (predictor.squared_error(targets, mask) / mask.sum()).sqrt()
    loss.backward()
    torch.testing.assert_close(loss.item(), NERN["B_loss_before_each_step"][0].item(), rtol=1e-6, atol=0)
    names = dict(zip(nern_state_dict(predictor), predictor.parameters(), strict=True))
    for name, parameter in names.items():
        torch.testing.assert_close(parameter.grad, NERN[f"B_grad_step1.{name}"], rtol=0, atol=1e-6)


def test_nern_gradient_through_a_batch_with_repetitions():
    """The loss is that of all rows, its gradient that of the sampled ones, once per occurrence."""
    predictor, targets, mask = toy_predictor()
    with torch.no_grad():
        rmse = (predictor.squared_error(targets, mask) / mask.sum()).sqrt()
    torch.testing.assert_close(rmse.item(), NERN["B2_loss"].item(), rtol=1e-6, atol=0)
    (predictor.squared_error(targets, mask, NERN["B2_sampled_rows"]) / (2 * rmse * mask.sum())).backward()
    names = dict(zip(nern_state_dict(predictor), predictor.parameters(), strict=True))
    for name, parameter in names.items():
        torch.testing.assert_close(parameter.grad, NERN[f"B2_grad.{name}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"fusion": "sum"}, "E_sum"),
        ({"embedding": "fourier"}, "E_ffn"),
        ({"base": 1.25, "levels": 20}, "E_base1.25_L20"),
    ],
)
def test_nern_embeddings(options, name):
    found = embedding(nern_predictor(8, **options))
    torch.testing.assert_close(found, NERN[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("hidden", "count"),
    [
        (50, 20_159),
        (120, 73_569),
        (140, 94_229),
        (160, 117_289),
        (180, 142_749),
        (200, 170_609),
        (220, 200_869),
        (240, 233_529),
        (280, 306_049),
        (300, 345_909),
        (320, 388_169),
        (360, 479_889),
        (400, 581_209),
        (510, 909_339),
        (680, 1_559_249),
        (700, 1_647_109),
        (750, 1_877_259),
        (1024, 3_404_809),
        (1140, 4_187_229),
        (1256, 5_050_385),
        (1372, 5_994_277),
    ],
)
def test_numbers_of_parameters_are_nerns(hidden, count):
    predictor = WeightPredictor((1, 1, 1), hidden)
    assert sum(p.numel() for p in predictor.parameters()) == 3 * hidden**2 + 253 * hidden + 9 == count


def test_all_coordinates_by_default_channels_fastest():
    predictor = WeightPredictor(SMALL, 4)
    expected = [[i, j, k] for i in range(3) for j in range(4) for k in range(5)]
    assert predictor.indices.tolist() == expected


@pytest.mark.parametrize("skip", [None, "nerf", "residual"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fusion": "sum"},
        {"embedding": "fourier"},
        {"normalization": "local"},
        {"layers": 4, "outputs": 3, "levels": 7},
    ],
)
def test_every_form_is_the_plain_mlp(skip, options):
    predictor = WeightPredictor(SMALL, 6, skip=skip, **options)
    exact = copy.deepcopy(predictor).double()
    eager = copy.deepcopy(predictor)
    rows = torch.tensor([7, 59, 7, 0])
    targets = torch.randn(60, predictor.weights[-1].shape[0])
    weights = torch.rand_like(targets)
    assert_as_accurate(predictor(rows), plain(eager, embedding(eager))[rows], plain(exact, embedding(exact))[rows])
    torch.testing.assert_close(predictor(), plain(predictor, embedding(predictor)))
    losses = [(weights[rows] * (plain(p, embedding(p))[rows] - targets[rows]).square()).sum() for p in (eager, exact)]
    found = predictor.squared_error(targets, weights, rows)
    for loss in (found, *losses):
        loss.backward()
    assert_as_accurate(found, *losses)
    for (name, own), unfused, reference in zip(
        predictor.named_parameters(), eager.parameters(), exact.parameters(), strict=True
    ):
        assert_as_accurate(own.grad, unfused.grad, reference.grad, what=name)


@pytest.mark.parametrize("skip", [None, "residual"])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "hardswish", "gelu", "relu6", "elu"])
def test_activations(activation, skip):
    predictor = WeightPredictor(SMALL, 6, activation=activation, skip=skip)
    expected = plain(predictor, embedding(predictor), getattr(F, activation))
    torch.testing.assert_close(predictor(), expected)


@pytest.mark.parametrize("skip", [None, "nerf", "residual"])
def test_autocast_changes_nothing(skip):
    predictor = WeightPredictor(SMALL, 6, skip=skip)
    expected = predictor()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(predictor(), expected, rtol=0, atol=0)


def test_precision_reaches_the_products():
    predictor = WeightPredictor(SMALL, 32)
    fp32 = predictor()
    predictor.precision = "bf16"
    difference = (predictor() - fp32).abs().max()
    assert 1e-5 < difference < 1e-1


def test_two_layers_may_skip_into_the_last():
    predictor = WeightPredictor(SMALL, 6, layers=2, levels=5, skip="nerf")
    assert list(predictor.weights[1].shape) == [9, 36]
    torch.testing.assert_close(predictor(), plain(predictor, embedding(predictor)))


# Two layers of 2 x 3 and 4 x 1 kernels.
RAGGED = torch.cat(
    [torch.cartesian_prod(torch.tensor([i]), *map(torch.arange, s)) for i, s in enumerate([(2, 3), (4, 1)])]
)


@pytest.mark.parametrize("kind", ["basic", "fourier"])
@pytest.mark.parametrize(
    ("normalization", "divisors"),
    [("local", ([2, 2, 3], [2, 4, 1])), ("global", ([6, 6, 6], [6, 6, 6])), (None, ([1, 1, 1], [1, 1, 1]))],
)
def test_normalized_coordinates(kind, normalization, divisors):
    predictor = WeightPredictor((2, 5, 6), 4, RAGGED, levels=6, embedding=kind, normalization=normalization)
    position = RAGGED.double() / torch.tensor(divisors, dtype=torch.float64)[RAGGED[:, 0]]
    if kind == "basic":
        angle = math.pi * position[:, :, None] * 0.76 ** torch.arange(6, dtype=torch.float64)
    else:
        normal = torch.randn(18, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 0.1, 0.1])
        angle = 2 * math.pi * (position @ normal.double().t())
    expected = torch.stack((angle.sin(), angle.cos()), -1).flatten(1)
    torch.testing.assert_close(embedding(predictor).double(), expected, rtol=0, atol=1e-5)


def test_normalized_tables_hold_one_row_per_value():
    predictor = WeightPredictor((2, 5, 6), 4, RAGGED, normalization="local")
    assert [len(table) for table in predictor.embeddings] == [2, 4, 3]  # 0 1/2; 0 1/4 1/2 3/4; 0 1/3 2/3


def test_gauss_scale_scales_the_columns():
    scaled = WeightPredictor(SMALL, 4, embedding="fourier", levels=3, gauss_scale=(1.0, 0.0, 0.0))
    layer = scaled.embeddings[0].view(3, 20, 18)
    assert (layer == layer[:, :1]).all() and not (layer[0, 0] == layer[1, 0]).all()


def test_state_dict_holds_the_layers_and_nothing_else():
    predictor = WeightPredictor(SMALL, 6, embedding="fourier")
    names = [f"layers.{i}.{kind}" for i in range(5) for kind in ("weight", "bias")]
    assert list(predictor.state_dict()) == names
    other = WeightPredictor(SMALL, 6, embedding="fourier")
    other.load_state_dict(predictor.state_dict())
    torch.testing.assert_close(other(), predictor(), rtol=0, atol=0)


def test_moves_with_its_tables():
    predictor = WeightPredictor(SMALL, 6).double()
    assert predictor().dtype == torch.float64
    assert {b.device.type for b in predictor.to("meta").buffers()} == {"meta"}


def test_trains_under_fullgraph_compile():
    torch.compiler.reset()
    predictor = WeightPredictor(SMALL, 6, layers=3)
    targets, rows = torch.randn(60, 9), torch.tensor([1, 1, 40])
    expected = torch.autograd.grad(predictor.squared_error(targets, None, rows), list(predictor.parameters()))
    compiled = torch.compile(predictor.squared_error, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(targets, None, rows), list(predictor.parameters()))
    torch.testing.assert_close(found, expected)


def test_nern_names_round_trip():
    predictor, other = WeightPredictor(SMALL, 6, layers=3), WeightPredictor(SMALL, 6, layers=3)
    state = nern_state_dict(predictor)
    assert [name for name in state if name.endswith("weight")] == [
        "layers.0.weight",
        "layers.1.weight",
        "final_linear_layer.weight",
    ]
    load_nern(other, state)
    torch.testing.assert_close(other(), predictor(), rtol=0, atol=0)


def test_a_foreign_state_dict_changes_nothing():
    predictor = nern_predictor(layers=4)
    before = copy.deepcopy(predictor.state_dict())
    message = r"missing keys \[\], unexpected keys \['layers.3.bias', 'layers.3.weight'\]; .* with 4 linear layers"
    with pytest.raises(ValueError, match=message):
        load_nern(predictor, STATE)
    predictor = nern_predictor(levels=20)
    before = copy.deepcopy(predictor.state_dict())
    with pytest.raises(
        ValueError, match=r"layers.0.weight is \[140, 240\]; this predictor needs \[140, 120\]. Use the"
    ):
        load_nern(predictor, STATE)
    torch.testing.assert_close(predictor.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 0}, "hidden is 0; give at least 1"),
        ({"layers": 1}, "layers is 1; give at least 2"),
        ({"outputs": 0}, "outputs is 0; give at least 1"),
        ({"levels": 0}, "levels is 0; give at least 1"),
        ({"base": 0.0}, r"base is 0.0; expected a positive number"),
        ({"base": math.nan}, "base is nan; expected a positive number"),
        ({"fusion": "add"}, "fusion is 'add'; choose one of 'concat', 'sum'"),
        ({"embedding": "ffn"}, "embedding is 'ffn'; choose one of 'basic', 'fourier'"),
        ({"normalization": "None"}, "normalization is 'None'; choose one of None, 'local', 'global'"),
        ({"activation": "tanh"}, "activation is 'tanh'; choose one of 'relu', 'leaky_relu'"),
        ({"skip": "dense"}, "skip is 'dense'; choose one of None, 'nerf', 'residual'"),
        ({"precision": "fp16"}, "precision is 'fp16'; choose one of 'fp32', 'tf32', 'bf16'"),
        ({"embedding": "fourier", "fusion": "sum"}, "fusion is 'sum', but Fourier features already mix"),
        ({"skip": "nerf", "precision": "bf16"}, "precision is 'bf16', but skip='nerf' is not fused; use"),
        (
            {"skip": "residual", "layers": 3},
            "layers is 3; skip='residual' adds to a hidden layer 2, so give at least 4",
        ),
        ({"embedding": "fourier", "gauss_scale": (1.0, 2.0)}, r"gauss_scale is \(1.0, 2.0\); expected three numbers"),
        ({"frequencies": torch.ones(120, 3)}, "frequencies are given, but embedding='basic' has none"),
        (
            {"embedding": "fourier", "frequencies": torch.ones(40, 3)},
            r"frequencies is torch.float32 \[40, 3\]; expected torch.float32 \[120, 3\]",
        ),
        ({"sizes": (3, 4)}, r"sizes is \(3, 4\); expected three positive numbers"),
        ({"sizes": (3, 0, 5)}, r"sizes is \(3, 0, 5\); expected three positive numbers"),
        (
            {"coordinates": torch.zeros(2, 3)},
            r"coordinates is torch.float32 \[2, 3\]; expected int32 or int64 \[N, 3\]",
        ),
        (
            {"coordinates": torch.zeros(2, 2, dtype=torch.int64)},
            r"torch.int64 \[2, 2\]; expected int32 or int64 \[N, 3\]",
        ),
        ({"coordinates": torch.zeros(0, 3, dtype=torch.int64)}, "coordinates has no rows; there is no kernel"),
        (
            {"coordinates": torch.tensor([[0, 0, 0], [0, 4, 0]])},
            r"coordinates\[1\] is \[0, 4, 0\]; it must be below sizes",
        ),
        ({"coordinates": torch.tensor([[0, -1, 0]])}, r"coordinates\[0\] is \[0, -1, 0\]; it must be below .*, from 0"),
    ],
)
def test_what_cannot_be_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        WeightPredictor(**{"sizes": SMALL, "hidden": 6} | options)


@pytest.mark.parametrize("name", ["targets", "element_weights"])
@pytest.mark.parametrize("skip", [None, "nerf"])
def test_targets_of_another_network(name, skip):
    predictor = WeightPredictor(SMALL, 6, skip=skip)
    arguments = {"targets": torch.zeros(60, 9)} | {name: torch.zeros(60, 1)}
    with pytest.raises(ValueError, match=rf"{name} is .*\[60, 1\]; expected .*\[60, 9\], one row per"):
        predictor.squared_error(**arguments)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layers": 4, "outputs": 4, "base": 1.25, "levels": 3, "fusion": "sum", "skip": "residual"},
        {"embedding": "fourier", "gauss_scale": (1.0, 2.0, 3.0), "normalization": "global", "precision": "bf16"},
    ],
)
def test_configuration_makes_it_again(options):
    predictor = WeightPredictor(SMALL, 6, **options)
    configuration = json.loads(json.dumps(predictor.configuration))
    again = WeightPredictor(frequencies=predictor.frequencies, **configuration)
    again.load_state_dict(predictor.state_dict())
    assert again.configuration == predictor.configuration and repr(again) == repr(predictor)
    assert torch.equal(again(), predictor())


def test_repr_shows_what_is_not_the_default():
    assert "sizes=(3, 4, 5), rows=60, precision='fp32', parameters=1635" in repr(WeightPredictor(SMALL, 6))
    shown = repr(WeightPredictor(SMALL, 6, fusion="sum", normalization="local", skip="nerf", activation="elu"))
    assert "rows=60, fusion='sum', normalization='local', activation='elu', skip='nerf', precision='fp32'" in shown
