"""What the functions over feature maps have in common: checks, pooling to a common size, gradients computed ahead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperfast.backends import Backend, current_backend
from hyperfast.functional._checks import check_choice, check_same_device
from hyperfast.reference.reduction import REDUCTIONS, accumulator

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


def widened(maps: Sequence[Tensor], student: Sequence[Tensor]) -> list[Tensor]:
    """`maps` in the dtype that sums over `student` are taken in."""
    dtype = accumulator(student)
    return [features.to(dtype) for features in maps]


# Checks


def check_reduction(reduction: str) -> None:
    """Raise a ValueError unless there is such a reduction."""
    check_choice("reduction", reduction, REDUCTIONS)


def check_counts(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    """Raise a ValueError unless there are maps, and as many of one network as of the other."""
    if len(student) != len(teacher):
        raise ValueError(f"{len(student)} student maps but {len(teacher)} teacher maps; they are compared in pairs")
    if not student:
        raise ValueError("no feature maps were given; tap at least one")


def check_map(name: str, features: Tensor, axes: int, expected: str) -> None:
    """Raise a ValueError unless `features` are floats of at least so many axes; `expected` is their shape, in words."""
    if features.ndim < axes or not features.is_floating_point():
        raise ValueError(f"{name} is {features.dtype} {list(features.shape)}; expected floats {expected}")


def check_batches(maps: Mapping[str, Tensor]) -> None:
    """Raise a ValueError unless all maps have the device and the batch size of the first."""
    check_same_device(**maps)
    first, *others = maps
    for name in others:
        if len(maps[name]) != len(maps[first]):
            raise ValueError(
                f"{name} has a batch of {len(maps[name])}, {first} one of {len(maps[first])}; "
                "run both networks on the same images"
            )


def check_pair(index: int, student: Tensor, teacher: Tensor, axes: int, expected: str) -> None:
    """Raise a ValueError unless both are floats of at least so many axes, and agree in device and batch size."""
    pair = {f"student map {index}": student, f"teacher map {index}": teacher}
    for name, features in pair.items():
        check_map(name, features, axes, expected)
    check_batches(pair)


def check_pairs(
    student: Sequence[Tensor], teacher: Sequence[Tensor], axes: int = 2, expected: str = "[B, ...]"
) -> list[Tensor]:
    """The teacher's maps without their graph; a ValueError unless all pairs agree in shape and device."""
    check_counts(student, teacher)
    for index, (s, t) in enumerate(zip(student, teacher, strict=True)):
        check_pair(index, s, t, axes, expected)
        if s.shape != t.shape:
            raise ValueError(
                f"tap {index}: student map {list(s.shape)}, teacher map {list(t.shape)}; the loss compares element by "
                "element: bring the student's to the teacher's shape, for instance with a convolution"
            )
    return [t.detach() for t in teacher]


def check_maps(student: Sequence[Tensor], teacher: Sequence[Tensor], axes: int, expected: str) -> None:
    """Raise a ValueError unless these are floats with at least `axes` axes, all of one batch and on one device."""
    if not student:
        raise ValueError("no feature maps were given; tap at least one")
    for network, maps in (("student", student), ("teacher", teacher)):
        for index, features in enumerate(maps):
            name = f"{network} map {index}"
            check_map(name, features, axes, expected)
            check_batches({"student map 0": student[0], name: features})


# A teacher that is given as its statistics


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
    check_counts(student, teacher)
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


# Gradients computed ahead


def gradient_can_be_ahead(student: Sequence[Tensor]) -> bool:
    """Whether the backward pass may compare numbers: on the CPU, and not while a graph is traced."""
    return (
        torch.is_grad_enabled()
        and current_backend() in (Backend.AUTO, Backend.CPU)
        and not torch.compiler.is_compiling()
        and any(s.requires_grad for s in student)
        and all(s.device.type == "cpu" and type(s) in (Tensor, torch.nn.Parameter) for s in student)
    )


def expectation(
    expected_grad: Tensor | None, student: Sequence[Tensor], losses: int | None = None, each: str = "tap"
) -> Tensor | None:
    """`expected_grad` for the operation, or None where the gradients cannot be computed ahead.

    Args:
        losses: how many there are; default one per map of `student`.
        each: what each of them belongs to, for the message.

    Raises:
        ValueError: another length than `losses`.
    """
    if expected_grad is None:
        return None
    losses = len(student) if losses is None else losses
    if expected_grad.shape != (losses,):
        raise ValueError(f"expected_grad is {list(expected_grad.shape)}; expected [{losses}], one per {each}")
    # A copy: whoever changes the weights before the backward pass shall get what they were.
    ahead = gradient_can_be_ahead(student)
    return expected_grad.detach().to("cpu", accumulator(student), copy=True) if ahead else None
