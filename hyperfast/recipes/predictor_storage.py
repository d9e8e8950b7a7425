"""How the parameters of a predictor of weights are stored, and training that makes up for the rounding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hyperfast.functional import dequantize, fake_quantize, quantize
from hyperfast.nn import WeightPredictor

StoredWeights: TypeAlias = Literal["fp32", "fp16", "int8"]
STORED_WEIGHTS: tuple[str, ...] = get_args(StoredWeights)

_SCALES = ".scales"


def encode(parameters: Mapping[str, Tensor], weights: StoredWeights) -> dict[str, Tensor]:
    """The parameters as they are stored; `decode` is the way back.

    `"int8"` stores the matrices as integers with one float32 scale per output, called `<name>.scales`, and the biases
    as float32.
    """
    if weights == "fp16":
        return {name: to_half(tensor, name) for name, tensor in parameters.items()}
    if weights == "fp32":
        return {name: tensor.detach().float() for name, tensor in parameters.items()}
    stored = {}
    for name, tensor in parameters.items():
        if tensor.ndim < 2:
            stored[name] = tensor.detach().float()
        else:
            stored[name], stored[name + _SCALES] = quantize(tensor)
    return stored


def decode(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """float32 parameters, the same ones every time."""
    return {
        name: dequantize(tensor, stored[name + _SCALES]) if tensor.dtype == torch.int8 else tensor.float()
        for name, tensor in stored.items()
        if not name.endswith(_SCALES)
    }


def to_half(tensor: Tensor, name: str) -> Tensor:
    """`tensor` as float16.

    Raises:
        ValueError: a finite value is out of its range.
    """
    half = tensor.detach().half()
    if bool((half.isinf() & tensor.isfinite()).any()):
        raise ValueError(
            f"{name} has a value of {float(tensor.abs().max()):.3g}, which float16 (at most 65504) cannot hold; "
            "use weights='fp32' or 'int8'"
        )
    return half


class _Rounded(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return fake_quantize(weight)


@contextlib.contextmanager
def fake_quantized(predictor: WeightPredictor) -> Iterator[WeightPredictor]:
    """Inside, the predictor computes with the matrices that int8 would store, and trains the ones behind them.

    Gradients pass the rounding unchanged. Optimisers made before keep working: the parameters are the same objects.
    Afterwards the predictor has its unrounded matrices again; saved as `"int8"` it then computes exactly what it
    computed inside.

    Args:
        predictor: is changed for the time being; its state dict has other names until the end.

    Example:
        >>> with fake_quantized(predictor):
        ...     for _ in range(steps):
        ...         loss = (predictor.squared_error(targets) / targets.numel()).sqrt()
        ...         optimizer.zero_grad()
        ...         loss.backward()
        ...         optimizer.step()
    """
    layers = [layer for layer in predictor.layers if isinstance(layer, nn.Linear)]
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", _Rounded())
    try:
        yield predictor
    finally:
        for layer in layers:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
            # The weight now stands behind the bias; the state of an optimiser goes by the order of parameters.
            bias = layer.bias
            del layer.bias
            layer.bias = bias
