from __future__ import annotations

import json
from math import ceil

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperfast import models
from hyperfast.surgery import Coverage, CoveredTensor, cover

from .networks import MobileNetV2, ResNet18, SqueezeNet, ViT

NETWORKS = {
    "resnet20-A": lambda: models.create("resnet20"),
    "resnet20-B": lambda: models.create("resnet20", shortcut="B"),
    "vgg": lambda: models.create("vgg11_bn", width=8),
    "resnet18": lambda: ResNet18(width=4),
    "mobilenet": MobileNetV2,
    "vit": ViT,
    "squeezenet": SqueezeNet,
    "lstm": lambda: nn.LSTM(5, 6),
    "others": lambda: nn.Sequential(
        nn.Conv1d(3, 4, 5),
        nn.Conv3d(2, 3, 3),
        nn.ConvTranspose2d(4, 6, 2, groups=2),
        nn.Conv2d(4, 6, (1, 3)),
        nn.Conv2d(6, 6, 5, groups=6),
        nn.Embedding(11, 5),
    ),
}


def covered(module: nn.Module, name: str, **options: object) -> CoveredTensor:
    """The one tensor called `name`."""
    return next(t for t in cover(module, **options).tensors if t.name == name)  # type: ignore[arg-type]


@pytest.mark.parametrize("tile", ["auto", "row", "block"])
@pytest.mark.parametrize("kernel", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("network", NETWORKS)
def test_rows_and_back_is_exact_whatever_the_network(network: str, kernel: int, tile: str) -> None:
    module = NETWORKS[network]()
    coverage = cover(module, kernel=kernel, tile=tile)
    state = module.state_dict()
    rows = coverage.gather(state)
    assert rows.shape == (coverage.rows, kernel**2) == (len(coverage.coordinates()), coverage.outputs)
    weights = coverage.element_weights()
    mask = torch.ones_like(rows) if weights is None else weights
    assert mask.sum() == coverage.weights == sum(state[t.name].numel() for t in coverage.tensors)
    assert torch.equal(rows * mask, rows)
    # What a predictor says at masked places must not matter.
    back = coverage.scatter(torch.where(mask == 1, rows, torch.nan))
    assert list(back) == [t.name for t in coverage.tensors]
    assert all(torch.equal(back[name], state[name]) for name in back)
    coverage.check(module)


@pytest.mark.parametrize(
    ("name", "shortcut", "tensors", "rows", "weights"),
    [
        ("resnet20", "A", 19, 29_744, 267_696),
        ("resnet20", "B", 21, 32_304, 270_256),
        ("resnet56", "A", 55, 94_256, 848_304),
        ("resnet56", "B", 57, 96_816, 850_864),
    ],
)
def test_nern_covers_the_convolutions_of_cifar_resnets(
    name: str, shortcut: str, tensors: int, rows: int, weights: int
) -> None:
    coverage = cover(models.create(name, shortcut=shortcut), policy="nern")
    assert (len(coverage.tensors), coverage.rows, coverage.weights) == (tensors, rows, weights)
    names = [tensor.name for tensor in coverage.tensors]
    assert names[:3] == ["conv1.weight", "layer1.0.conv1.weight", "layer1.0.conv2.weight"]
    if shortcut == "B":
        block = [n for n in names if n.startswith("layer2.0.")]
        assert block == [f"layer2.0.{n}.weight" for n in ("conv1", "conv2", "downsample.0")]
    else:
        assert coverage.element_weights() is None


def test_nern_leaves_stem_downsamples_and_classifier_of_resnet18_out() -> None:
    with torch.device("meta"):
        module = ResNet18()
    coverage = cover(module, policy="nern")
    assert (len(coverage.tensors), coverage.rows, coverage.weights) == (16, 1_220_608, 10_985_472)
    assert all(".conv" in tensor.name for tensor in coverage.tensors)
    everything = cover(module)
    assert everything.weights == sum(p.numel() for p in module.parameters() if p.ndim > 1)


def test_nern_covers_the_features_of_squeezenet_and_what_fits_of_mobilenet() -> None:
    names = [tensor.name for tensor in cover(SqueezeNet(), policy="nern").tensors]
    assert names == [n for n, p in SqueezeNet().named_parameters() if p.ndim == 4 and n.startswith("features")]
    mobile = cover(MobileNetV2(), policy="nern")
    assert len(mobile.tensors) == len([p for p in MobileNetV2().parameters() if p.ndim == 4])


@pytest.mark.parametrize(
    ("name", "tensors", "kernels", "depthwise"),
    [("mobilenetv2_x0_5", 52, 639_824, 17), ("shufflenetv2_x0_5", 56, 325_008, 19), ("repvgg_a0", 44, 1_560_864, 0)],
)
def test_depthwise_and_pointwise_kernels_of_the_zoo(name: str, tensors: int, kernels: int, depthwise: int) -> None:
    with torch.device("meta"):
        whole = models.create(name, num_classes=100)
    coverage = cover(whole, policy="nern")
    assert (len(coverage.tensors), coverage.rows) == (tensors, kernels)

    narrow = models.create(name, width=8)
    state = narrow.state_dict()
    for coverage in (cover(narrow), cover(narrow, policy="nern")):
        coverage.check(narrow)
        back = coverage.scatter(coverage.gather(state))
        assert sum(weight.ndim == 4 for weight in back.values()) == tensors
        assert sum(weight.shape[1:] == (1, 3, 3) for weight in back.values()) == depthwise
        assert all(torch.equal(weight, state[key]) for key, weight in back.items())
    assert coverage.weights == sum(weight.numel() for key, weight in state.items() if weight.ndim == 4)


def test_every_weight_of_attention_is_covered() -> None:
    names = {tensor.name for tensor in cover(ViT()).tensors}
    assert "blocks.0.attention.in_proj_weight" in names
    assert "blocks.1.attention.out_proj.weight" in names
    assert "patches.weight" in names
    assert not [n for n in names if "norm" in n or "bias" in n]


def test_a_center_crop_is_where_nern_takes_it() -> None:
    weight = torch.arange(1.0, 9).view(2, 1, 2, 2)
    pair = CoveredTensor("w", (2, 1, 2, 2), "kernel", 3)
    assert pair.gather(weight)[0].tolist() == [1, 2, 0, 3, 4, 0, 0, 0, 0]
    tap = CoveredTensor("w", (1, 2, 1, 1), "kernel", 3)
    assert tap.gather(torch.tensor([5.0, 6]).view(1, 2, 1, 1))[1].tolist() == [0, 0, 0, 0, 6, 0, 0, 0, 0]


@pytest.mark.parametrize(("crop", "pool"), [("average", F.avg_pool2d), ("max", F.max_pool2d)])
def test_a_crop_by_pooling(crop: str, pool: object) -> None:
    module = nn.Sequential(nn.Conv2d(4, 5, 2), nn.Conv2d(5, 3, 1), nn.Conv2d(3, 2, 3))
    coverage = cover(module, policy="nern", crop=crop)
    rows = torch.randn(coverage.rows, 9)
    back = coverage.scatter(rows)
    squares = rows.view(-1, 1, 3, 3)
    assert torch.equal(back["0.weight"], pool(squares[:20], 2, 1).view(5, 4, 2, 2))  # type: ignore[operator]
    assert torch.equal(back["1.weight"], pool(squares[20:35], 3, 1).view(3, 5, 1, 1))  # type: ignore[operator]
    assert torch.equal(back["2.weight"], rows[35:].view(2, 3, 3, 3))


def test_small_kernels_are_packed_and_large_ones_split() -> None:
    pointwise = covered(nn.Conv2d(32, 16, 1), "weight", tile="row")
    assert (pointwise.how, pointwise.filters, pointwise.channels) == ("chunk", 16, ceil(32 / 9))
    weight = torch.randn(16, 32, 1, 1)
    assert torch.equal(pointwise.gather(weight).view(16, 4, 9)[3, 1], weight[3, 9:18, 0, 0])

    block = covered(nn.Linear(32, 16), "weight", tile="block")
    assert (block.how, block.filters, block.channels) == ("block", 6, 11)
    matrix = torch.randn(16, 32)
    assert torch.equal(block.gather(matrix).view(6, 11, 9)[2, 4], matrix[6:9, 12:15].flatten())

    stem = covered(nn.Conv2d(3, 8, 7), "weight")
    assert (stem.how, stem.filters, stem.channels) == ("split", 8, 3 * 6)
    kernels = torch.randn(8, 3, 7, 7)
    assert torch.equal(stem.gather(kernels).view(8, 3, 6, 9)[5, 2, 1], kernels[5, 2].flatten()[9:18])

    pairs = covered(nn.Conv2d(18, 4, 2), "weight")
    assert (pairs.how, pairs.rows * 9) == ("chunk", 4 * 18 * 4), "nothing is wasted"


def test_depthwise_kernels_fill_their_rows() -> None:
    same = covered(nn.Conv2d(12, 12, 3, groups=12), "weight")
    assert (same.how, same.filters, same.channels) == ("kernel", 12, 1)
    scale = covered(nn.Conv2d(12, 12, 1, groups=12), "weight", tile="row")
    assert (scale.how, scale.filters, scale.channels) == ("filters", 1, 2)
    larger = covered(nn.Conv2d(12, 12, 5, groups=12), "weight")
    assert (larger.how, larger.filters, larger.channels) == ("split", 12, 3)
    within = covered(nn.Conv2d(12, 12, 3, groups=12), "weight", kernel=5)
    assert (within.how, within.filters, within.channels) == ("filters", 1, 5)
    alone = covered(nn.Conv2d(12, 12, 3, groups=12), "weight", kernel=4)
    assert (alone.how, alone.filters, alone.channels) == ("chunk", 12, 1)


def test_auto_takes_the_tiling_of_fewer_rows() -> None:
    assert covered(nn.Linear(3, 30), "weight").how == "filters"
    assert covered(nn.Linear(32, 64), "weight").how == "block"
    assert covered(nn.Linear(64, 10), "weight").how == "chunk"


def test_coordinates_run_over_layers_filters_and_channels() -> None:
    coverage = cover(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 1, 3)), policy="nern")
    expected = [[0, f, c] for f in range(3) for c in range(2)] + [[1, 0, c] for c in range(3)]
    assert coverage.coordinates().tolist() == expected
    assert coverage.coordinates().dtype == torch.int64
    assert coverage.slices() == (slice(0, 6), slice(6, 9))


def test_scatter_is_differentiable_and_masked_outputs_get_no_gradient() -> None:
    module = models.create("resnet8", shortcut="B")
    for coverage in (cover(module), cover(module, policy="nern")):
        mask = coverage.element_weights()
        assert mask is not None
        rows = torch.randn(coverage.rows, 9, requires_grad=True)
        sum(weight.sum() for weight in coverage.scatter(rows).values()).backward()
        assert torch.equal(rows.grad, mask)


def test_scatter_copies_nothing_where_rows_are_kernels() -> None:
    coverage = cover(models.create("resnet8"), policy="nern")
    rows = torch.randn(coverage.rows, 9)
    storage = rows.untyped_storage().data_ptr()
    assert all(weight.untyped_storage().data_ptr() == storage for weight in coverage.scatter(rows).values())


def test_globs_include_and_exclude() -> None:
    module = models.create("resnet8")
    assert [t.name for t in cover(module, include="fc.*").tensors] == ["fc.weight", "fc.bias"]
    names = [t.name for t in cover(module, exclude=["layer*.conv2.weight", "fc.weight"]).tensors]
    assert names == ["conv1.weight", *(f"layer{i}.0.conv1.weight" for i in (1, 2, 3))]
    assert cover(module, include="fc.weight", policy="nern").tensors[0].single_tap


def test_a_shared_weight_is_covered_once() -> None:
    module = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9))
    module[1].weight = module[0].weight
    assert [t.name for t in cover(module).tensors] == ["0.weight"]


def test_json_keeps_everything_and_notices_changes() -> None:
    coverage = cover(NETWORKS["others"](), kernel=5)
    text = coverage.to_json()
    assert Coverage.from_json(text) == coverage
    assert Coverage.from_json(text).fingerprint == coverage.fingerprint
    for change in (
        ('"name": "0.weight"', '"name": "x.weight"'),
        ('"kernel": 5', '"kernel": 3'),
        ("[4, 3, 5]", "[3, 4, 5]"),
    ):
        assert change[0] in text
        with pytest.raises(ValueError, match="was changed after it was written"):
            Coverage.from_json(text.replace(*change))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "this is no coverage"),
        ("[]", "this is no coverage"),
        ("{}", "this is no coverage: 'format'"),
        ('{"format": 9}', "format 9; this version reads 1"),
        (
            cover(nn.Linear(9, 9)).to_json().replace('"block"', '"spiral"').replace('"chunk"', '"spiral"'),
            "this is no coverage: no layout of weight: 'spiral'",
        ),
    ],
)
def test_foreign_json_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Coverage.from_json(text)


def test_a_changed_network_is_named() -> None:
    coverage = Coverage.from_json(cover(models.create("resnet8")).to_json())
    other = models.create("resnet8", width=4)
    with pytest.raises(ValueError, match=r"the network \(ResNet\) .* layer1.0.conv1.weight is \[4, 4, 3, 3\], was \["):
        coverage.check(other)
    del other.fc
    with pytest.raises(ValueError, match="fc.weight is missing"):
        coverage.check(other)
    state = models.create("resnet8").state_dict()
    state["conv.weight"] = state.pop("conv1.weight")
    with pytest.raises(ValueError, match=r"the state .*conv1.weight is missing \(did you mean conv.weight"):
        coverage.gather(state)


def test_rows_of_another_shape_are_refused() -> None:
    coverage = cover(models.create("resnet8"))
    with pytest.raises(ValueError, match=rf"rows are \[3, 9\]; this coverage has \[{coverage.rows}, 9\]"):
        coverage.scatter(torch.zeros(3, 9))


def _lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(4))


def _empty() -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(torch.empty(2, 0))
    return module


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (nn.Linear(2, 2), {"policy": "some"}, "policy is 'some'; choose one of 'all', 'nern'"),
        (nn.Linear(2, 2), {"tile": "wide"}, "tile is 'wide'; choose one of 'auto', 'row', 'block'"),
        (nn.Linear(2, 2), {"crop": "left"}, "crop is 'left'; choose one of 'center', 'average', 'max'"),
        (nn.Linear(2, 2), {"crop": "max"}, "only 'all' tiles and only 'nern' crops"),
        (nn.Conv2d(2, 2, 3), {"policy": "nern", "tile": "row"}, "only 'all' tiles and only 'nern' crops"),
        (nn.Linear(2, 2), {"kernel": 0}, "kernel is 0; the side of the predictor's output is at least 1"),
        (nn.ReLU(), {}, "there is nothing to cover in ReLU"),
        (nn.Linear(2, 2), {"policy": "nern"}, "there is nothing to cover in Linear with policy='nern'"),
        (nn.Linear(2, 2), {"exclude": "*"}, "there is nothing to cover .* Parameters: weight, bias"),
        (
            nn.Linear(2, 2),
            {"include": "weigth"},
            r"include: the glob 'weigth' matches no parameter \(did you mean weig",
        ),
        (nn.Linear(2, 2), {"exclude": ["bias", "x*"]}, r"exclude: the glob 'x\*' matches no parameter"),
        (
            nn.Conv2d(3, 4, 7),
            {"policy": "nern", "include": "weight"},
            r"weight \[4, 3, 7, 7\] does not fit into 3x3 outputs.*larger kernel, leave it out, or use policy='all'",
        ),
        (_lazy(), {}, "0.weight has no shape yet"),
        (_empty(), {}, r"weight is torch.float32 \[2, 0\]; only weights of at least one dimension"),
    ],
)
def test_what_cannot_be_covered_is_an_error(module: nn.Module, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cover(module, **options)  # type: ignore[arg-type]


def test_a_state_on_another_dtype_keeps_it() -> None:
    module = nn.Conv2d(2, 3, 3).double()
    rows: Tensor = cover(module).gather(module.state_dict())
    assert rows.dtype == torch.float64
    assert json.loads(cover(module).to_json())["kernel"] == 3
