"""Distillation: a student learns from labels, from a teacher's feature maps and from its logits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hyperfast import losses, surgery
from hyperfast.data import Splits
from hyperfast.losses.base import tap_names
from hyperfast.recipes.checkpoint import JSON
from hyperfast.recipes.config import TrainConfig
from hyperfast.recipes.objective import StepLosses
from hyperfast.recipes.result import TrainResult
from hyperfast.recipes.schedules import TapWeights
from hyperfast.recipes.trainer import to_device
from hyperfast.recipes.training import RunOptions, fit
from hyperfast.surgery.taps import At

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class Method:
    """A feature loss by name: how to make one, and the weight it is used with.

    Attributes:
        build: called with the options of a `LossTerm`.
        beta: default weight, for tap weights that sum to 1 and the loss's own default reduction.
    """

    build: Callable[..., losses.FeatureLoss]
    beta: float


METHODS: Mapping[str, Method] = {
    "at": Method(losses.AttentionTransfer, 1000.0),
    "fsp": Method(losses.FlowOfSolution, 50.0),
    "rkd": Method(losses.RelationalDistillation, 1.0),
    "sp": Method(losses.SimilarityPreserving, 3000.0),
    "ab": Method(losses.ActivationBoundary, 10.0),
    "cwd": Method(losses.ChannelWiseDistillation, 3.0),
    "fitnets": Method(partial(losses.FitNets, normalize="teacher"), 1.0),
    "ft": Method(losses.FactorTransfer, 200.0),
}


@dataclass(frozen=True)
class LossTerm:
    """One feature loss of a distillation.

    Attributes:
        beta: its weight; None: the default of the method (`METHODS`).
        options: keyword arguments of the loss, for instance `{"p": 1}`.
    """

    beta: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DistillConfig:
    r"""What the student is distilled with:

    .. math::
        \lambda_0 \, \mathrm{CE} + \sum_m \beta_m \sum_l \lambda_l(t) \, L_{m,l} + w \, \mathrm{KD}

    Attributes:
        losses: feature losses by name, one of `METHODS` each.
        cross_entropy_weight: :math:`\lambda_0`; 0 leaves the labels out.
        kd_weight: w, of the logit distillation; 0 leaves it out.
        temperature: of the logit distillation.
        at: where the student is tapped, as in `hyperfast.taps`: `"stages"`, `"activations"`, globs or a predicate.
        teacher_at: the same for a teacher with other module names; None: as `at`.
        clone_taps: copy the feature maps; needed where a model overwrites them in place.
        tap_weights: :math:`\lambda_l(t)`, the share of each tap.
    """

    losses: Mapping[str, LossTerm] = field(default_factory=lambda: {"at": LossTerm()})
    cross_entropy_weight: float = 1.0
    kd_weight: float = 0.0
    temperature: float = 4.0
    at: At = "stages"
    teacher_at: At | None = None
    clone_taps: bool = False
    tap_weights: TapWeights = TapWeights()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        for name in self.losses:
            if name not in METHODS:
                raise ValueError(f"there is no feature loss {name!r}; choose from {', '.join(map(repr, METHODS))}")
            if self.tap_weights.schedule != "uniform" and "weights" in self.losses[name].options:
                raise ValueError(
                    f"loss {name!r} has weights among its options, and tap_weights has the schedule "
                    f"{self.tap_weights.schedule!r}; give one of them"
                )
        for name in ("cross_entropy_weight", "kd_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if not self.losses and not self.cross_entropy_weight and not self.kd_weight:
            raise ValueError("nothing to minimise: no losses, and cross_entropy_weight and kd_weight are 0")


class Distillation:
    """The objective of `distill`.

    Args:
        teacher: on the device of the run; a frozen copy of it is used (`surgery.freeze`).
        config: the terms and their weights.
        label_smoothing: of the cross-entropy.
    """

    def __init__(self, teacher: nn.Module, config: DistillConfig, label_smoothing: float = 0.0) -> None:
        self.teacher, self.config = _frozen(teacher, config), config
        betas = {name: METHODS[name].beta if term.beta is None else term.beta for name, term in config.losses.items()}
        self.modules = nn.ModuleDict(
            {name: METHODS[name].build(**term.options, beta=betas[name]) for name, term in config.losses.items()}
        )
        self.logits = losses.CrossEntropyDistillation(
            config.cross_entropy_weight, config.kd_weight, config.temperature, label_smoothing=label_smoothing
        )
        self.settings: Mapping[str, JSON] = {"distillation": {**_plain(asdict(config)), "betas": betas}}
        self._taps: surgery.Taps | None = None

    @contextlib.contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        """Open the taps."""
        config = self.config
        if not config.losses:
            yield
            return
        taps = surgery.taps(model, self.teacher, at=config.at, teacher_at=config.teacher_at, clone=config.clone_taps)
        try:
            with taps as self._taps:
                yield
        finally:
            self._taps = None

    def __call__(
        self, forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, progress: float
    ) -> StepLosses:
        """The weighted sum; `terms` holds every term without its weight."""
        logits = forward(images)
        with torch.no_grad():
            teacher_logits = self.teacher(images)
        total = self.logits(logits, labels, teacher_logits if self.config.kd_weight else None)
        assert self.logits.last is not None
        cross_entropy, kd = self.logits.last
        terms = {"cross_entropy": cross_entropy}
        for name, loss in self._feature_losses():
            total = total + self._feature_loss(loss, progress)
            assert loss.last is not None
            terms[name] = loss.last
        if self.config.kd_weight:
            terms["kd"] = kd
        return StepLosses(total, logits, terms)

    def tap_names(self, term: str) -> list[str] | None:
        """The taps of a feature loss."""
        return dict(self._feature_losses())[term].last_names if term in self.modules else None

    def _feature_losses(self) -> Iterator[tuple[str, losses.FeatureLoss]]:
        for name, loss in self.modules.items():
            assert isinstance(loss, losses.FeatureLoss)
            yield name, loss

    def _feature_loss(self, loss: losses.FeatureLoss, progress: float) -> Tensor:
        if self._taps is None:
            raise RuntimeError("the objective must be called inside its watch() block: the taps are not open")
        student, teacher = self._taps.student, self._taps.teacher
        # Uniform shares are a loss's default; where its options give weights, those stand.
        if self.config.tap_weights.schedule != "uniform":
            device = next(iter(student.values())).device
            count = len(loss.loss_names(tap_names(student)))
            loss.weights = self.config.tap_weights(count, progress, device)
        weighted: Tensor = loss(student, teacher)
        return weighted


def _frozen(teacher: nn.Module, config: DistillConfig) -> nn.Module:
    """A copy that answers fast, with batch norm folded wherever no tap looks."""
    at = config.at if config.teacher_at is None else config.teacher_at
    tapped = {tap.path for tap in surgery.find_taps(teacher, at)} if config.losses else set()
    return surgery.freeze(teacher, keep=tapped)


def distill(
    student: nn.Module,
    teacher: nn.Module,
    data: Splits,
    config: TrainConfig | None = None,
    distillation: DistillConfig | None = None,
    **run: Unpack[RunOptions],
) -> TrainResult:
    """Train a student with the help of a teacher.

    Args:
        student: maps images to logits; any module, also a `Hypernetwork`. Trained in place, moved to `config.device`.
        teacher: a trained network; of another architecture too, as long as the numbers of taps agree. It is moved to
            `config.device` and not changed otherwise: what runs is a frozen copy (`surgery.freeze`).
        data: as in `train`; the images must be normalised as the teacher expects.
        config: settings of the training; default `TrainConfig()`.
        distillation: the losses and their weights; default attention transfer at the stages with weight 1000.
        run: `RunOptions`.

    Returns:
        As `train`. `metrics.jsonl` has every term without its weight, feature losses tap by tap.

    Raises:
        ValueError: as `train`; taps that match nothing or do not pair up; logits of different widths for logit
            distillation.

    Example:
        >>> student = hyperfast.hypernetize(models.create("resnet20"))
        >>> distill(student, teacher, data.load("cifar10", "cifar"), folder="runs/student")
    """
    config = config or TrainConfig()
    to_device(teacher, config)
    objective = Distillation(teacher, distillation or DistillConfig(), config.label_smoothing)
    return fit(student, objective, data, config, **run)


def _plain(value: Any) -> Any:
    """`value` in terms of JSON; what JSON has no word for, such as a predicate, by its name."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)
