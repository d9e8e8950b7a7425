"""What the functions over feature maps have in common: pooling to a common size, gradients computed ahead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperfast.backends import Backend, current_backend

POOLS = {
    "avg": (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
    "max": (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d),
}


def pooled(features: Tensor, size: Sequence[int], pool: str = "avg") -> Tensor:
    """`features` `[B, C, *spatial]`, with one to three spatial axes, pooled to `size` where that is another."""
    if list(features.shape[2:]) == list(size):
        return features
    function: Any = POOLS[pool][len(size) - 1]
    found: Tensor = function(features, list(size))
    return found


def gradient_can_be_ahead(student: Sequence[Tensor]) -> bool:
    """Whether the backward pass may compare numbers: on the CPU, and not while a graph is traced."""
    return (
        torch.is_grad_enabled()
        and current_backend() in (Backend.AUTO, Backend.CPU)
        and not torch.compiler.is_compiling()
        and any(s.requires_grad for s in student)
        and all(s.device.type == "cpu" and type(s) in (Tensor, torch.nn.Parameter) for s in student)
    )


def check_maps(student: Sequence[Tensor], teacher: Sequence[Tensor], axes: int, shape: str) -> None:
    """Raise a ValueError unless these are floats with at least `axes` axes, of one batch size, on one device.

    Args:
        shape: the expected shape, for the message.
    """
    if not student:
        raise ValueError("no feature maps were given; tap at least one")
    batch, device = student[0].shape[:1], student[0].device
    for name, maps in (("student", student), ("teacher", teacher)):
        for index, features in enumerate(maps):
            if features.ndim < axes or not features.is_floating_point():
                raise ValueError(
                    f"{name} map {index} is {features.dtype} {list(features.shape)}; expected floats {shape}"
                )
            if features.shape[:1] != batch:
                raise ValueError(
                    f"{name} map {index} has a batch of {features.shape[0]}, student map 0 one of {batch[0]}; "
                    "run both networks on the same images"
                )
            if features.device != device:
                raise ValueError(
                    f"{name} map {index} is on {features.device}, student map 0 on {device}; move one with .to(device)"
                )


def choose_teacher(
    student: Sequence[Tensor], teacher: Sequence[Tensor] | None, statistics: object | None, source: str
) -> list[Tensor]:
    """The teacher's maps without their graph, or none where its statistics stand for them.

    Args:
        source: the function that gives statistics, for the message.
    """
    if (teacher is None) == (statistics is None):
        given = "neither" if teacher is None else "both"
        raise ValueError(
            f"teacher and statistics: {given} given; give the teacher's maps, or what {source}() makes of them"
        )
    if teacher is None:
        return []
    if len(student) != len(teacher):
        raise ValueError(f"{len(student)} student maps but {len(teacher)} teacher maps; they are compared in pairs")
    return [t.detach() for t in teacher]


def check_gram_statistics(student: Sequence[Tensor], statistics: Tensor | None, source: str) -> Tensor | None:
    """`statistics` without their graph; a ValueError unless they are `[L, B, B]` on the device of the student."""
    if statistics is None:
        return None
    shape = (len(student), len(student[0]), len(student[0]))
    if statistics.shape != shape or not statistics.is_floating_point() or statistics.device != student[0].device:
        raise ValueError(
            f"statistics is {statistics.dtype} {list(statistics.shape)} on {statistics.device}; expected floats "
            f"{list(shape)} on {student[0].device}, as {source}() makes them of the teacher's maps of the same images"
        )
    return statistics.detach()
