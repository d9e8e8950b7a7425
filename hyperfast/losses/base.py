"""What every distillation loss over taps has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from hyperfast.surgery.taps import TapKey

Features: TypeAlias = "Mapping[TapKey, Tensor] | Sequence[Tensor]"
Weights: TypeAlias = "Sequence[float] | Mapping[str, float] | Tensor"


def tap_names(features: Features) -> list[str]:
    """Names of the taps as they appear in messages and in `weights`: keys as text, or indices for a sequence."""
    return [str(key) for key in (features if isinstance(features, Mapping) else range(len(features)))]


def pair_taps(student: Features, teacher: Features) -> tuple[list[str], list[Tensor], list[Tensor]]:
    """Student and teacher maps in pairs, by order, with the student's names.

    Raises:
        ValueError: no maps, unequal numbers, batch sizes or devices.
    """
    names, teacher_names = tap_names(student), tap_names(teacher)
    if len(names) != len(teacher_names):
        raise ValueError(
            f"{len(names)} student taps but {len(teacher_names)} teacher taps; they are compared in pairs, in call "
            f"order. Student: {', '.join(names)}. Teacher: {', '.join(teacher_names)}"
        )
    if not names:
        raise ValueError("no taps were given; the loss needs at least one feature map of each network")
    students = list(student.values() if isinstance(student, Mapping) else student)
    teachers = list(teacher.values() if isinstance(teacher, Mapping) else teacher)
    for name, s, t in zip(names, students, teachers, strict=True):
        if s.shape[:1] != t.shape[:1]:
            raise ValueError(
                f"tap {name!r}: student map {list(s.shape)}, teacher map {list(t.shape)}; "
                "the batch sizes differ, run both networks on the same images"
            )
        if s.device != t.device:
            raise ValueError(f"tap {name!r}: student on {s.device}, teacher on {t.device}; move one with .to(device)")
    # One tensor stays one tensor: a loss may count it once.
    return names, students, [t.detach() if t.requires_grad else t for t in teachers]


class FeatureLoss(nn.Module, ABC):
    r"""A distillation loss over taps: :math:`\sum_l \lambda_l L_l`, called as `loss(taps.student, taps.teacher)`.

    A subclass gives the unweighted losses of all taps at once (`per_tap`), so that they can be one launch.

    Args:
        weights: :math:`\lambda_l`, one number per tap: a sequence in call order, a mapping from tap name (`"layer1"`,
            `"relu#1:input"`: path, `#call` after the first, side where it is the input) that names every tap, or a
            tensor `[L]` on the device, which a schedule may overwrite in place without a recompilation or a new
            CUDA graph. Default 1 / L, unless the loss says otherwise. May be assigned at any time.

    Attributes:
        last: the unweighted losses `[L]` of the last forward, detached and still on the device: reading them to a log
            is what waits, and is left to the caller.
        last_names: the taps they belong to.
    """

    def __init__(self, weights: Weights | None = None) -> None:
        super().__init__()
        self.weights = weights
        self.last: Tensor | None = None
        self.last_names: list[str] = []
        self._resolved: tuple[object, Tensor] | None = None

    @abstractmethod
    def per_tap(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Unweighted losses `[L]`, at least float32. The pairs have equal batch sizes and devices."""

    def reduce(self, losses: Tensor) -> Tensor:
        """What becomes of the losses `[L]` where there are no weights: their mean."""
        return losses.mean()

    def forward(self, student: Features, teacher: Features) -> Tensor:
        """The weighted sum, a scalar; gradients flow to the student's maps only.

        Raises:
            ValueError: unequal numbers of taps, batch sizes or devices; weights that do not fit the taps.
        """
        names, students, teachers = pair_taps(student, teacher)
        losses = self.per_tap(students, teachers)
        self.last, self.last_names = losses.detach(), names
        if self.weights is None:
            return self.reduce(losses)
        return (losses * self._weights_for(names, losses, self.weights)).sum()

    def _weights_for(self, names: list[str], losses: Tensor, weights: Weights) -> Tensor:
        if isinstance(weights, Tensor):
            if weights.shape != losses.shape:
                raise ValueError(f"weights is {list(weights.shape)}; expected [{len(names)}], one per tap")
            return weights
        values = _values(names, weights) if isinstance(weights, Mapping) else list(weights)
        if len(values) != len(names):
            raise ValueError(f"{len(values)} weights for {len(names)} taps: {', '.join(names)}")
        # A copy to the device each step would wait for it, and could not be captured in a CUDA graph.
        wanted = (values, losses.device, losses.dtype)
        if self._resolved is None or self._resolved[0] != wanted:
            self._resolved = wanted, torch.tensor(values, device=losses.device, dtype=losses.dtype)
        return self._resolved[1]


def _values(names: Sequence[str], weights: Mapping[str, float]) -> list[float]:
    unknown = [name for name in weights if name not in names]
    missing = [name for name in names if name not in weights]
    if unknown or missing:
        problem = f"weights for taps that do not exist: {unknown}" if unknown else f"taps without a weight: {missing}"
        raise ValueError(f"{problem}. Taps: {', '.join(names)}")
    return [weights[name] for name in names]
