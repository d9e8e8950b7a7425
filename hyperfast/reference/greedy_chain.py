"""Greedy nearest-neighbour chains in plain PyTorch: one step of all chains of a batch at a time."""

from __future__ import annotations

import torch
from torch import Tensor

SIMILARITIES = ("product", "distance")


def greedy_chain(vectors: Tensor, similarity: str) -> Tensor:
    """Start at element 0, then always append the element most similar to the last one; of equals the first.

    Args:
        vectors: `[B, n, D]`, B chains. For the result not to depend on the order of summation, integers whose scalar
            products are exact in float64.
        similarity: `"product"`, a.b, where zero vectors are similar to nothing and come last; or `"distance"`,
            -|a - b|, with D = 1.

    Returns:
        int64 `[B, n]`: the element at each position.
    """
    exact = vectors.double()
    batch, count, _ = exact.shape
    chains = torch.arange(batch, device=exact.device)
    order = torch.empty(batch, count, dtype=torch.int64, device=exact.device)
    if count == 0:
        return order
    comes_last = (exact == 0).all(2) if similarity == "product" else torch.zeros_like(exact[:, :, 0], dtype=torch.bool)
    visited = torch.zeros_like(comes_last)
    current = (~comes_last).int().argmax(1)
    for step in range(count):
        order[:, step] = current
        visited[chains, current] = True
        last = exact[chains, current].unsqueeze(2)
        found = (exact @ last if similarity == "product" else -(exact - last.mT).abs()).squeeze(2)
        # Below every similarity, above what is visited already.
        found = found.masked_fill(comes_last, torch.finfo(found.dtype).min).masked_fill(visited, -torch.inf)
        current = found.argmax(1)
    return order
