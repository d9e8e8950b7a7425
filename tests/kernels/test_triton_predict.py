"""The Triton kernels of `predict` in the interpreter, against the formula in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers import assert_as_accurate
from torch.nn import functional as F

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor

pytestmark = pytest.mark.interpreter

ACTIVATIONS = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "relu6": F.relu6,
    "elu": F.elu,
}


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    pytest.importorskip("triton")
    from hyperfast.kernels.triton import predict

    return predict


def arguments(
    width: int = 20,
    outputs: int = 9,
    count: int = 70,
    sizes: tuple[int, ...] = (3, 5, 7),
    embedding: tuple[int, ...] = (6, 10, 4),
    layers: int = 5,
    rows: Tensor | None = None,
    fusion: str = "concat",
    activation: str = "relu",
    precision: str = "fp32",
    scale: float = 2.0,
) -> list[Any]:
    inputs = [embedding[0] if fusion == "sum" else sum(embedding), *[width] * (layers - 1)]
    out = [*[width] * (layers - 1), outputs]
    return [
        [torch.randn(n, e) for n, e in zip(sizes, embedding, strict=True)],
        torch.stack([torch.randint(0, n, (count,)) for n in sizes], 1),
        [scale * torch.randn(o, i) / i**0.5 for o, i in zip(out, inputs, strict=True)],
        [torch.randn(o) / 2 for o in out],
        rows,
        fusion,
        activation,
        precision,
    ]


def eager(values: list[Any], dtype: torch.dtype, parameters: list[Tensor] | None = None) -> Tensor:
    """The factorised predictor, unfused."""
    embeddings, indices, weights, biases, rows, fusion, activation, _ = values
    embeddings = [e.to(dtype) for e in embeddings]
    if parameters is None:
        parameters = leaves(values, dtype)
    weights, biases = parameters[::2], parameters[1::2]
    if rows is not None:
        indices = indices[rows]
    x, first = biases[0], 0
    for j, e in enumerate(embeddings):
        block = weights[0] if fusion == "sum" else weights[0][:, first : first + e.shape[1]]
        first += e.shape[1]
        x = x + (e @ block.t())[indices[:, j].long()]
    for weight, bias in zip(weights[1:], biases[1:], strict=True):
        x = F.linear(ACTIVATIONS[activation](x), weight, bias)
    return x


def leaves(values: list[Any], dtype: torch.dtype) -> list[Tensor]:
    pairs = zip(values[2], values[3], strict=True)
    return [x.to(dtype).detach().requires_grad_() for pair in pairs for x in pair]


def eager_loss(values: list[Any], targets: Tensor, weights: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """Loss and flat gradient."""
    parameters = leaves(values, dtype)
    rows = slice(None) if values[4] is None else values[4]
    squares = (eager(values, dtype, parameters) - targets[rows].to(dtype)).square()
    loss = squares.sum() if weights is None else (squares * weights[rows].to(dtype)).sum()
    return [loss.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])]


def eager_gradient(values: list[Any], grad: Tensor, dtype: torch.dtype) -> Tensor:
    parameters = leaves(values, dtype)
    found = torch.autograd.grad(eager(values, dtype, parameters), parameters, grad.to(dtype))
    return torch.cat([g.flatten() for g in found])


def by_parameter(values: list[Any], *flats: Tensor) -> list[tuple[Tensor, ...]]:
    sizes = [x.numel() for x in leaves(values, torch.float32)]
    return list(zip(*(flat.split(sizes) for flat in flats), strict=True))


def check(kernels: ModuleType, values: list[Any], weighted: bool = True) -> None:
    assert kernels.supports(*values) is None
    prediction = kernels.forward(*values)
    exact = eager(values, torch.float64).detach()
    assert_as_accurate(prediction, eager(values, torch.float32).detach(), exact, what="prediction")

    grad = torch.randn(prediction.shape)
    found = kernels.backward(grad, *values)
    expected = [eager_gradient(values, grad, dtype) for dtype in (torch.float32, torch.float64)]
    for i, triple in enumerate(by_parameter(values, found, *expected)):
        assert_as_accurate(*triple, what=f"gradient of parameter {i}")

    count = values[1].shape[0]
    targets = torch.randn(count, prediction.shape[1])
    weights = torch.rand(targets.shape) * (torch.rand(targets.shape) > 0.3) if weighted else None
    inputs = [*values[:4], targets, weights, *values[4:]]
    loss, flat = kernels.squared_error(*inputs, True)
    expected_loss, expected_flat = zip(
        *(eager_loss(values, targets, weights, dtype) for dtype in (torch.float32, torch.float64)), strict=True
    )
    assert loss.shape == ()
    assert_as_accurate(loss, *expected_loss, what="loss")
    for i, triple in enumerate(by_parameter(values, flat, *expected_flat)):
        assert_as_accurate(*triple, what=f"gradient of parameter {i} from the loss")
    alone, none = kernels.squared_error(*inputs, False)
    assert torch.equal(alone, loss) and none.shape == (0,)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(kernels: ModuleType, activation: str) -> None:
    check(kernels, arguments(activation=activation))
