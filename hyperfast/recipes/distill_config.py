"""What a distillation consists of: the methods by name, and the settings of each."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from hyperfast import losses
from hyperfast.losses.connectors import Kind
from hyperfast.recipes.schedules import TapWeights
from hyperfast.surgery.taps import At


@dataclass(frozen=True)
class Method:
    """A loss by name: how to make one, and how it is used unless something else is said.

    Attributes:
        build: called with the options of a `LossTerm`; where the loss has `branches`, its `for_maps`.
        beta: default weight, for tap weights that sum to 1 and the loss's own default reduction.
        at: where the networks are tapped, as in `hyperfast.taps`; None: nowhere, the loss runs the networks itself.
        same: what must be the same in both maps: all of the `"shape"`, the `"channels"`, or None.
        connector: what brings the student's map there where it is another.
        branches: a `losses.BranchLoss`, which also sees logits and labels and is made for the networks' maps.
        teacher_at: where the teacher is tapped; None: as the student.
        labels: the cross-entropy of the student's logits is part of the loss: while it counts, that of the recipe
            does not.
    """

    build: Callable[..., losses.WeightedLoss | losses.JacobianDistillation]
    beta: float
    at: At | None = "stages"
    same: Literal["shape", "channels"] | None = "shape"
    connector: Kind = "conv"
    branches: bool = False
    teacher_at: At | None = None
    labels: bool = False


METHODS: Mapping[str, Method] = {
    "at": Method(losses.AttentionTransfer, 1000.0, same=None),
    "ab": Method(losses.ActivationBoundary, 10.0, at="activations"),
    "cwd": Method(losses.ChannelWiseDistillation, 3.0),
    "fitnets": Method(partial(losses.FitNets, normalize="teacher"), 1.0, connector="regressor"),
    "fsp": Method(losses.FlowOfSolution, 50.0, same="channels"),
    "ft": Method(losses.FactorTransfer, 200.0),
    "hcd": Method(
        losses.ComplementaryDistillation.for_maps, 1.0, same=None, branches=True, teacher_at="embedding", labels=True
    ),
    "hcd_stable": Method(
        partial(losses.ComplementaryDistillation.for_maps, preset="stable"),
        1.0,
        same=None,
        branches=True,
        teacher_at="embedding",
        labels=True,
    ),
    "jacobian": Method(losses.JacobianDistillation, 20.0, at=None, same=None),
    "rkd": Method(losses.RelationalDistillation, 1.0, at="embedding", same=None),
    "sp": Method(losses.SimilarityPreserving, 3000.0, same=None),
    "fmd": Method(losses.FeatureMapDistillation, 1.0, at="activations"),
    "ofa": Method(losses.OneForAll.for_maps, 1.0, same=None, branches=True, teacher_at="embedding"),
    "ickd": Method(losses.InterChannelCorrelation, 2.5, same="channels"),
    "infonce": Method(losses.InfoNCE, 1.0, at="embedding"),
    "icd": Method(losses.ImplicitClustering, 1.0, same=None),
    "sinkd": Method(losses.SinkhornDistillation, 0.0008, at="logits", same=None),
    "wcord": Method(losses.LocalWasserstein, 1.0, at="embedding"),
    "hcl": Method(losses.HierarchicalContext, 1.0),
    "frequency": Method(losses.FrequencyDistillation, 1.0, same="channels"),
}


@dataclass(frozen=True)
class LossTerm:
    """One loss of a distillation.

    Attributes:
        beta: its weight; None: the default of the method (`METHODS`).
        options: keyword arguments of the loss, for instance `{"p": 1}`.
        at: where its feature maps are read, as in `hyperfast.taps`; None: what `DistillConfig.at` says, or else the
            method.
        teacher_at: the same for a teacher with other module names.
        tap_weights: share of each tap; None: those of `DistillConfig`.
        span: the part of the training in which it counts, from and to: (0, 0.3) are the first three tenths. Outside it
            is not computed. The methods that were meant as a first stage are used so, with
            `DistillConfig.labels_from`.
        connector: `"auto"`: a `losses.Connector`, trained with the student, behind each of the student's taps whose map
            does not fit the teacher's; `"always"`: behind every one, as RepDistiller has it for FitNets; `"none"`: maps
            that do not fit are an error.
    """

    beta: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    at: At | None = None
    teacher_at: At | None = None
    tap_weights: TapWeights | None = None
    span: tuple[float, float] = (0.0, 1.0)
    connector: Literal["auto", "always", "none"] = "auto"

    def __post_init__(self) -> None:
        start, end = self.span
        if not 0 <= start < end <= 1:
            raise ValueError(f"span is {self.span}; expected two shares of the training, 0 <= from < to <= 1")
        if self.connector not in ("auto", "always", "none"):
            raise ValueError(f"connector is {self.connector!r}; choose 'auto', 'always' or 'none'")


@dataclass(frozen=True)
class DistillConfig:
    r"""What the student is distilled with:

    .. math::
        \lambda_0 \, \mathrm{CE} + \sum_m \beta_m \sum_l \lambda_{m,l}(t) \, L_{m,l} + w \, \mathrm{KD}

    Attributes:
        losses: losses by name, one of `METHODS` each.
        cross_entropy_weight: :math:`\lambda_0`; 0 leaves the labels out. A loss with labels of its own, such as hcd,
            stands in its place while it counts.
        labels_from: the share of the training from which on the labels count.
        kd_weight: w, of the logit distillation; 0 leaves it out.
        temperature: of the logit distillation.
        at: where the student is tapped, as in `hyperfast.taps`: `"stages"`, `"activations"`, `"embedding"`, `"logits"`,
            globs or a predicate; None: where each method is meant to (`METHODS`).
        teacher_at: the same for a teacher with other module names; None: as `at`.
        clone_taps: copy the feature maps; needed where a model overwrites them in place.
        tap_weights: :math:`\lambda_{m,l}(t)`, the share of each tap, of the losses that do not say their own.
        paraphraser_epochs: ft: passes over the training images, before the training, in which a paraphraser per tap
            learns to reconstruct the teacher's maps; what passes through its middle is then compared with what a
            translator makes of the student's. 0: the maps themselves are compared.
        paraphraser_k: ft: factors per channel of the teacher's maps.
        cache_teacher: run the teacher once over the training images, before the training, and keep what the losses need
            of it: logits, one bit per element for ab, one map per tap for at, products of channels for fsp. For
            training images that are not augmented, and losses that compare sample by sample.
    """

    losses: Mapping[str, LossTerm] = field(default_factory=lambda: {"at": LossTerm()})
    cross_entropy_weight: float = 1.0
    labels_from: float = 0.0
    kd_weight: float = 0.0
    temperature: float = 4.0
    at: At | None = None
    teacher_at: At | None = None
    clone_taps: bool = False
    tap_weights: TapWeights = TapWeights()  # noqa: RUF009 - frozen
    paraphraser_epochs: float = 0.0
    paraphraser_k: float = 0.5
    cache_teacher: bool = False

    def __post_init__(self) -> None:
        for name, term in self.losses.items():
            if name not in METHODS:
                near = difflib.get_close_matches(name, METHODS, n=1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise ValueError(f"there is no loss {name!r}{hint}; choose from {', '.join(map(repr, METHODS))}")
            if "weights" in term.options and self._scheduled(term):
                raise ValueError(
                    f"loss {name!r} has weights among its options, and tap_weights has the schedule "
                    f"{(term.tap_weights or self.tap_weights).schedule!r}; give one of them"
                )
        for name in ("cross_entropy_weight", "kd_weight", "paraphraser_epochs"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if not 0 <= self.labels_from < 1:
            raise ValueError(f"labels_from is {self.labels_from}; expected a share of the training in [0, 1)")
        if self.paraphraser_epochs and "ft" not in self.losses:
            raise ValueError(
                f"paraphraser_epochs is {self.paraphraser_epochs}, but only the loss 'ft' has paraphrasers, and it is "
                "not among the losses"
            )
        if not self.losses and not self.cross_entropy_weight and not self.kd_weight:
            raise ValueError("nothing to minimise: no losses, and cross_entropy_weight and kd_weight are 0")

    def betas(self) -> dict[str, float]:
        """The weight of every loss."""
        return {name: METHODS[name].beta if term.beta is None else term.beta for name, term in self.losses.items()}

    def points(self, name: str) -> tuple[At | None, At | None]:
        """Where a loss taps the student and the teacher."""
        term, method = self.losses[name], METHODS[name]
        teacher_at = term.teacher_at or method.teacher_at
        if term.at is not None or method.at is None:
            return term.at, teacher_at
        return (method.at if self.at is None else self.at), teacher_at or self.teacher_at

    def schedule(self, name: str) -> TapWeights | None:
        """The shares of a loss's taps, where they change; None: those of the loss."""
        term = self.losses[name]
        return (term.tap_weights or self.tap_weights) if self._scheduled(term) else None

    def _scheduled(self, term: LossTerm) -> bool:
        return (term.tap_weights or self.tap_weights).schedule != "uniform"
