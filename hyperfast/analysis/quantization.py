"""A network with its weights rounded to integers: what it becomes and how many bytes that takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from hyperfast.analysis.weights import Weights, Workpiece, matrices
from hyperfast.functional import dequantize, quantize

_SCALE_BYTES = 4


def quantized_weights(
    weights: Weights, names: Sequence[str] | None = None, *, axis: int | None = 0, bits: int = 8
) -> dict[str, Tensor]:
    """The weights that symmetric integers leave: quantised and back, in the dtypes they have.

    Args:
        weights: of a network or a predictor of weights.
        names: default those of two or more dimensions; biases and norms stay as they are.
        axis: 0 for a scale per output channel; None for one per tensor.
        bits: 2 to 8.

    Raises:
        ValueError: a weight that is not finite, or as `hyperfast.functional.quantize`.
    """
    result = {}
    for name, weight in matrices(weights, names).items():
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{name} has values that are not finite and cannot be quantised")
        result[name] = dequantize(*quantize(weight, axis=axis, bits=bits), weight.dtype)
    return result


def size_in_bytes(
    weights: Weights, names: Sequence[str] | None = None, *, axis: int | None = 0, bits: int | None = None
) -> int:
    """Bytes of all parameters and buffers, as they are or with some of them as integers.

    Args:
        weights: a module or a state dict. What two names share is counted once.
        names: those stored as integers; default those of two or more dimensions.
        axis: as in `quantized_weights`: every slice along it has a scale of four bytes.
        bits: None for the size as it is; else the width of an integer, packed without gaps.

    Raises:
        ValueError: as `quantized_weights`.
    """
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    quantized = set() if bits is None else set(matrices(weights, names))
    total, seen = 0, set()
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if place in seen:
            continue
        if tensor.numel():
            seen.add(place)
        if bits is not None and name in quantized:
            scales = 1 if axis is None else tensor.shape[axis]
            total += -(-tensor.numel() * bits // 8) + _SCALE_BYTES * scales
        else:
            total += tensor.numel() * tensor.element_size()
    return total


def quantized_accuracy(
    module: nn.Module,
    evaluate: Callable[[nn.Module], float],
    names: Sequence[str] | None = None,
    *,
    axis: int | None = 0,
    bits: int = 8,
) -> float:
    """What `evaluate` finds for a copy of the module with `quantized_weights`; activations stay floats.

    Raises:
        ValueError: as `quantized_weights`.
    """
    return evaluate(Workpiece(module).put(quantized_weights(module, names, axis=axis, bits=bits)))
