"""Differences, lines and planes between networks."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from hyperfast import models
from hyperfast.analysis.differences import layer_differences, rmse
from hyperfast.analysis.interpolation import blend, interpolation
from hyperfast.analysis.landscape import Plane, landscape
from hyperfast.analysis.weights import changed


def _moved(network: nn.Module, by: float, seed: int) -> nn.Module:
    other = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator)
        for name, buffer in other.named_buffers():
            if buffer.is_floating_point():
                buffer.fill_(seed if "mean" in name else 1.0 + seed)
    return other


def test_differences_by_hand() -> None:
    first = {"a": torch.zeros(2, 2), "b": torch.ones(1, 3), "bias": torch.zeros(5)}
    second = {"a": torch.tensor([[1.0, -1.0], [0.0, 2.0]]), "b": torch.ones(1, 3), "bias": torch.ones(5)}
    assert layer_differences(first, second) == [
        ("a", 1.0, pytest.approx(math.sqrt(6 / 4)), 4),
        ("b", 0.0, 0.0, 3),
    ]
    assert rmse(first, second) == pytest.approx(math.sqrt(6 / 7))
    assert rmse(first, second, ["a"]) == pytest.approx(math.sqrt(6 / 4))
    assert changed(first, [second]) == ["a"]
    assert changed(first, [first]) == ["a", "b"]


def test_differences_of_different_networks() -> None:
    with pytest.raises(ValueError, match=r"a is \[2, 2\] in one network and \[2, 3\] in the other"):
        rmse({"a": torch.zeros(2, 2)}, {"a": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match="there is no parameter 'a'; there are b"):
        rmse({"a": torch.zeros(2, 2)}, {"b": torch.zeros(2, 2)})


def test_blend_takes_parameters_and_leaves_statistics() -> None:
    network = models.create("resnet8", in_channels=1)
    other = _moved(network, 0.1, 3)
    half = blend(network, other.state_dict(), 0.25)
    assert set(half) == {name for name, _ in network.named_parameters()}
    for name, parameter in network.named_parameters():
        expected = 0.75 * parameter.double() + 0.25 * other.get_parameter(name).double()
        assert torch.equal(half[name], expected.float())
    assert set(blend(network.state_dict(), other, 0.5)) == set(half)


def test_interpolation_ends_at_both_networks_with_the_statistics_of_the_first() -> None:
    network = models.create("resnet8", in_channels=1)
    other = _moved(network, 0.1, 3)
    seen: list[dict[str, torch.Tensor]] = []

    def evaluate(module: nn.Module) -> float:
        seen.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
        return 0.5

    line = interpolation(network, other, evaluate, alphas=[0.0, 0.5, 1.0])
    whole = rmse(network, other)
    assert [point.alpha for point in line] == [0, 0.5, 1]
    assert [point.rmse for point in line] == [0, pytest.approx(whole / 2, rel=1e-5), pytest.approx(whole, rel=1e-6)]
    for name, _ in network.named_parameters():
        assert torch.equal(seen[0][name], network.state_dict()[name])
        assert torch.equal(seen[2][name], other.state_dict()[name])
    for name, buffer in network.named_buffers():
        assert torch.equal(seen[2][name], buffer)


def test_plane_by_hand() -> None:
    plane = Plane.through(
        {"a": torch.tensor([1.0, 1.0]), "bn.running_mean": torch.tensor([7.0])},
        {"a": torch.tensor([3.0, 1.0]), "bn.running_mean": torch.tensor([8.0])},
        {"a": torch.tensor([2.0, 5.0]), "bn.running_mean": torch.tensor([9.0])},
    )
    assert plane.points == ((0, 0), (2, 0), (1, 4))
    assert plane.u["a"].tolist() == [1, 0] and plane.v["a"].tolist() == [0, 1]
    assert plane.at(0.5, -2)["a"].tolist() == [1.5, -1]
    assert list(plane.at(0, 0)) == ["a"]
    x, y = plane.grid(3, margin=0.5)
    assert (x, y) == ([-3, 1, 5], [-2, 2, 6])


def test_plane_holds_its_three_networks() -> None:
    first = models.create("resnet8", in_channels=1)
    networks = [first, _moved(first, 0.1, 1), _moved(first, 0.3, 2)]
    plane = Plane.through(*networks)
    for point, network in zip(plane.points, networks, strict=True):
        for name, tensor in plane.at(*point).items():
            torch.testing.assert_close(tensor, network.get_parameter(name).detach())
    assert sum(float((plane.u[name] * plane.v[name]).sum()) for name in plane.u) == pytest.approx(0, abs=1e-12)
    x, y = plane.grid(5)
    assert x[-1] - x[0] == pytest.approx(y[-1] - y[0])
    assert all(x[0] < a < x[-1] and y[0] < b < y[-1] for a, b in plane.points)


def test_no_plane() -> None:
    a, b = {"a": torch.tensor([0.0, 0.0])}, {"a": torch.tensor([1.0, 1.0])}
    with pytest.raises(ValueError, match="the first and the second network have the same weights"):
        Plane.through(a, a, b)
    with pytest.raises(ValueError, match="the third network lies on the line through the other two"):
        Plane.through(a, b, {"a": torch.tensor([3.0, 3.0])})
    with pytest.raises(ValueError, match="size is 1; a grid has at least 2 places"):
        Plane.through(a, b, {"a": torch.tensor([1.0, 0.0])}).grid(1)


def test_landscape_of_a_paraboloid() -> None:
    network = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        network.weight.zero_()
    second, third = {"weight": torch.tensor([[2.0, 0.0]])}, {"weight": torch.tensor([[1.0, 3.0]])}
    plane = Plane.through(network, second, third)

    def measure(module: nn.Module) -> dict[str, float]:
        weight = module.weight.detach()
        return {"loss": float(weight.square().sum()), "first": float(weight[0, 0])}

    found = landscape(network, plane, measure, x=[-1.0, 0.0, 2.0], y=[0.0, 3.0])
    assert found.values["loss"].tolist() == [[1, 0, 4], [10, 9, 13]]
    assert found.values["first"].tolist() == [[-1, 0, 2], [-1, 0, 2]]
    assert found.points == plane.points
    assert not network.weight.any()
    with pytest.raises(ValueError, match="there are 0 places along x and 1 along y"):
        landscape(network, plane, measure, x=[], y=[0.0])
