"""A loss over taps as a part of a distillation: what stands between taps and loss, its weights, its gradients."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hyperfast.losses import BranchLoss, Connector, FeatureLoss, Paraphraser, TokenMap, Translator, WeightedLoss
from hyperfast.recipes.distill_config import Method
from hyperfast.recipes.schedules import TapWeights


class FeatureTerm(nn.Module):
    """A loss over taps with the layers that they need, in training with the student.

    Args:
        name: of the method, for messages.
        loss: what compares: a `FeatureLoss`, or a `BranchLoss`.
        student_side: a module per tap, which makes of the student's map what is compared.
        teacher_side: the same of the teacher's map; frozen.
        schedule: shares of the taps that change in the course of the training; None: the loss's own weights.
    """

    def __init__(
        self,
        name: str,
        loss: WeightedLoss,
        student_side: Sequence[nn.Module],
        teacher_side: Sequence[nn.Module],
        schedule: TapWeights | None = None,
    ) -> None:
        super().__init__()
        self.name, self.loss, self.schedule = name, loss, schedule
        self.student_side, self.teacher_side = nn.ModuleList(student_side), nn.ModuleList(teacher_side)
        self._norms: dict[str, Tensor] = {}

    def forward(
        self,
        student: Mapping[Any, Tensor],
        teacher: Mapping[Any, Tensor] | None,
        progress: float,
        *,
        answers: tuple[Tensor, Tensor | None, Tensor],
        statistics: Any = None,
        measure: bool = False,
    ) -> Tensor:
        """The weighted loss, a scalar.

        Args:
            student: maps by tap.
            teacher: the same; None with `statistics`.
            progress: of the training, from 0 to 1.
            answers: logits of the student and of the teacher, and labels: what a `BranchLoss` compares.
            statistics: what the loss's `compress` made of the teacher's maps.
            measure: keep the norms of the gradients of the next backward pass, for `read_gradient_norms`.
        """
        self._norms = {}
        if measure:
            student = {key: self._watched(str(key), features) for key, features in student.items()}
        student = _through(self.student_side, student)
        if self.schedule is not None:
            device = next(iter(student.values())).device
            count = len(self.loss.loss_names([str(key) for key in student]))
            self.loss.weights = self.schedule(count, progress, device)
        loss: Tensor
        if isinstance(self.loss, BranchLoss):
            loss = self.loss(student, teacher, *answers)
        elif teacher is None:
            loss = self.loss(student, statistics=statistics)
        else:
            loss = self.loss(student, self.factors(teacher))
        return loss

    def factors(self, teacher: Mapping[Any, Tensor]) -> Mapping[Any, Tensor]:
        """What is compared of the teacher's maps."""
        with torch.no_grad():
            return _through(self.teacher_side, teacher)

    def read_gradient_norms(self, scale: float, step: int) -> dict[str, float]:
        """L2 norm of the weighted loss's gradient by each of the student's maps, over the whole batch; waits for it.

        Warns, once per tap, of one that contributes nothing.

        Args:
            scale: of the loss, as a gradient scaler had it.
            step: that was measured.
        """
        norms, self._norms = self._norms, {}
        read = {name: float(norm) / scale for name, norm in norms.items()}
        silent = [name for name, norm in read.items() if norm == 0 and name not in self.loss.warned]
        for name in silent if self._all_count() else ():
            self.loss.warned.add(name)
            warnings.warn(
                f"tap {name!r} contributes nothing to loss {self.name!r}: its gradient is 0 in step {step}. If that is "
                "no accident, leave it out",
                stacklevel=2,
            )
        return read

    def _watched(self, name: str, features: Tensor) -> Tensor:
        self._norms[name] = torch.zeros((), device=features.device)
        if not features.requires_grad:
            return features
        own = features.view_as(features)  # gradients of the other losses by this map do not pass here

        def keep(gradient: Tensor) -> None:
            self._norms[name] = torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32)

        own.register_hook(keep)
        return own

    def _all_count(self) -> bool:
        """Whether no share of a tap is 0 on purpose."""
        weights = self.loss.last_weights
        return weights is not None and bool((weights != 0).all())


def branch_term(
    name: str,
    loss: BranchLoss,
    student: Mapping[Any, Tensor],
    teacher: Mapping[Any, Tensor],
    schedule: TapWeights | None,
) -> FeatureTerm:
    """The term of a loss that has what its taps need.

    Raises:
        ValueError: a schedule of the taps' shares for a loss that has no losses by tap.
    """
    names = [str(key) for key in student]
    parts = loss.loss_names(names)
    if schedule is not None and set(parts).isdisjoint(names):
        raise ValueError(
            f"tap_weights has the schedule {schedule.schedule!r}, but loss {name!r} has no losses by tap, only "
            f"{', '.join(parts)}; give it TapWeights() of its own"
        )
    return FeatureTerm(name, loss, [nn.Identity() for _ in student], [nn.Identity() for _ in teacher], schedule)


def build_term(
    name: str,
    method: Method,
    loss: FeatureLoss,
    student: Mapping[Any, Tensor],
    teacher: Mapping[Any, Tensor],
    connector: str,
    schedule: TapWeights | None,
    paraphraser_k: float | None,
) -> FeatureTerm:
    """The term of a method for networks whose maps have the shapes of `student` and `teacher`.

    Args:
        name: of the method.
        method: what it needs.
        loss: its loss.
        student: maps of some images, by tap.
        teacher: the same.
        connector: as in `LossTerm`.
        schedule: as in `FeatureTerm`.
        paraphraser_k: factors per channel, where maps are compared as factors; else None.

    Raises:
        ValueError: unequal numbers of taps; maps that do not fit where no connector is allowed or known.
    """
    if len(student) != len(teacher):
        raise ValueError(
            f"loss {name!r}: {len(student)} student taps but {len(teacher)} teacher taps; they are compared in pairs, "
            f"in call order. Student: {_names(student)}. Teacher: {_names(teacher)}"
        )
    students: list[nn.Module] = []
    teachers: list[nn.Module] = []
    for (key, s), t in zip(student.items(), teacher.values(), strict=True):
        try:
            if paraphraser_k is None:
                own, other = _sides(method, list(s.shape[1:]), list(t.shape[1:]), connector)
                students.append(own)
                teachers.append(other)
            else:
                paraphraser = Paraphraser(t.shape[1], paraphraser_k).requires_grad_(False)
                students.append(_translator(list(s.shape[1:]), list(t.shape[1:]), paraphraser.factors))
                teachers.append(paraphraser)
        except ValueError as error:
            raise ValueError(f"loss {name!r}, tap {str(key)!r}: {error}") from None
    return FeatureTerm(name, loss, students, teachers, schedule)


def _sides(method: Method, student: list[int], teacher: list[int], wanted: str) -> tuple[nn.Module, nn.Module]:
    """What stands behind the student's and the teacher's tap. Tokens that are to be connected become maps."""
    if method.same is None or (wanted != "always" and student == teacher):
        return nn.Identity(), nn.Identity()
    connector = _connector(method, TokenMap.shape(student), TokenMap.shape(teacher), wanted)
    own = nn.Sequential(TokenMap(), connector) if len(student) == 2 else connector
    return own, TokenMap() if len(teacher) == 2 else nn.Identity()


def _connector(method: Method, student: list[int], teacher: list[int], wanted: str) -> nn.Module:
    target = teacher if method.same == "shape" else [teacher[0], *student[1:]]
    if wanted != "always" and student == target:
        return nn.Identity()
    if wanted == "none":
        raise ValueError(
            f"the student's map is {student}, the teacher's {teacher} (without the batch), and connector is 'none'; "
            "the loss compares maps of one shape. Use connector='auto', or other taps"
        )
    return Connector(student, target, method.connector)


def _translator(student: list[int], teacher: list[int], factors: int) -> nn.Module:
    if len(student) != 3 or student[1:] != teacher[1:]:
        raise ValueError(
            f"the student's map is {student}, the teacher's {teacher} (without the batch); a translator wants maps "
            "(C, H, W) of one height and width. Use other taps"
        )
    return Translator(student[0], factors)


def _through(modules: nn.ModuleList, maps: Mapping[Any, Tensor]) -> Mapping[Any, Tensor]:
    """Each map through the module of its tap; paraphrasers give their factors."""
    if len(modules) != len(maps):
        raise ValueError(f"{len(maps)} taps: {_names(maps)}; there were {len(modules)} when the distillation was made")
    found = {}
    for module, (key, features) in zip(modules, maps.items(), strict=True):
        found[key] = module.encoder(features) if isinstance(module, Paraphraser) else module(features)
    return found


def _names(maps: Mapping[Any, Tensor]) -> str:
    return ", ".join(map(str, maps))
