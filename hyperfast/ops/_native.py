"""What stands between tensors and the addresses that `hyperfast._C` takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_C: Any = None
_missing: str | None = None
try:
    from hyperfast import _C
except ImportError as error:  # a pure Python install
    _missing = f"the native module was not built ({error})"

# As enum DType in csrc/include/hyperfast/types.h.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

_ELEMENTS_PER_THREAD = 1 << 15  # torch's own grain size
# Smaller blocks are kept by the C library itself. (glibc keeps larger ones too, up to 32 MiB, but only once some of
# that size have been freed.)
_POOLED_BYTES = 1 << 21


def module() -> Any:
    """`hyperfast._C`; call only where `missing()` is None."""
    return _C


def missing() -> str | None:
    """Why there is no native code, or None."""
    return _missing


def missing_cuda() -> str | None:
    """Why there is no native CUDA code, or None."""
    if _C is not None and not _C.with_cuda:
        return "the native module was built without CUDA"
    return missing()


def wrong_device(tensor: Tensor, device: str) -> str | None:
    """Why a kernel for `device` cannot take `tensor`, or None."""
    return None if tensor.device.type == device else f"the tensors are on {tensor.device.type}"


def _poisons_uninitialised() -> bool:
    fill: bool = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    return fill and torch.are_deterministic_algorithms_enabled()


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Like `like.new_empty(shape, dtype=dtype)`, from the pool of host blocks where the tensor is large."""
    dtype = dtype or like.dtype
    count = math.prod(shape)
    if like.device.type != "cpu" or _C is None or count * dtype.itemsize < _POOLED_BYTES:
        return like.new_empty(shape, dtype=dtype)
    tensor = torch.frombuffer(_C.HostBuffer(count * dtype.itemsize), dtype=dtype).view(*shape)
    if _poisons_uninitialised():
        tensor.fill_(math.nan)  # what torch.empty does, so that forgotten elements show in tests
    return tensor


def empty_like(tensor: Tensor) -> Tensor:
    """An uninitialised tensor with the strides of a dense `tensor`, from the pool where it is large."""
    if tensor.is_contiguous():
        return empty(tensor.shape, tensor)
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    dense = empty([tensor.shape[d] for d in order], tensor)
    return dense.permute([order.index(d) for d in range(tensor.ndim)])


def launch(name: str, params: Any, like: Tensor, work: int, *ticket: int) -> None:
    """Call `name` of the native module for the device of `like`: on torch's threads, or on its current stream.

    Args:
        work: elements that the kernel reads; little work is not worth waking a thread.
        ticket: address of the 4 bytes by which the blocks of a CUDA launch count themselves.
    """
    if like.device.type == "cpu":
        threads = min(torch.get_num_threads(), 1 + work // _ELEMENTS_PER_THREAD)
        getattr(_C, f"{name}_cpu")(params, threads)
    else:
        index = like.device.index
        getattr(_C, f"{name}_cuda")(params, *ticket, torch.cuda.current_stream(index).cuda_stream, index)


def processors(tensor: Tensor) -> int:
    """Multiprocessors of the tensor's GPU."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count
