"""Symmetric integer quantisation of weights, with the straight-through gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def quantize(weight: Tensor, *, axis: int | None = 0, bits: int = 8) -> tuple[Tensor, Tensor]:
    r"""Integers and scales of a weight, one scale per slice along `axis`.

    .. math::
        s = \max |w| / (2^{bits - 1} - 1), \qquad q = \mathrm{round}(w / s)

    Rounding is to even at ties; zero stays zero and no value is clipped. A slice of zeros has scale 1.

    Args:
        weight: floating point, any shape. Half precision is widened to float32 first.
        axis: 0 for one scale per output channel of a linear layer or convolution; None for a single scale.
        bits: 2 to 8.

    Returns:
        int8 `[*weight.shape]`, and scales that broadcast against it: float32, float64 for float64.

    Raises:
        ValueError: `weight` is empty or not floating point, `axis` is not one of its dimensions, or `bits` is out of
            range.
    """
    if not weight.is_floating_point() or not weight.numel():
        raise ValueError(f"weight is {weight.dtype} {list(weight.shape)}; expected floats, at least one")
    if axis is not None and not -weight.ndim <= axis < weight.ndim:
        raise ValueError(f"axis is {axis}; weight has {weight.ndim} dimensions: give one of them, or None")
    if not 2 <= bits <= 8:
        raise ValueError(f"bits is {bits}; choose 2 to 8")
    wide = weight.detach()
    wide = wide if wide.dtype == torch.float64 else wide.float()
    others = [d for d in range(weight.ndim) if axis is None or d != axis % weight.ndim]
    largest = wide.abs().amax(others, keepdim=True) if others else wide.abs()
    steps = 2 ** (bits - 1) - 1
    scales = torch.where(largest > 0, largest / steps, torch.ones_like(largest))
    # Among subnormal numbers the scale itself is rounded, so that the quotient can pass the largest integer.
    return (wide / scales).round().clamp(-steps, steps).to(torch.int8), scales


def dequantize(values: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight that `quantize` stands for: values times scales, rounded once to `dtype`."""
    return (values.to(scales.dtype) * scales).to(dtype)


class _StraightThrough(torch.autograd.Function):
    """Quantised on the way forward, the identity on the way back."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, axis: int | None, bits: int) -> Tensor:
        return dequantize(*quantize(weight, axis=axis, bits=bits), weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None


def fake_quantize(weight: Tensor, *, axis: int | None = 0, bits: int = 8) -> Tensor:
    """`dequantize(quantize(weight))` with the gradient of the identity, for quantisation-aware training.

    A network trained on what this returns loses nothing when its weights are then stored as integers. The scale takes
    part as a constant.

    Args:
        weight: as in `quantize`.
        axis: as in `quantize`.
        bits: as in `quantize`.

    Returns:
        Shape and dtype of `weight`.

    Raises:
        ValueError: as `quantize`.

    Source: the straight-through estimator of Bengio et al., arXiv 1308.3432.
    """
    quantized: Tensor = _StraightThrough.apply(weight, axis, bits)  # type: ignore[no-untyped-call]
    return quantized
