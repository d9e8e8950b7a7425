"""Whether one of two models is really better, asked on the same images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class McNemar(NamedTuple):
    """Images that only the first model has right, that only the second has right, and the two-sided p-value."""

    only_first: int
    only_second: int
    p_value: float


def mcnemar(correct_first: Tensor, correct_second: Tensor) -> McNemar:
    r"""The exact test of McNemar for two models on the same images.

    Where the models are equally good, each of the b + c images on which they disagree is a toss of a coin:

    .. math::
        p = \min\Big(1,\; 2 \sum_{i \le \min(b, c)} \binom{b + c}{i} 2^{-(b + c)}\Big)

    The sum is taken over integers, so that p is exact to its last digit whatever the number of images.

    Args:
        correct_first: bool `[N]`, whether the first model has image n right.
        correct_second: the same of the second model, images in the same order.

    Raises:
        ValueError: not bool, or not as many.
    """
    for name, correct in (("correct_first", correct_first), ("correct_second", correct_second)):
        if correct.dtype != torch.bool or correct.ndim != 1:
            raise ValueError(f"{name} is {correct.dtype} {list(correct.shape)}; expected torch.bool [N]")
    if len(correct_first) != len(correct_second):
        raise ValueError(f"there are {len(correct_first)} and {len(correct_second)} answers; ask about the same images")
    first, second = correct_first.cpu(), correct_second.cpu()
    b, c = int((first & ~second).sum()), int((second & ~first).sum())
    tail = term = 1
    for i in range(min(b, c)):
        term = term * (b + c - i) // (i + 1)  # the binomial coefficient of i + 1
        tail += term
    return McNemar(b, c, min(1.0, 2 * tail / 2 ** (b + c)))
