"""The registry: every provider does the same work, and the sizes are those of the networks they are named after."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import on_threads
from operations import shapes
from registry import NAMES, needs, operation
from torch import Tensor
from verify import largest_error

CPU = torch.device("cpu")
CASES = [
    (name, provider.name)
    for name in NAMES
    for provider in operation(name).providers
    if provider.unavailable(CPU) is None and provider.name != "torch.compile"
]


@pytest.fixture(autouse=True)
def one_thread():
    with on_threads(1):
        yield


@pytest.mark.parametrize("name", NAMES)
def test_operation_is_complete(name: str) -> None:
    op = operation(name)
    assert op.name == name
    assert "hyperfast" in [provider.name for provider in op.providers]
    assert [case.small for case in op.cases].count(True) == 1, "the memory of a case is measured after the small one"
    assert len({case.name for case in op.cases}) == len(op.cases)
    assert all(op.flops(case.options) > 0 for case in op.cases)


@pytest.mark.parametrize(("name", "provider"), CASES)
def test_provider_agrees_with_float64(name: str, provider: str) -> None:
    op = operation(name)
    inputs = op.inputs(next(case for case in op.cases if case.small).options, CPU, 3)
    truth = op.truth(inputs)
    assert all(value.dtype == torch.float64 for value in truth.values())
    found = op.provider(provider).build(inputs).results()
    assert found.keys() == truth.keys()
    error, worst = largest_error(found, truth)
    assert error < min(op.tolerance, 1e-4), worst


@pytest.mark.parametrize(("name", "provider"), CASES)
def test_step_starts_without_gradients_and_leaves_the_inputs(name: str, provider: str) -> None:
    op = operation(name)
    options = next(case for case in op.cases if case.small).options
    inputs = op.inputs(options, CPU, 0)
    work = op.provider(provider).build(inputs)
    work.step()
    once = {name: value.clone() for name, value in work.results().items()}
    if name != "training_step":  # which moves its parameters
        work.step()
        again = work.results()
        assert all(torch.equal(once[name], again[name]) for name in once), "gradients were added up"
    untouched = op.inputs(options, CPU, 0)
    for field, value in vars(untouched).items():
        assert same(getattr(inputs, field), value), f"{field} was changed"


def same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, torch.nn.Module) and isinstance(b, torch.nn.Module):
        return same(a.state_dict(), b.state_dict())
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_inputs_depend_on_the_seed_alone() -> None:
    op = operation("attention_transfer")
    options = op.cases[-1].options
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = op.inputs(options, CPU, 5)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(7)
    assert same(op.inputs(options, CPU, 5).student, first.student)
    assert not same(op.inputs(options, CPU, 6).student, first.student)


def test_shapes_are_those_of_the_networks() -> None:
    def count(found: shapes.Shapes) -> int:
        return sum(math.prod(shape) for shape in found.values())

    # chenyaofo/pytorch-cifar-models with 100 classes, without batch norms.
    assert count(shapes.resnet(56)) == 861_620 - 4_256
    assert count(shapes.resnet(20)) == 278_324 - 1_568
    assert count(shapes.vgg11_bn()) == 9_802_596 - 5_504


def test_traffic_of_generate_is_three_heads_and_four_vectors() -> None:
    options = {"shapes": {"weight": (10, 7)}, "widths": (3, 5)}
    op = operation("generate")
    assert op.traffic(options) == 4 * (3 * 70 * 5 + 4 * 70)
    assert op.flops(options) == 6 * 70 * 5


def test_gpu_backends_are_not_offered_on_a_processor() -> None:
    reasons = {p.name: p.unavailable(CPU) for p in operation("generate").providers}
    assert reasons["hyperfast"] is None
    assert reasons["hyperfast-cuda"] == reasons["hyperfast-triton"] == "it runs on a GPU"


def test_a_missing_package_is_named() -> None:
    assert needs("json")(CPU) is None
    assert needs("no_such_peer")(CPU) == "no_such_peer is not installed (pip install 'hyperfast[peers]')"


def test_unknown_names_list_the_choices() -> None:
    with pytest.raises(ValueError, match=r"'nothing'; choose one of generate, attention_transfer"):
        operation("nothing")
    with pytest.raises(ValueError, match=r"unknown provider of generate 'x'; choose one of hyperfast"):
        operation("generate").provider("x")
    with pytest.raises(ValueError, match=r"unknown case of generate"):
        operation("generate").case("x")
