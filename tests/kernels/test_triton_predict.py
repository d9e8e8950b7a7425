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


@pytest.mark.parametrize(
    ("width", "count"),
    [(1, 1), (16, 40), (17, 130), (33, 20), (140, 16)],
    ids=str,
)
def test_widths_and_counts_that_fill_no_tile(kernels: ModuleType, width: int, count: int) -> None:
    check(kernels, arguments(width=width, count=count, layers=3, sizes=(1, 2, 3), embedding=(2, 3, 5)))


def test_rows_with_repetitions(kernels: ModuleType) -> None:
    rows = torch.randint(0, 70, (41,))
    rows[7:20] = 5
    check(kernels, arguments(rows=rows))
    check(kernels, arguments(rows=rows, layers=3), weighted=False)


def test_sum_fusion_and_narrow_indices(kernels: ModuleType) -> None:
    values = arguments(fusion="sum", embedding=(6, 6, 6), layers=3)
    values[1] = values[1].int()
    check(kernels, values)


@pytest.mark.parametrize("layers", [2, 3])
def test_one_coordinate_with_a_row_per_kernel(kernels: ModuleType, layers: int) -> None:
    values = arguments(sizes=(70,), embedding=(21,), layers=layers, rows=torch.randint(0, 70, (33,)))
    values[1] = torch.arange(70)[:, None]
    check(kernels, values)  # fewer rows than coordinates: no tables


@pytest.mark.parametrize("outputs", [2, 17])
def test_outputs(kernels: ModuleType, outputs: int) -> None:
    check(kernels, arguments(outputs=outputs, layers=2, count=20, sizes=(3, 5, 7)))


def test_several_passes_over_the_columns_and_several_chunks_of_rows(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hyperfast.kernels.triton import predict_fused

    monkeypatch.setattr(predict_fused, "WORKSPACE", 0)
    monkeypatch.setattr(predict_fused, "SPLIT", 16)
    monkeypatch.setattr(predict_fused, "multiprocessors", lambda device: 10)
    check(kernels, arguments(width=18, count=330, layers=3))
    monkeypatch.setattr(predict_fused, "multiprocessors", lambda device: 1)
    check(kernels, arguments(width=200, count=40, layers=3))


@pytest.mark.parametrize("tables", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_matrix_products_take_over(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, activation: str, tables: bool
) -> None:
    from hyperfast.kernels.triton import predict_layers

    monkeypatch.setattr(kernels, "FUSED_WIDTH", 16)
    monkeypatch.setattr(predict_layers, "WORKSPACE", 0)
    rows = torch.randint(0, 70, (50 if tables else 9,))
    check(kernels, arguments(width=20, activation=activation, rows=rows))
    assert torch.backends.cuda.matmul.fp32_precision == "none"


def test_one_layer_hidden_above_the_fused_width(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "FUSED_WIDTH", 16)
    check(kernels, arguments(width=20, layers=2, fusion="sum", embedding=(6, 6, 6)))


def test_what_has_no_weight_is_not_looked_at(kernels: ModuleType) -> None:
    values = arguments(layers=3, count=20)
    targets, weights = torch.randn(20, 9), torch.ones(20, 9)
    weights[:, 4] = 0
    expected = kernels.squared_error(*values[:4], targets, weights, *values[4:], True)
    targets[:, 4] = torch.nan
    found = kernels.squared_error(*values[:4], targets, weights, *values[4:], True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    weights[3, 4] = 1
    assert kernels.squared_error(*values[:4], targets, weights, *values[4:], True)[0].isnan()


def test_nan_passes_through(kernels: ModuleType) -> None:
    for activation in ACTIVATIONS:
        values = arguments(layers=3, count=20, activation=activation)
        values[2][1][0, 0] = torch.nan
        assert kernels.forward(*values).isnan().all(), activation


def test_strided_arguments(kernels: ModuleType) -> None:
    values = arguments(layers=3, count=20)
    expected = kernels.forward(*values)
    values[0] = [e.t().contiguous().t() for e in values[0]]
    values[1] = values[1].t().contiguous().t()
    values[2] = [w.t().contiguous().t() for w in values[2]]
    assert torch.equal(kernels.forward(*values), expected)


@pytest.mark.parametrize("fused_width", [16, 512])
def test_no_rows(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, fused_width: int) -> None:
    monkeypatch.setattr(kernels, "FUSED_WIDTH", fused_width)
    values = arguments(rows=torch.empty(0, dtype=torch.int64))
    assert kernels.forward(*values).shape == (0, 9)
    loss, flat = kernels.squared_error(*values[:4], torch.randn(70, 9), None, *values[4:], True)
    assert loss == 0 and not flat.any()
    assert not kernels.backward(torch.empty(0, 9), *values).any()


def test_two_runs_agree_bit_for_bit(kernels: ModuleType) -> None:
    values = arguments(layers=3)
    targets = torch.randn(70, 9)
    runs = [kernels.squared_error(*values[:4], targets, None, *values[4:], True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_launches(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import GridExecutor

    launches: list[str] = []
    call = GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        launches.append(self.fn.__name__)
        call(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    values = arguments(layers=3, count=20)
    kernels.forward(*values)
    assert launches == ["predict_prepare_kernel", "predict_rows_kernel"]
    launches.clear()
    kernels.squared_error(*values[:4], torch.randn(20, 9), None, *values[4:], True)
    assert launches == [
        "predict_prepare_kernel",
        "predict_rows_kernel",
        "predict_weight_gradient_kernel",
        "predict_reduce_kernel",
    ]


def test_refusals_name_the_reason(kernels: ModuleType) -> None:
    values = arguments()
    assert "float64 is not float32" in kernels.supports([e.double() for e in values[0]], *values[1:])
    assert "bfloat16" in kernels.supports(*arguments(precision="bf16"))
    assert "1 layers; 2 to 12" in kernels.supports(*arguments(layers=1))
    assert "9 coordinates; at most 8" in kernels.supports(*arguments(sizes=(2,) * 9, embedding=(2,) * 9))
    assert "65 outputs per row; at most 64" in kernels.supports(*arguments(outputs=65))
    assert "no elements" in kernels.supports(*arguments(embedding=(0, 1, 2)))
    values[2] = [w.to("meta") for w in values[2]]
    assert "the tensors are on meta" in kernels.supports(*values)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_every_width_has_a_configuration(precision: str) -> None:
    from hyperfast.kernels.config import predict_config

    for width in range(1, 513):
        for rows in (1, 4096, 94256):
            config = predict_config(rows, width, precision, 132)
            assert sum(config.pieces) == config.stride and 0 <= config.stride - width < 16
            assert all(piece & (piece - 1) == 0 and piece >= 16 for piece in config.pieces)
            assert config.passes[0] == 0 and config.passes[-1] == len(config.pieces)
