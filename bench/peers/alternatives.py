"""Losses over one pair of maps in eager operations, in the forms that the projects use."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def boundary_of_two_branches(student: Tensor, teacher: Tensor) -> Tensor:
    """Activation boundary with margin 1 as in the official code: a mask for either side, of which one is set."""
    above = (student + 1).square() * ((student > -1) & (teacher <= 0)).to(student.dtype)
    below = (student - 1).square() * ((student <= 1) & (teacher > 0)).to(student.dtype)
    return (above + below).mean()


def boundary_of_one_hinge(student: Tensor, teacher: Tensor) -> Tensor:
    """The same in the fewest operations."""
    sign = (teacher > 0).to(student.dtype) * 2 - 1
    return (1 - sign * student).relu().square().mean()


def factor_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean absolute difference of samples of unit norm."""
    return (F.normalize(student.flatten(1)) - F.normalize(teacher.flatten(1))).abs().mean()


def channel_divergence_of_differences(student: Tensor, teacher: Tensor) -> Tensor:
    """Channel-wise distillation at T = 4, with the products of the divergence written out."""
    s, t = student.flatten(2) / 4, teacher.flatten(2) / 4
    weight = t.softmax(-1)
    total = (weight * t.log_softmax(-1) - weight * s.log_softmax(-1)).sum()
    return total * 16 / (student.shape[0] * student.shape[1])


def channel_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """The same in the fewest operations."""
    s, t = student.flatten(2) / 4, teacher.flatten(2) / 4
    divergence = F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="sum")
    return divergence * 16 / (student.shape[0] * student.shape[1])
