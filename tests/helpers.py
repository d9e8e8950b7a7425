"""Values, surroundings and assertions that several tests share. They are tested themselves, in test_helpers.py."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

_BLOCK = 32  # elements


def golden(name: str = "feature_kd_and_hyperlight") -> dict[str, Tensor]:
    """Values computed with the peers' own code; see tests/golden/{name}.README.md."""
    with np.load(Path(__file__).parent / "golden" / f"{name}.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """So many threads for torch and for the native operations, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_as_accurate(actual: Tensor, eager: Tensor, reference: Tensor, *, what: str = "result") -> None:
    """`actual` is at most twice as far from the float64 `reference` as `eager`, unfused PyTorch in the same dtype.

    Mean square and largest error are compared. One unit in the last place is always allowed, since `eager` may be
    exact by chance; four for the largest error, which is a draw from the tail of either distribution.
    On top: the cosine with the reference, and no block of it silently zero.
    """
    assert reference.dtype == torch.float64
    assert actual.shape == reference.shape, f"{what}: shape {list(actual.shape)}, expected {list(reference.shape)}"
    assert actual.isfinite().all(), f"{what}: {(~actual.isfinite()).sum()} elements are not finite"
    if not actual.numel():
        return
    exact = reference.flatten().cpu()
    found, unfused = actual.detach().double().flatten().cpu(), eager.detach().double().flatten().cpu()
    unit = torch.finfo(actual.dtype).eps * exact.abs().max()
    for name, order, units in (("largest", torch.inf, 4), ("mean square", 2, 1)):
        scale = exact.numel() ** (1 / order)
        error, allowed = ((x - exact).norm(order) / scale for x in (found, unfused))
        assert error <= 2 * allowed.clamp_min(units * unit), (
            f"{what}: {name} error {error:.3e}, unfused PyTorch {allowed:.3e}, one unit {unit:.3e}"
        )
    assert_same_direction(actual, reference, what=what)
    assert_no_zero_block(actual, reference, what=what)


def assert_same_direction(actual: Tensor, reference: Tensor, *, what: str = "gradient") -> None:
    """The cosine with `reference` is 1 to within rounding: a wrong part shows, however small its elements."""
    found, exact = actual.detach().double().flatten().cpu(), reference.double().flatten().cpu()
    if not exact.any():
        assert not found.any(), f"{what}: expected zeros"
        return
    cosine = torch.nn.functional.cosine_similarity(found, exact, dim=0, eps=0).item()
    least = 1 - max(1e-6, torch.finfo(actual.dtype).eps ** 2)
    assert cosine > least, f"{what}: cosine with the reference is {cosine:.9f}, expected more than {least:.9f}"


def assert_no_zero_block(actual: Tensor, reference: Tensor, *, what: str = "gradient") -> None:
    """No run of elements is all zero where the reference, in that dtype, is not: catches work that was left out."""
    expected = reference.to(actual.dtype).flatten().cpu()
    found = actual.detach().flatten().cpu()
    for start in range(0, expected.numel(), _BLOCK):
        block = slice(start, start + _BLOCK)
        if expected[block].any():
            assert found[block].any(), f"{what}: elements {start} to {start + _BLOCK} are zero and should not be"
