from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hyperfast
from hyperfast import models
from hyperfast.surgery import Coverage, CoveredTensor, Permutation, cover, find_permutation, permutation_bits

from .networks import MobileNetV2, ResNet18, ViT

KINDS = ("in-filter", "cross-filter")
RESNET18 = ((64, 64),) * 4 + ((128, 64),) + ((128, 128),) * 3 + ((256, 128),) + ((256, 256),) * 3
RESNET18 += ((512, 256),) + ((512, 512),) * 3


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(Path(__file__).parents[1] / "golden" / "nern.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files if name.startswith(("C_", "B_target"))}


@pytest.fixture
def toy(golden: dict[str, Tensor]) -> tuple[Coverage, Tensor]:
    """NeRN's toy network: two layers of 3x3 kernels and one of 1x1."""
    state = {f"{i}": golden[f"B_target{i}"] for i in range(3)}
    coverage = Coverage(tuple(CoveredTensor(name, tuple(w.shape), "kernel", 3) for name, w in state.items()))
    return coverage, coverage.gather(state)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("kind", "name"), [("in-filter", "C_infilter_coord"), ("cross-filter", "C_cross_coord")])
def test_coordinates_are_those_of_nern(
    golden: dict[str, Tensor], toy: tuple[Coverage, Tensor], kind: str, name: str, backend: str
) -> None:
    coverage, targets = toy
    with hyperfast.use_backend(backend):
        permutation = find_permutation(coverage, targets, kind)
    expected = torch.cat([golden[f"{name}{i}"] for i in range(3)])
    assert torch.equal(permutation.invert(coverage.coordinates()), expected)


def test_orders_are_those_of_nern(golden: dict[str, Tensor], toy: tuple[Coverage, Tensor]) -> None:
    cross = find_permutation(*toy, "cross-filter")
    assert torch.equal(cross.orders, torch.cat([golden[f"C_crossorder{i}"] for i in range(3)]))
    within = find_permutation(*toy, "in-filter")
    pairs = [(golden[f"C_infilter_filterorder{i}"], golden[f"C_infilter_channelorder{i}"].flatten()) for i in range(3)]
    assert torch.equal(within.orders, torch.cat([order for pair in pairs for order in pair]))


@pytest.mark.parametrize("kind", ["identity", *KINDS])
def test_predicting_on_the_grid_is_predicting_at_permuted_coordinates(toy: tuple[Coverage, Tensor], kind: str) -> None:
    """NeRN embeds the kernel of row r at its permuted coordinate; here the targets are permuted instead."""
    coverage, targets = toy
    permutation = find_permutation(coverage, targets, kind)
    coordinates = coverage.coordinates()
    weights = torch.randn(3, 9, dtype=torch.float64)

    def predict(at: Tensor) -> Tensor:
        return (at.double() @ weights).sin()

    grid = predict(coordinates)
    assert torch.equal(permutation.invert(grid), predict(permutation.invert(coordinates)))
    nern = (predict(permutation.invert(coordinates)) - targets).square().sum()
    torch.testing.assert_close((grid - permutation.apply(targets)).square().sum(), nern, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["identity", *KINDS])
def test_invert_undoes_apply_and_lets_gradients_through(kind: str) -> None:
    module = models.create("resnet8", shortcut="B")
    coverage = cover(module, policy="nern")
    targets = coverage.gather(module.state_dict()).requires_grad_()
    permutation = find_permutation(coverage, targets, kind)
    assert torch.equal(permutation.invert(permutation.apply(targets)), targets)
    assert torch.equal(permutation.apply(permutation.invert(targets)), targets)
    permutation.invert(targets).square().sum().backward()
    assert torch.equal(targets.grad, 2 * targets)
    for piece in coverage.slices():
        assert torch.equal(permutation.index[piece].sort().values, torch.arange(piece.start, piece.stop))


def _chain(rows: Tensor) -> list[int]:
    """Greedy chain by cosine in float64."""
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    left, chain = list(range(1, len(unit))), [0]
    while left:
        best = max(left, key=lambda i: float(unit[i] @ unit[chain[-1]]))
        left.remove(best)
        chain.append(best)
    return chain


def test_orders_against_a_naive_implementation() -> None:
    module = nn.Sequential(nn.Conv2d(5, 7, 3), nn.Linear(40, 6))
    coverage = cover(module)
    targets = coverage.gather(module.state_dict())
    cross, within = (find_permutation(coverage, targets, kind) for kind in ("cross-filter", "in-filter"))
    for piece, (filters, channels) in zip(coverage.slices(), coverage.grids, strict=True):
        rows = targets[piece]
        assert (cross.index[piece] - piece.start).tolist() == _chain(rows)
        kernels = rows.view(filters, channels, 9)
        order = [_chain(kernel) for kernel in kernels]
        unit = torch.nn.functional.normalize(kernels.double(), dim=2)
        by_filter = _chain(torch.stack([u[o] for u, o in zip(unit, order, strict=True)]).flatten(1))
        expected = [f * channels + c for f in by_filter for c in order[f]]
        assert (within.index[piece] - piece.start).tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("network", [MobileNetV2, ViT, lambda: ResNet18(4)], ids=["mobilenet", "vit", "resnet18"])
def test_tiled_depthwise_and_split_rows_are_ordered_as_well(network: object, kind: str) -> None:
    module = network()  # type: ignore[operator]
    coverage = cover(module)
    targets = coverage.gather(module.state_dict())
    permutation = find_permutation(coverage, targets, kind)

    def similarity(rows: Tensor) -> Tensor:
        unit = torch.nn.functional.normalize(rows, dim=1)
        return sum((unit[p][1:] * unit[p][:-1]).sum() for p in coverage.slices())  # type: ignore[return-value]

    assert similarity(permutation.apply(targets)) > similarity(targets)
    unpacked = Permutation.unpack(permutation.packed(), coverage, kind)
    assert torch.equal(unpacked.index, permutation.index)


@pytest.mark.parametrize(
    ("name", "in_filter", "cross_filter"), [("resnet20", 21_340, 42_084), ("resnet56", 68_332, 134_244)]
)
def test_sizes_of_cifar_resnets(name: str, in_filter: int, cross_filter: int) -> None:
    grids = cover(models.create(name), policy="nern").grids
    assert permutation_bits("in-filter", grids) == 8 * in_filter
    assert permutation_bits("cross-filter", grids) == 8 * cross_filter
    assert permutation_bits("identity", grids) == 0


def test_sizes_of_resnet18() -> None:
    with torch.device("meta"):
        assert cover(ResNet18(), policy="nern").grids == RESNET18
    assert permutation_bits("in-filter", RESNET18) == 8 * 1_306_496
    assert permutation_bits("cross-filter", RESNET18) == 8 * 2_626_560


@pytest.mark.parametrize("kind", ["identity", *KINDS])
def test_packing_keeps_every_order(kind: str) -> None:
    module = models.create("resnet8", shortcut="B", width=5, in_channels=1)
    coverage = cover(module)
    permutation = find_permutation(coverage, coverage.gather(module.state_dict()), kind)
    packed = permutation.packed()
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-permutation.bits // 8)
    unpacked = Permutation.unpack(packed, coverage, kind)
    assert torch.equal(unpacked.orders, permutation.orders)
    assert torch.equal(unpacked.index, permutation.index)


def test_the_first_bits_are_the_first_entries() -> None:
    coverage = cover(nn.Conv2d(1, 5, 3))
    permutation = Permutation("cross-filter", coverage.grids, torch.tensor([4, 2, 0, 3, 1]))
    stream = "001" + "010" + "000" + "110" + "100"  # three bits each, the least significant first
    expected = [int(stream[:8][::-1], 2), int(stream[8:][::-1], 2)]
    assert permutation.packed().tolist() == expected


def test_damaged_bits_are_refused() -> None:
    coverage = cover(nn.Conv2d(1, 5, 3))
    packed = Permutation("cross-filter", coverage.grids, torch.tensor([4, 2, 0, 3, 1])).packed()
    with pytest.raises(ValueError, match="an order is no permutation"):
        Permutation.unpack(packed ^ torch.tensor([1, 0], dtype=torch.uint8), coverage, "cross-filter")
    with pytest.raises(ValueError, match="packed holds bits behind the last order"):
        Permutation.unpack(packed ^ torch.tensor([0, 128], dtype=torch.uint8), coverage, "cross-filter")
    message = r"packed is torch.uint8 \[1\]; a cross-filter permutation of this coverage is torch.uint8 \[2\]"
    with pytest.raises(ValueError, match=message):
        Permutation.unpack(packed[:1], coverage, "cross-filter")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_are_an_error_or_come_last(kind: str) -> None:
    module = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 5, 3))
    with torch.no_grad():
        module[1].weight[3, [0, 2]] = 0
    coverage = cover(module, policy="nern")
    targets = coverage.gather(module.state_dict())
    message = r"filter 3, channel 0 of 1.weight is all zero \(2 such rows\).*zero='last'"
    with pytest.raises(ValueError, match=message):
        find_permutation(coverage, targets, kind)
    index = find_permutation(coverage, targets, kind, zero="last").index[24:] - 24
    ends = index.view(5, 6)[index.view(5, 6)[:, 0] // 6 == 3] if kind == "in-filter" else index
    assert ends.flatten()[-2:].tolist() == [18, 20]


def test_zeros_among_single_taps_come_last_too() -> None:
    module = nn.Conv2d(3, 2, 1, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[0.0, 2, -1], [0, 0, 0]]).view(2, 3, 1, 1))
    coverage = cover(module, policy="nern")
    targets = coverage.gather(module.state_dict())
    with pytest.raises(ValueError, match="filter 0, channel 0 of weight is all zero"):
        find_permutation(coverage, targets, "in-filter")
    cross = find_permutation(coverage, targets, "cross-filter", zero="last")
    assert cross.index.tolist() == [1, 2, 0, 3, 4, 5]
    # Distances of values are defined for zeros: 0 is nearer to -1 than to 2.
    within = find_permutation(coverage, targets, "in-filter", zero="last")
    assert within.index.tolist() == [0, 2, 1, 3, 4, 5]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_weights_that_are_no_numbers_are_named(kind: str, value: float) -> None:
    module = models.create("resnet8")
    with torch.no_grad():
        module.layer2[0].conv1.weight[7, 3, 1, 1] = value
    coverage = cover(module)
    message = "filter 7, channel 3 of layer2.0.conv1.weight has NaN or infinite weights"
    with pytest.raises(ValueError, match=message):
        find_permutation(coverage, coverage.gather(module.state_dict()), kind, zero="last")


def test_bad_arguments_are_named() -> None:
    coverage = cover(nn.Conv2d(2, 3, 3))
    targets = torch.randn(6, 9)
    with pytest.raises(ValueError, match="kind is 'best'; choose one of 'identity', 'in-filter', 'cross-filter'"):
        find_permutation(coverage, targets, "best")
    with pytest.raises(ValueError, match="zero is 'first'; choose one of 'error', 'last'"):
        find_permutation(coverage, targets, zero="first")
    with pytest.raises(ValueError, match=r"targets are \[5, 9\]; this coverage has \[6, 9\]"):
        find_permutation(coverage, targets[:5])
    with pytest.raises(ValueError, match="5 rows were given; this permutation has 6"):
        find_permutation(coverage, targets).apply(targets[:5])
