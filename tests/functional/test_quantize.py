"""Weights as integers."""

from __future__ import annotations

import re

import pytest
import torch

from hyperfast.functional import dequantize, fake_quantize, quantize


def test_one_scale_per_channel_by_hand() -> None:
    weight = torch.tensor([[127.0, -63.5, 2.0], [0.0, -0.254, 0.127]])
    values, scales = quantize(weight)
    assert values.dtype == torch.int8
    assert values.tolist() == [[127, -64, 2], [0, -127, 64]]  # -63.5 and 63.5 are ties: to even
    torch.testing.assert_close(scales, torch.tensor([[1.0], [0.002]]))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_error_is_at_most_half_a_step(bits: int, axis: int | None) -> None:
    weight = torch.randn(5, 4, 3, 3, dtype=torch.float64) * torch.logspace(-3, 3, 5).double().view(-1, 1, 1, 1)
    values, scales = quantize(weight, axis=axis, bits=bits)
    others = [d for d in range(4) if axis is None or d != axis % 4]
    assert torch.equal(scales, weight.abs().amax(others, keepdim=True) / (2 ** (bits - 1) - 1))
    error = (dequantize(values, scales, torch.float64) - weight).abs()
    assert (error <= scales / 2 * (1 + 1e-12)).all()
    assert values.abs().amax() == 2 ** (bits - 1) - 1
    assert values.unique().numel() > 2 or bits == 2


def test_zeros_and_tiny_values_stay_finite() -> None:
    weight = torch.tensor([[0.0, 0.0], [1e-44, -1e-44]])
    values, scales = quantize(weight)
    assert values[0].tolist() == [0, 0] and scales[0] == 1
    assert dequantize(values, scales).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_fake_is_the_round_trip_with_the_gradient_of_the_identity(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 6, dtype=dtype, requires_grad=True)
    fake = fake_quantize(weight, bits=4)
    assert fake.dtype == dtype
    assert torch.equal(fake, dequantize(*quantize(weight, bits=4), dtype))
    assert not torch.equal(fake, weight)
    upstream = torch.randn(4, 6, dtype=dtype)
    fake.backward(upstream)
    assert torch.equal(weight.grad, upstream)


def test_fake_quantised_weights_are_stored_without_loss() -> None:
    once = fake_quantize(torch.randn(8, 9))
    torch.testing.assert_close(fake_quantize(once), once, rtol=1e-6, atol=0)
    assert torch.equal(quantize(once)[0], quantize(torch.clone(once))[0])


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (torch.zeros(2, dtype=torch.int32), {}, "weight is torch.int32 [2]; expected floats, at least one"),
        (torch.zeros(0, 3), {}, "weight is torch.float32 [0, 3]"),
        (torch.zeros(2, 3), {"axis": 2}, "axis is 2; weight has 2 dimensions: give one of them, or None"),
        (torch.zeros(2, 3), {"bits": 9}, "bits is 9; choose 2 to 8"),
    ],
)
def test_messages(weight: torch.Tensor, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        quantize(weight, **options)
