"""Losses over one pair of maps in eager operations, in the forms that the projects use."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def boundary_of_two_branches(student: Tensor, teacher: Tensor) -> Tensor:
    """Activation boundary with margin 1 as in the official code: a mask for either side, of which one is set."""
    above = (student + 1).square() * ((student > -1) & (teacher <= 0)).to(student.dtype)
    below = (student - 1).square() * ((student <= 1) & (teacher > 0)).to(student.dtype)
    return (above + below).mean()


def boundary_of_one_hinge(student: Tensor, teacher: Tensor) -> Tensor:
    """The same in the fewest operations."""
    return (1 - torch.where(teacher > 0, student, -student)).relu().square().mean()


def factor_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean absolute difference of samples of unit norm."""
    return (F.normalize(student.flatten(1)) - F.normalize(teacher.flatten(1))).abs().mean()
