"""Orders in which neighbours are similar."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hyperfast import reference
from hyperfast.backends import Backend, Dispatcher, Implementation
from hyperfast.functional._checks import check_choice
from hyperfast.ops import _native
from hyperfast.reference.greedy_chain import SIMILARITIES

_SINGLE_BITS, _DOUBLE_BITS = 24, 52  # integers up to 2^24 are exact in float32; one bit of float64 is kept in reserve


def greedy_chain(vectors: Sequence[Tensor], *, similarity: str = "product") -> list[Tensor]:
    r"""Greedy nearest-neighbour chains over several sets of vectors, of different sizes, in one launch.

    A chain starts at element 0; the element most similar to the last one follows, of equals the one of lowest index.

    Args:
        vectors: tensors `[n, D]` (one chain) or `[B, n, D]` (B independent chains), floating point. With the cosine
            in mind they are unit vectors, or concatenations of some.
        similarity: `"product"`: :math:`a \cdot b`; a zero vector is similar to nothing, zeros come last in their
            order. `"distance"`: :math:`-|a - b|`, D = 1.

    Returns:
        int64 `[n]` or `[B, n]` for each tensor: the element at each position of the chain.

    Raises:
        ValueError: another shape or dtype; NaN or infinity; `"distance"` with D > 1.

    Notes:
        Takes O(n^2 D) time and O(n D) memory. For `"product"` each set of vectors is rounded to multiples of a power
        of two, about 2^-24 of the largest entry (2^-21 for 512 concatenated unit vectors), so that every scalar
        product is exact in float64: the result depends neither on the number of threads nor on the processor, and is
        the same in C++ and in PyTorch. It is no torch operation: it has no gradient and waits for the device.

    Source: the order that NeRN (github.com/maorash/NeRN) calls maximal similarity.
    """
    check_choice("similarity", similarity, SIMILARITIES)
    sets = [_checked(index, given, similarity) for index, given in enumerate(vectors)]
    orders: list[Tensor] = implementations(sets, similarity) if sets else []
    return [order.to(given.device).view(given.shape[:-1]) for order, given in zip(orders, vectors, strict=True)]


def _checked(index: int, given: Tensor, similarity: str) -> Tensor:
    """`[B, n, D]` float32 on the CPU, rounded."""
    if given.ndim not in (2, 3) or not given.is_floating_point() or given.shape[-1] == 0:
        raise ValueError(f"vectors {index} are {given.dtype} {list(given.shape)}; expected floats [n, D] or [B, n, D]")
    if similarity == "distance" and given.shape[-1] != 1:
        raise ValueError(f"vectors {index} have {given.shape[-1]} dimensions; similarity='distance' compares numbers")
    cpu = given.detach().cpu() if given.ndim == 3 else given.detach().cpu().unsqueeze(0)
    if not cpu.isfinite().all():
        raise ValueError(f"vectors {index} contain NaN or infinity, which are similar to nothing")
    return _rounded(cpu) if similarity == "product" else cpu.float().contiguous()


def _rounded(vectors: Tensor) -> Tensor:
    """Integers in proportion to the vectors, as large as their products stay exact."""
    vectors = vectors.double()
    largest = vectors.abs().amax().item() if vectors.numel() else 0.0
    if largest == 0:
        return vectors.float()
    scaled = vectors / math.ldexp(1.0, math.frexp(largest)[1])  # below 1, and above 0.5 somewhere
    longest = scaled.square().sum(-1).amax().item()
    bits = min(_SINGLE_BITS, (_DOUBLE_BITS - math.ceil(math.log2(longest))) // 2)
    return (scaled * 2.0**bits).round().float()


def _native_supports(sets: Sequence[Tensor], similarity: str) -> str | None:
    return _native.missing()


def _native_chains(sets: Sequence[Tensor], similarity: str) -> list[Tensor]:
    params = _native.module().GreedyChainParams(similarity=SIMILARITIES.index(similarity))
    orders = [torch.empty(s.shape[:2], dtype=torch.int64) for s in sets]
    costs = [s.shape[1] ** 2 * s.shape[2] for s in sets]
    # The longest first, so that no thread is left with it when the others are done.
    for i in sorted(range(len(sets)), key=costs.__getitem__, reverse=True):
        batch, count, dimension = sets[i].shape
        addresses = {"vectors": sets[i].data_ptr(), "order": orders[i].data_ptr()}
        params.add(batch=batch, count=count, dimension=dimension, **addresses)
    work = sum(cost * s.shape[0] for cost, s in zip(costs, sets, strict=True))
    _native.launch("greedy_chain", params, sets[0], work)
    return orders


def _reference_chains(sets: Sequence[Tensor], similarity: str) -> list[Any]:
    return [reference.greedy_chain(s, similarity) for s in sets]


implementations = Dispatcher(
    "greedy_chain",
    [
        Implementation(Backend.CPU, _native_chains, _native_supports),
        Implementation(Backend.REFERENCE, _reference_chains),
    ],
)
