"""Heterogeneous complementary distillation (arXiv 2511.10942): sub-logits behind every stage of the student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hyperfast import functional
from hyperfast.functional._checks import check_choice
from hyperfast.functional.sub_logit_distillation import WEIGHTS, check_options
from hyperfast.losses.base import BranchLoss, Features, Weights, feature_maps, tap_names
from hyperfast.losses.plain import as_vectors
from hyperfast.losses.projectors import StageProjector

COMPONENTS = ("gt", "kd", "sdd", "ol")
# What a preset says unless an argument says otherwise.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "parity": {"temperature": 1.0, "detach_target": False, "orthogonality": "fused", "reduction": "sum"},
    "stable": {"temperature": 3.0, "detach_target": True, "orthogonality": "sub", "reduction": "mean"},
}
_STD = 0.02  # of the initial linear weights


class ComplementaryDistillation(BranchLoss):
    r"""Every stage of the student answers together with the teacher's embedding, K times, and the student follows.

    Behind stage i a projector (`StageProjector`) makes a vector :math:`h_i` of the map. With the teacher's embedding e
    a complementary feature mapper makes K sub-logits of it, each of all C classes:

    .. math::
        u_{i1}, \dots, u_{iK} = W_{2,i} \, \mathrm{ReLU}(W_{1,i} [h_i ; e] + b_{1,i}) + b_{2,i}

    They are added to the teacher's logits, learn the labels, teach the student, and are kept apart from each other:
    four components gt, kd, sdd and ol, whose formulas are those of `functional.sub_logit_distillation`:

    .. math::
        L = \beta \, (w_{gt} L_{gt} + w_{kd} L_{kd} + w_{sdd} L_{sdd} + w_{ol} L_{ol})

    :math:`[h_i ; e]` is never put together: the columns of all :math:`W_{1,i}` that belong to e are one product.

    Args:
        shapes: shapes of the student's maps without the batch, by tap, in the order of the network: `(C, H, W)`, or
            tokens `(N, D)`. All stages, also those that get no branch.
        embedding: width of the teacher's.
        classes: C.
        sub_logits: K per stage.
        stages: taps that get a branch; None: all.
        preset: `"parity"`: T = 1, the divergence's gradient also in the sub-logits, orthogonality of the fused
            sub-logits, a sum over stages. `"stable"`: T = 3, the sub-logits as a fixed target, orthogonality of the
            sub-logits themselves, a mean over stages.
        weights: of the components: four numbers, a mapping from all of `"gt"`, `"kd"`, `"sdd"`, `"ol"`, or a tensor
            `[4]`; default 1, 1, 6, 1.
        beta: :math:`\beta`.
        label_smoothing: of both cross-entropies.
        lambda_s: of the sub-logits where they are added to the teacher's logits.
        lambda_t: of the teacher's logits there.
        theta: the cosine up to which sub-logits are left alone.
        soft_labels: labels `[B, C]` of mixed images: `"refuse"`, or `"argmax"`, which takes the likeliest class.
        options: `temperature`, `detach_target`, `orthogonality` and `reduction` of `functional.sub_logit_distillation`,
            in place of the preset's.

    Attributes:
        last: the unweighted components `[4]` of the last forward, with `last_names` and `last_weights` as in
            `WeightedLoss`.
        similarity: mean cosine between the sub-logits of a stage in the last forward, detached and still on the device:
            close to 1 where all K say the same.

    Shape:
        `loss(student_maps, teacher_maps, student_logits, teacher_logits, labels)`: the maps `[B, *shape]` by tap, one
        map of the teacher, its embedding `[B, embedding]` (or one whose mean over the positions that is), both logits
        `[B, C]`, int64 `[B]`. Result: a scalar.

    Raises:
        ValueError: fewer than one sub-logit; no stages, or some that are not among the taps; another preset; numbers
            out of range; maps of other shapes.
        TypeError: an option that there is not.

    Notes:
        The cross-entropy of the student's logits is part of gt: do not add another. `loss.parameters()` must be in the
        optimizer along with the student's: branches that do not learn teach nothing. Afterwards they are of no use.
        Projectors have width max(D_s, D_t), D_s the channels of the student's last stage. Linear weights start from a
        normal distribution of standard deviation 0.02, cut off at two of them, biases from 0. The batch norms of a
        projector need a batch of at least two where the map shrinks to one position.

    Example:
        >>> loss = ComplementaryDistillation.for_maps(taps.student, taps.teacher, classes=100)
        >>> optimizer = SGD([*student.parameters(), *loss.parameters()], lr=0.05)
        >>> loss(taps.student, taps.teacher, logits, teacher_logits, labels).backward()

    Source: Xu et al., arXiv 2511.10942, by way of a third party's port, since neither the paper's body nor the authors'
    code was at hand; the projectors are those of OFA-KD. `"parity"` is what the port has; there, the fused sub-logits
    start nearly parallel, where orthogonality has no slope, and sdd by far outweighs the labels: `"stable"` mends both.
    """

    similarity: Tensor | None

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        embedding: int,
        classes: int,
        sub_logits: int = 4,
        *,
        stages: Sequence[str] | None = None,
        preset: Literal["parity", "stable"] = "parity",
        weights: Weights | None = None,
        beta: float = 1.0,
        label_smoothing: float = 0.1,
        lambda_s: float = 1.0,
        lambda_t: float = 1.0,
        theta: float = 0.5,
        soft_labels: Literal["refuse", "argmax"] = "refuse",
        **options: Any,
    ) -> None:
        super().__init__(weights, beta)
        check_choice("preset", preset, tuple(PRESETS))
        check_choice("soft_labels", soft_labels, ("refuse", "argmax"))
        unknown = [name for name in options if name not in PRESETS[preset]]
        if unknown:
            raise TypeError(f"there is no option {unknown[0]!r}; a preset has {', '.join(map(repr, PRESETS[preset]))}")
        if sub_logits < 1:
            raise ValueError(f"sub_logits is {sub_logits}; expected a positive number of them per stage")
        numbers = {"label_smoothing": label_smoothing, "lambda_s": lambda_s, "lambda_t": lambda_t, "theta": theta}
        self.options: dict[str, Any] = {**PRESETS[preset], **options, **numbers}
        check_options(**{name: value for name, value in self.options.items() if name != "detach_target"})
        self.preset, self.soft_labels, self.sub_logits, self.classes = preset, soft_labels, sub_logits, classes
        self.similarity = None
        names = list(shapes)
        self.stages = _chosen(names, stages)
        # What is left out on purpose is not worth a warning.
        self.warned |= {name for name in names if name not in self.stages}
        width = max(_channels(shapes[names[-1]]), embedding)
        self.projectors = nn.ModuleList(
            StageProjector(shapes[name], len(names) - 1 - names.index(name), width) for name in self.stages
        )
        self.student_half = nn.ModuleList(
            nn.Linear(projector.width, embedding, bias=False) for projector in self._projectors()
        )
        count = len(self.stages)
        self.teacher_half = nn.Linear(embedding, count * embedding)
        self.weight = nn.Parameter(torch.empty(count, embedding, sub_logits * classes))
        self.bias = nn.Parameter(torch.zeros(count, 1, sub_logits * classes))
        halves = [module.weight for module in self.student_half if isinstance(module, nn.Linear)]
        for weight in (*halves, self.teacher_half.weight, self.weight):
            nn.init.trunc_normal_(weight, std=_STD, a=-2 * _STD, b=2 * _STD)
        nn.init.zeros_(self.teacher_half.bias)

    @classmethod
    def for_maps(cls, student: Features, teacher: Features, classes: int, **options: Any) -> ComplementaryDistillation:
        """The loss for networks whose maps have the shapes of these, `[B, ...]`.

        Args:
            student: maps of all its stages.
            teacher: its embedding alone.
            classes: C.
            options: arguments of the loss.

        Raises:
            ValueError: as the loss; another number of maps of the teacher than one.
        """
        shapes = {
            name: features.shape[1:] for name, features in zip(tap_names(student), feature_maps(student), strict=True)
        }
        return cls(shapes, _embedding(teacher).shape[1], classes, **options)

    def loss_names(self, taps: list[str]) -> list[str]:
        """The components."""
        return list(COMPONENTS)

    def default_weights(self, count: int) -> list[float]:
        """Those of the paper's configuration for CIFAR-100."""
        return list(WEIGHTS)

    def forward(
        self, student: Features, teacher: Features, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor
    ) -> Tensor:
        """The weighted sum, a scalar; gradients flow to the student's maps and logits, and to the branches.

        Raises:
            ValueError: a stage without a map; another number of maps of the teacher than one; logits or labels that do
                not fit, or labels that are probabilities, unless `soft_labels` says what to do with them.
        """
        sub_logits = self.answers(student, teacher)
        if labels.is_floating_point() and labels.ndim == 2 and self.soft_labels == "argmax":
            labels = labels.argmax(1)
        weights = self._resolve(list(COMPONENTS), student_logits)
        found = functional.sub_logit_distillation(
            student_logits, teacher_logits, sub_logits, labels, weights, **self.options
        )
        self._keep(list(COMPONENTS), found.components, weights)
        self.similarity = found.similarity.detach()
        return found.total

    def diagnostics(self) -> dict[str, Tensor]:
        """`similarity`."""
        return {} if self.similarity is None else {"similarity": self.similarity}

    def answers(self, student: Features, teacher: Features) -> Tensor:
        """The sub-logits `[B, S, K, C]` of the stages that have a branch.

        Args:
            student: its maps.
            teacher: its embedding.
        """
        maps = dict(zip(tap_names(student), feature_maps(student), strict=True))
        missing = [name for name in self.stages if name not in maps]
        if missing:
            raise ValueError(f"there is no map of stage {missing[0]!r}; given were {', '.join(maps) or 'none'}")
        embedding = _embedding(teacher).to(self.weight.dtype)
        of_teacher = self.teacher_half(embedding).unflatten(1, (len(self.stages), -1))
        hidden = [
            torch.relu(half(projector(maps[name])) + of_teacher[:, index])
            for index, (name, projector, half) in enumerate(
                zip(self.stages, self.projectors, self.student_half, strict=True)
            )
        ]
        of_stages = torch.baddbmm(self.bias, torch.stack(hidden), self.weight)
        answers: Tensor = of_stages.transpose(0, 1).unflatten(2, (self.sub_logits, self.classes))
        return answers

    def extra_repr(self) -> str:
        return f"stages={self.stages}, sub_logits={self.sub_logits}, preset={self.preset!r}"

    def _projectors(self) -> list[StageProjector]:
        return [module for module in self.projectors if isinstance(module, StageProjector)]


def _chosen(names: list[str], stages: Sequence[str] | None) -> list[str]:
    """The taps that get a branch, in the order of the network."""
    if not names:
        raise ValueError("shapes has no stages; the loss needs the map of at least one")
    if stages is None:
        return names
    unknown = [stage for stage in stages if stage not in names]
    if unknown or not stages:
        given = f"{unknown[0]!r} among stages, which there is not" if unknown else "no stages"
        raise ValueError(f"there is to be a branch behind {given}; choose from {', '.join(map(repr, names))}")
    return [name for name in names if name in stages]


def _channels(shape: Sequence[int]) -> int:
    return shape[0] if len(shape) == 3 else shape[-1]


def _embedding(teacher: Features) -> Tensor:
    """`[B, D]`, without a graph."""
    maps = feature_maps(teacher)
    if len(maps) != 1:
        raise ValueError(
            f"{len(maps)} maps of the teacher were given: {', '.join(tap_names(teacher)) or 'none'}; expected one, its "
            'embedding: tap it with teacher_at="embedding"'
        )
    return as_vectors(maps[0].detach())
