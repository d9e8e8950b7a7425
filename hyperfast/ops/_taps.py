"""What the operations over taps have in common: layouts, launches of so many taps, gradients ahead of time.

A loss that is told which gradient to expect writes those of the maps in the forward pass, while a map is in the cache.
They are right only for that upstream gradient; any other makes the backward pass compute them anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hyperfast.ops import _native

# Larger gradients are written past the caches: when the backward pass comes to them, other layers' have replaced them.
_CACHE_BYTES = 1 << 22


def is_channels_last(features: Tensor) -> bool:
    """Whether a dense map has its channels innermost; a map that is also contiguous counts as contiguous."""
    return not features.is_contiguous() and features.movedim(1, -1).is_contiguous()


def dense(features: Tensor) -> Tensor:
    """`features` where it is contiguous or channels-last, else a contiguous copy."""
    return features if features.is_contiguous() or is_channels_last(features) else features.contiguous()


def strided_as(gradient: Tensor, features: Tensor) -> Tensor:
    """`gradient` with the strides that `torch.empty_like(features)` has, which the fake kernel promised."""
    if gradient.stride() == features.stride():  # a dense map; without the detour, which takes longer than it looks
        return gradient
    promised = torch.empty_like(features, device="meta").stride()
    return gradient if gradient.stride() == promised else torch.empty_like(features).copy_(gradient)


def past_caches(maps: Sequence[Tensor]) -> bool:
    """Whether gradients as large as `maps` would only push out of the caches what is still needed."""
    return sum(s.numel() * s.element_size() for s in maps) > _CACHE_BYTES


def batches(taps: int) -> list[slice]:
    """Runs of taps that one launch takes."""
    most = _native.module().max_taps
    return [slice(first, min(first + most, taps)) for first in range(0, taps, most)]


def _limits(maps: Sequence[Tensor]) -> str | None:
    if len({features.dtype for features in maps}) > 1:
        return "the maps are of different dtypes"
    if any(features.numel() == 0 for features in maps):
        return "a map is empty"
    return None


def cpu_supports(maps: Sequence[Tensor]) -> str | None:
    """Why the C++ kernels cannot take `maps`, or None."""
    return _native.missing() or _native.wrong_device(maps[0], "cpu") or _limits(maps)


def cuda_supports(maps: Sequence[Tensor]) -> str | None:
    """Why the CUDA kernels cannot take `maps`, or None."""
    reason = _native.wrong_device(maps[0], "cuda") or _native.missing_cuda() or _limits(maps)
    if reason is None and maps[0].dtype == torch.float64:
        reason = "the maps are torch.float64; the CUDA kernels sum in float32"
    return reason


def no_expectation(expected_grad: Tensor | None) -> str | None:
    """Why a kernel for the GPU cannot compute the gradients ahead, or None where it need not."""
    # Comparing with the upstream gradient would wait for the GPU.
    return None if expected_grad is None else "expected_grad is for the CPU"


def save(ctx: Any, needed: Sequence[Tensor], expected_grad: Tensor | None, gradients: Sequence[Tensor]) -> None:
    """Keep what the backward pass needs, and the gradients that were computed ahead for `expected_grad`."""
    ctx.needed = len(needed)
    ctx.save_for_backward(*needed, *([] if expected_grad is None else [expected_grad, *gradients]))
    ctx.set_materialize_grads(False)  # no zeros as large as the maps for outputs that have no gradient


def saved(ctx: Any, grad: Tensor) -> tuple[list[Tensor], list[Tensor] | None]:
    """What the backward pass needs, and the gradients where `grad` is the one that was expected."""
    needed, ahead = list(ctx.saved_tensors[: ctx.needed]), list(ctx.saved_tensors[ctx.needed :])
    as_expected = (
        ahead
        and type(grad) is Tensor  # while a graph is traced it has no numbers
        and not torch.is_grad_enabled()  # a gradient that is differentiated again needs its graph
        and torch.equal(grad, ahead[0])
    )
    return needed, ahead[1:] if as_expected else None


def no_double_backward(name: str) -> Any:
    """The backward of the operation `name`'s backward: an error that says what to do instead."""

    def refuse(_ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"{name} has no fused second derivative; compute it inside hyperfast.use_backend('reference')"
        )

    return refuse
