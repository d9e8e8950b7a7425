"""What the functions over taps have in common: checks of the maps, and whether gradients can be computed ahead."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hyperfast.functional._checks import check_choice, check_same_device
from hyperfast.functional._maps import gradient_can_be_ahead
from hyperfast.reference.reduction import REDUCTIONS, accumulator


def check_counts(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    """Raise a ValueError unless there are maps, and as many of one network as of the other."""
    if len(student) != len(teacher):
        raise ValueError(f"{len(student)} student maps but {len(teacher)} teacher maps; they are compared in pairs")
    if not student:
        raise ValueError("no feature maps were given; tap at least one")


def check_map(name: str, features: Tensor, axes: int, expected: str) -> None:
    """Raise a ValueError unless `features` are floats of at least so many axes."""
    if features.ndim < axes or not features.is_floating_point():
        raise ValueError(f"{name} is {features.dtype} {list(features.shape)}; expected floats {expected}")


def check_batches(index: int, student: Tensor, teacher: Tensor) -> None:
    """Raise a ValueError unless two maps have one device and one batch size."""
    check_same_device(**{f"student map {index}": student, f"teacher map {index}": teacher})
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"tap {index}: student batch {student.shape[0]}, teacher batch {teacher.shape[0]}; "
            "run both networks on the same images"
        )


def check_pairs(
    student: Sequence[Tensor], teacher: Sequence[Tensor], axes: int = 2, expected: str = "[B, ...]"
) -> list[Tensor]:
    """The teacher's maps without their graph; a ValueError unless all pairs agree in shape and device."""
    check_counts(student, teacher)
    for index, (s, t) in enumerate(zip(student, teacher, strict=True)):
        check_map(f"student map {index}", s, axes, expected)
        check_map(f"teacher map {index}", t, axes, expected)
        check_batches(index, s, t)
        if s.shape != t.shape:
            raise ValueError(
                f"tap {index}: student map {list(s.shape)}, teacher map {list(t.shape)}; the loss compares element by "
                "element: bring the student's to the teacher's shape, for instance with a convolution"
            )
    return [t.detach() for t in teacher]


def check_reduction(reduction: str) -> None:
    """Raise a ValueError unless there is such a reduction."""
    check_choice("reduction", reduction, REDUCTIONS)


def widened(maps: Sequence[Tensor], student: Sequence[Tensor]) -> list[Tensor]:
    """`maps` in the dtype that sums over `student` are taken in."""
    dtype = accumulator(student)
    return [features.to(dtype) for features in maps]


def expectation(expected_grad: Tensor | None, student: Sequence[Tensor]) -> Tensor | None:
    """`expected_grad` for the operation, or None where the gradients cannot be computed ahead.

    Raises:
        ValueError: another length than that of `student`.
    """
    if expected_grad is None:
        return None
    if expected_grad.shape != (len(student),):
        raise ValueError(f"expected_grad is {list(expected_grad.shape)}; expected [{len(student)}], one per tap")
    # A copy: whoever changes the weights before the backward pass shall get what they were.
    ahead = gradient_can_be_ahead(student)
    return expected_grad.detach().to("cpu", accumulator(student), copy=True) if ahead else None
