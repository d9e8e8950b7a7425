"""What every distillation loss over taps has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from hyperfast.surgery.taps import TapKey

Features: TypeAlias = "Mapping[TapKey, Tensor] | Sequence[Tensor]"
Weights: TypeAlias = "Sequence[float] | Mapping[str, float] | Tensor"


def tap_names(features: Features) -> list[str]:
    """Names of the taps as they appear in messages and in `weights`: keys as text, or indices for a sequence."""
    return [str(key) for key in (features if isinstance(features, Mapping) else range(len(features)))]


def feature_maps(features: Features) -> list[Tensor]:
    """The maps alone."""
    return list(features.values() if isinstance(features, Mapping) else features)


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
    students, teachers = feature_maps(student), feature_maps(teacher)
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


class WeightedLoss(nn.Module):
    r"""A sum of losses :math:`\beta \sum_l \lambda_l L_l`: the weights, and what is kept of the last forward.

    Args:
        weights: :math:`\lambda_l`, one number per tap: a sequence in call order, a mapping from tap name (`"layer1"`,
            `"relu#1:input"`: path, `#call` after the first, side where it is the input) that names every tap, or a
            tensor `[L]` on the device, which a schedule may overwrite in place without a recompilation or a new
            CUDA graph. Default 1 / L, unless the loss says otherwise. May be assigned at any time.
        beta: :math:`\beta`, the weight of the whole loss, so that `loss(...)` is what is added to the total.

    Attributes:
        last: the unweighted losses `[L]` of the last forward, detached and still on the device: reading them to a log
            is what waits, and is left to the caller.
        last_names: the taps they belong to, or whatever else there is one loss for (`loss_names`).
        last_weights: :math:`\beta \lambda_l` `[L]` of the last forward, on the device.
        warned: names of the taps of which it was said that they contribute nothing; each is named once.
    """

    def __init__(self, weights: Weights | None = None, beta: float = 1.0) -> None:
        super().__init__()
        self.weights, self.beta = weights, beta
        self.last: Tensor | None = None
        self.last_names: list[str] = []
        self.last_weights: Tensor | None = None
        self.warned: set[str] = set()
        self._resolved: tuple[object, Tensor] | None = None

    def default_weights(self, count: int) -> list[float]:
        """The weights of `count` taps where none were given: a mean."""
        return [1 / count] * count

    def loss_names(self, taps: list[str]) -> list[str]:
        """What there is one loss for, by the names that `weights` knows: the taps, unless the loss says otherwise."""
        return taps

    def _weighted(self, taps: list[str], like: Tensor, per_tap: Callable[[Tensor], Tensor]) -> Tensor:
        """The weighted sum of the losses that `per_tap` gives for the weights it is called with."""
        names = self.loss_names(taps)
        weights = self._resolve(names, like)
        losses = per_tap(weights)
        self._keep(names, losses, weights)
        return (losses * weights).sum()

    def _keep(self, names: list[str], losses: Tensor, weights: Tensor) -> None:
        """Of this forward, for the log."""
        self.last, self.last_names, self.last_weights = losses.detach(), names, weights.detach()

    def _resolve(self, names: list[str], like: Tensor) -> Tensor:
        """beta lambda_l `[L]` on the device of the maps."""
        weights, count = self.weights, len(names)
        if isinstance(weights, Tensor):
            if weights.shape != (count,):
                raise ValueError(f"weights is {list(weights.shape)}; expected [{count}], one per tap")
            return weights if self.beta == 1 else weights * self.beta
        if weights is None:
            values = self.default_weights(count)
        else:
            values = _values(names, weights) if isinstance(weights, Mapping) else list(weights)
        if len(values) != count:
            raise ValueError(f"{len(values)} weights for {count} taps: {', '.join(names)}")
        # A copy to the device each step would wait for it, and could not be captured in a CUDA graph.
        dtype = torch.promote_types(like.dtype, torch.float32)
        wanted = ([self.beta * value for value in values], like.device, dtype)
        if self._resolved is None or self._resolved[0] != wanted:
            self._resolved = wanted, torch.tensor(wanted[0], device=like.device, dtype=dtype)
        return self._resolved[1]


class FeatureLoss(WeightedLoss, ABC):
    r"""A distillation loss over taps: :math:`\beta \sum_l \lambda_l L_l`, called as `loss(taps.student, taps.teacher)`.

    A subclass gives the unweighted losses of all taps at once (`per_tap`), so that they can be one launch. Weights and
    attributes are those of `WeightedLoss`.
    """

    @abstractmethod
    def per_tap(self, student: Sequence[Tensor], teacher: Sequence[Tensor], expected_grad: Tensor) -> Tensor:
        """Unweighted losses `[L]`, at least float32. The pairs have equal batch sizes and devices.

        `expected_grad` `[L]` is what the gradient of the result will be if the total is the weighted sum plus other
        terms: a loss may compute its gradients ahead for it, but must be right for any other.
        """

    def forward(self, student: Features, teacher: Features) -> Tensor:
        """The weighted sum, a scalar; gradients flow to the student's maps only.

        Raises:
            ValueError: unequal numbers of taps, batch sizes or devices; weights that do not fit the taps.
        """
        names, students, teachers = pair_taps(student, teacher)
        return self._weighted(names, students[0], lambda weights: self.per_tap(students, teachers, weights))


class BranchLoss(WeightedLoss, ABC):
    """A loss of branches behind the student's taps, which learn to answer as the networks do.

    Called as `loss(taps.student, taps.teacher, student_logits, teacher_logits, labels)`. The student's and the
    teacher's taps need not be equal in number. The branches are parameters of the loss: they belong into the optimizer
    with the student's, and are of no use afterwards.
    """

    @classmethod
    @abstractmethod
    def for_maps(cls, student: Features, teacher: Features, classes: int, **options: Any) -> BranchLoss:
        """The loss for networks whose maps have the shapes of these, `[B, ...]`, with options of its own."""

    @abstractmethod
    def forward(
        self, student: Features, teacher: Features, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor
    ) -> Tensor:
        """The weighted sum, a scalar; gradients flow to the student's maps and logits, and to the branches.

        Args:
            student: maps of the student, by tap.
            teacher: what the loss reads of the teacher's.
            student_logits: `[B, C]`.
            teacher_logits: `[B, C]`.
            labels: int64 `[B]`.
        """

    def diagnostics(self) -> dict[str, Tensor]:
        """What else is worth a log of the last forward, by name: scalars, detached and still on the device."""
        return {}


class CompressedTeacherLoss(FeatureLoss):
    """A `FeatureLoss` that needs little of the teacher's maps, and takes that instead: `loss(maps, statistics=s)`.

    Where the images of a batch come again unchanged, the teacher runs once: `s = loss.compress(teacher_maps)`.

    Attributes:
        per_sample: whether each sample's part of the statistics is that of the sample alone, so that they can be stored
            and put together to other batches; else they are those of the batch as a whole. Of a loss with `per_sample`,
            `compress` returns a list of tensors whose first axis is the batch.
    """

    per_sample = False

    @abstractmethod
    def compress(self, teacher: Features) -> Any:
        """What the loss needs of the teacher's maps, on their device and without a graph."""

    @abstractmethod
    def per_tap_of_statistics(self, student: Sequence[Tensor], statistics: Any, expected_grad: Tensor) -> Tensor:
        """As `per_tap`, with what `compress` made of the teacher's maps."""

    def forward(self, student: Features, teacher: Features | None = None, *, statistics: Any = None) -> Tensor:
        """The weighted sum, a scalar; gradients flow to the student's maps only.

        Args:
            student: its maps.
            teacher: its maps, or None with `statistics`.
            statistics: what `compress` made of the teacher's maps of the same images.

        Raises:
            ValueError: unequal numbers of taps, batch sizes or devices; weights that do not fit; both or neither of
                teacher and statistics.
        """
        if (teacher is None) == (statistics is None):
            given = "neither" if teacher is None else "both"
            raise ValueError(
                f"teacher and statistics: {given} given; give the teacher's maps, or what compress() made of them"
            )
        if teacher is not None:
            return super().forward(student, teacher)
        names, students, _ = pair_taps(student, student)
        return self._weighted(
            names, students[0], lambda weights: self.per_tap_of_statistics(students, statistics, weights)
        )


def _values(names: Sequence[str], weights: Mapping[str, float]) -> list[float]:
    unknown = [name for name in weights if name not in names]
    missing = [name for name in names if name not in weights]
    if unknown or missing:
        problem = f"weights for taps that do not exist: {unknown}" if unknown else f"taps without a weight: {missing}"
        raise ValueError(f"{problem}. Taps: {', '.join(names)}")
    return [weights[name] for name in names]
