"""The Triton kernels of `generate` in the interpreter, against the reference in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers import assert_as_accurate

from hyperfast import reference

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor

pytestmark = pytest.mark.interpreter


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    pytest.importorskip("triton")
    from hyperfast.kernels.triton import generate

    return generate


def arguments(
    batch: int = 1,
    segments: int | None = None,
    dimension: int = 3,
    widths: tuple[int, ...] = (5, 12),
    rows: int = 301,
    encoding: str = "cos|sin",
    activation: str = "leaky_relu",
    dtype: torch.dtype = torch.float32,
    offsets: list[int] | None = None,
) -> list[Any]:
    width = dimension if encoding == "none" else 2 * dimension
    weights, biases = [], []
    for out in widths:
        weights.append(torch.randn(out, width) / width**0.5)
        biases.append(torch.randn(out) / 4)
        width = out
    condition = torch.rand(batch, segments or 1, dimension)
    head, theta0 = torch.randn(rows, width), torch.randn(rows)
    if segments is not None and offsets is None:
        offsets = [0, *torch.randint(0, rows + 1, (segments - 1,)).sort().values.tolist(), rows]
    cast = [x.to(dtype) for x in (condition, head, theta0)]
    trunk = [[x.to(dtype) for x in weights], [x.to(dtype) for x in biases]]
    where = None if offsets is None else torch.tensor(offsets)
    return [cast[0], *trunk, cast[1], cast[2], where, encoding, activation, 0.01]


def doubled(values: list[Any]) -> list[Any]:
    def double(x: Any) -> Any:
        if isinstance(x, list):
            return [double(y) for y in x]
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return [double(x) for x in values]


def without_theta0(values: list[Any]) -> list[Any]:
    return values[:4] + values[5:]


def check(kernels: ModuleType, values: list[Any]) -> None:
    assert kernels.supports(*values) is None
    theta = kernels.forward(*values)
    assert theta.dtype == values[3].dtype and theta.is_contiguous()
    assert_as_accurate(theta, reference.generate(*values), reference.generate(*doubled(values)), what="theta")
    grad = torch.randn(theta.shape).to(theta.dtype)
    inputs = [grad, *without_theta0(values), True]
    found, eager = kernels.backward(*inputs), reference.generate_backward(*inputs)
    for name, a, b, c in zip(
        ("d_condition", "d_trunk", "d_head"), found, eager, reference.generate_backward(*doubled(inputs)), strict=True
    ):
        assert a.dtype == grad.dtype and a.is_contiguous()
        assert_as_accurate(a, b, c, what=name)
    *rest, d_head = kernels.backward(*inputs[:-1], False)
    assert d_head.numel() == 0 and all(map(torch.equal, rest, found))


@pytest.mark.parametrize("encoding", ["cos|sin", "z|1-z", "none"])
@pytest.mark.parametrize("activation", ["leaky_relu", "relu", "gelu", "tanh"])
def test_encodings_and_activations(kernels: ModuleType, encoding: str, activation: str) -> None:
    check(kernels, arguments(encoding=encoding, activation=activation))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [1, 2, 5, 9, 17, 40])
def test_every_tile_of_conditions(kernels: ModuleType, batch: int, dtype: torch.dtype) -> None:
    check(kernels, arguments(batch=batch, dtype=dtype))


@pytest.mark.parametrize("batch", [1, 3, 18])
@pytest.mark.parametrize("segments", [1, 4, 11])
def test_segments(kernels: ModuleType, segments: int, batch: int) -> None:
    check(kernels, arguments(batch=batch, segments=segments))


def test_segments_in_half_precision(kernels: ModuleType) -> None:
    check(kernels, arguments(batch=6, segments=3, dtype=torch.float16))


def test_empty_segments_and_more_segments_than_a_block_of_offsets(kernels: ModuleType) -> None:
    check(kernels, arguments(segments=5, offsets=[0, 0, 7, 7, 301, 301]))
    check(kernels, arguments(segments=258, offsets=[0] * 256 + [100, 200, 301]))


@pytest.mark.parametrize("widths", [(), (1,), (33,), (64, 7, 3), (4, 4, 4, 4, 4, 4, 4, 4)])
def test_trunks(kernels: ModuleType, widths: tuple[int, ...]) -> None:
    check(kernels, arguments(widths=widths))
    check(kernels, arguments(widths=widths, batch=18, rows=70))


@pytest.mark.parametrize("rows", [1, 2, 1000])
def test_row_counts(kernels: ModuleType, rows: int) -> None:
    check(kernels, arguments(rows=rows, widths=(16, 128)))


def test_conditions_outside_the_unit_interval_keep_their_period(kernels: ModuleType) -> None:
    values = arguments(widths=())
    values[0] = torch.tensor([-7.75, 3.5, 250.25]).view(1, 1, 3)
    check(kernels, values)


def test_nan_passes_through(kernels: ModuleType) -> None:
    values = arguments(activation="tanh")
    values[0][..., 1] = torch.nan
    assert kernels.forward(*values).isnan().all()


def test_strided_arguments(kernels: ModuleType) -> None:
    values = arguments(batch=2)
    grad = torch.randn(301, 2).t()
    expected = [kernels.forward(*values), *kernels.backward(grad.contiguous(), *without_theta0(values))]
    values[1] = [w.t().contiguous().t() for w in values[1]]
    values[3] = values[3].t().contiguous().t()
    found = [kernels.forward(*values), *kernels.backward(grad, *without_theta0(values))]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_empty(kernels: ModuleType) -> None:
    values = arguments(rows=0)
    assert kernels.forward(*values).shape == (1, 0)
    found = kernels.backward(torch.empty(1, 0), *without_theta0(values))
    assert all(not x.any() and not x.isnan().any() for x in found)

    values = arguments(batch=0)
    assert kernels.forward(*values).shape == (0, 301)
    found = kernels.backward(torch.empty(0, 301), *without_theta0(values))
    assert found[0].shape == (0, 1, 3) and not found[1].any() and not found[2].any()


@pytest.mark.parametrize("batch", [1, 20])
def test_two_runs_agree_bit_for_bit(kernels: ModuleType, batch: int) -> None:
    values = arguments(batch=batch, segments=3)
    inputs = [torch.randn(batch, 301), *without_theta0(values)]

    def run() -> list[Tensor]:
        return [kernels.forward(*values), *kernels.backward(*inputs)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_one_launch_each_way(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import GridExecutor

    launches = []
    call = GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        launches.append(self.fn.__name__)
        call(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    values = arguments(batch=3, segments=6)
    kernels.forward(*values)
    kernels.backward(torch.randn(3, 301), *without_theta0(values))
    assert launches == ["generate_forward_kernel", "generate_backward_kernel"]


def test_refusals_name_the_reason(kernels: ModuleType) -> None:
    assert "float64" in kernels.supports(*doubled(arguments()))
    assert "bfloat16" in kernels.supports(*arguments(dtype=torch.bfloat16))
    assert "300 wide; at most 256" in kernels.supports(*arguments(widths=(300,)))
    assert "9 trunk layers; at most 8" in kernels.supports(*arguments(widths=(2,) * 9))
    meta = arguments()
    meta[3] = meta[3].to("meta")
    assert "the tensors are on meta" in kernels.supports(*meta)
    mixed = arguments()
    mixed[0] = mixed[0].half()
    assert "different dtypes" in kernels.supports(*mixed)
