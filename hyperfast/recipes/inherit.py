"""Networks of several ranks and numbers of heads, inherited from one teacher, fine-tuned and compared."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hyperfast.data import DeviceLoader, ImageSet, Splits
from hyperfast.nn import InheritReport, gate_diagnostics, inherit, load_balance_loss, recalibrate_norms
from hyperfast.recipes import checkpoint
from hyperfast.recipes.compare import Training, compare
from hyperfast.recipes.config import TrainConfig
from hyperfast.recipes.distill import Distillation
from hyperfast.recipes.distill_config import DistillConfig
from hyperfast.recipes.evaluation import evaluate
from hyperfast.recipes.inherit_plan import InheritConfig, InheritPlan, TuneConfig, load_plans, save_plans
from hyperfast.recipes.inherit_report import GATES, page
from hyperfast.recipes.layer_cost import layer_costs
from hyperfast.recipes.objective import CrossEntropy, Objective, StepLosses
from hyperfast.recipes.trainer import to_device
from hyperfast.recipes.training import RunOptions, fit

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from hyperfast.recipes.checkpoint import JSON
    from hyperfast.recipes.comparison import ComparedRun, Comparison
    from hyperfast.recipes.result import TrainResult

_TIMED_IMAGES = 64
_DIAGNOSED_BATCHES = 16


class BalancedHeads:
    """An objective, and how unevenly the heads of the inherited layers are used (`nn.load_balance_loss`).

    Args:
        objective: what is minimised besides.
        weight: of the term.
    """

    def __init__(self, objective: Objective, weight: float) -> None:
        self.objective, self.weight = objective, weight
        self.modules = objective.modules
        self.settings: Mapping[str, JSON] = {**objective.settings, "balance": weight}
        self._model: nn.Module | None = None

    def prepare(self, loader: DeviceLoader, *, resumed: bool, progress: bool) -> bool:
        """What the other objective prepares."""
        return self.objective.prepare(loader, resumed=resumed, progress=progress)

    def watch(self, model: nn.Module) -> AbstractContextManager[object]:
        """Remember whose heads to balance."""
        self._model = model
        return self.objective.watch(model)

    def __call__(
        self,
        forward: Callable[[Tensor], Tensor],
        images: Tensor,
        labels: Tensor,
        progress: float,
        *,
        indices: Tensor | None = None,
        measure: bool = False,
    ) -> StepLosses:
        losses = self.objective(forward, images, labels, progress, indices=indices, measure=measure)
        assert self._model is not None
        balance = load_balance_loss(self._model)
        return StepLosses(losses.total + self.weight * balance, losses.logits, {**losses.terms, "balance": balance})

    def gradient_norms(self, scale: float, step: int) -> Mapping[str, Mapping[str, float]]:
        """Those of the other objective."""
        return self.objective.gradient_norms(scale, step)

    def tap_names(self, term: str) -> list[str] | None:
        """Those of the other objective."""
        return self.objective.tap_names(term)


@dataclass(frozen=True)
class FineTuning:
    """How an inherited network is trained; a `compare.Procedure`.

    Attributes:
        config: how it was made.
        tuning: the terms.
        kd: whether the teacher is among them.
        parameters: of the network.
    """

    config: InheritConfig
    tuning: TuneConfig
    kd: bool
    parameters: int

    def describe(self) -> Mapping[str, Any]:
        """Settings and weights."""
        tuning = self.tuning
        weights = {"labels": tuning.cross_entropy_weight, "kd": tuning.kd_weight} if self.kd else {"labels": 1.0}
        weights |= {"balance": tuning.balance}
        return {
            "inherit": checkpoint.as_json(asdict(self.config)),
            "parameters": self.parameters,
            **({"temperature": tuning.temperature, "clip": tuning.kd_clip} if self.kd else {}),
            "weights": {name: weight for name, weight in weights.items() if weight},
        }

    def train(
        self, model: nn.Module, teacher: nn.Module, data: Splits, config: TrainConfig, **run: Unpack[RunOptions]
    ) -> TrainResult:
        """Fine-tune, and note in the folder of the run what gates and heads do at the best weights, which `model` has
        then.
        """
        to_device(model, config)
        to_device(teacher, config)
        if self.kd and config.clip_grad_norm is None:
            config = replace(config, clip_grad_norm=self.tuning.kd_clip)
        result = fit(model, self._objective(model, teacher, data, config), data, config, **run)
        if (folder := run.get("folder")) is not None:
            model.load_state_dict(dict(result.best_weights))
            images = next(part for part in (data.val, data.test, data.train) if len(part))
            batches = islice(_batches(images, config), _DIAGNOSED_BATCHES)
            rows = [asdict(row) for row in gate_diagnostics(model, batches)]
            (Path(folder) / GATES).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        return result

    def _objective(self, model: nn.Module, teacher: nn.Module, data: Splits, config: TrainConfig) -> Objective:
        objective: Objective = CrossEntropy(config.label_smoothing)
        if self.kd:
            terms = DistillConfig(
                losses={},
                cross_entropy_weight=self.tuning.cross_entropy_weight,
                kd_weight=self.tuning.kd_weight,
                temperature=self.tuning.temperature,
            )
            images = next(_batches(data.train.subset(torch.arange(min(2, len(data.train)))), config))
            objective = Distillation(model, teacher, terms, images, config.label_smoothing, config.seed)
        return BalancedHeads(objective, self.tuning.balance) if self.tuning.balance else objective


def inherit_sweep(
    teacher: nn.Module,
    data: Splits,
    candidates: Sequence[InheritConfig],
    config: TrainConfig | None = None,
    tuning: TuneConfig | None = None,
    *,
    folder: str | os.PathLike[str],
    seeds: Sequence[int] = (0,),
    settings: Mapping[str, Any] | None = None,
    retry: bool = False,
    progress: bool = False,
    tensorboard: bool = False,
    on_plan: Callable[[InheritPlan], object] | None = None,
    on_start: Callable[[str, int, nn.Module], object] | None = None,
    on_run: Callable[[ComparedRun], object] | None = None,
) -> Comparison:
    """Make a network of each candidate, fine-tune it with every seed, and write one page about all of them.

    Args:
        teacher: any trained network; moved to `config.device` and not changed otherwise.
        data: as in `train`; the images must be normalised as the teacher expects.
        candidates: ranks, numbers of heads and so on.
        config: settings of the training; default `TrainConfig()`. The paper: batches of 64, SGD with lr 0.05, momentum
            0.9, weight decay 5e-4, 240 epochs, `lr_steps=(0.625, 0.75, 0.875)`.
        tuning: what is minimised; default `TuneConfig()`.
        folder: as in `compare`, and `plans.json`, what became of every layer of each candidate. A sweep that is there
            already is gone on with.
        seeds: of the runs: of gates, deviations, order and augmentation.
        settings: as in `compare`.
        retry: as in `compare`.
        progress: as in `compare`.
        tensorboard: as in `compare`.
        on_plan: called with each candidate once it was decomposed and measured.
        on_start: called with name, seed and the network that a run begins with.
        on_run: as in `compare`.

    Returns:
        The comparison; its methods are called as `InheritConfig.name`.

    Raises:
        ValueError: as `hyperfast.inherit` and `compare`; a candidate twice.

    Notes:
        Whether a run follows the teacher is decided by the energy that its network keeps (`TuneConfig.kd`).

    Example:
        >>> candidates = [InheritConfig(rank=rank, heads=heads) for rank in (8, 16) for heads in (1, 3)]
        >>> inherit_sweep(teacher, data.load("cifar10", "cifar"), candidates, folder="runs/inherit")

    Source: InherNet, arXiv 2602.09509; choices where paper and code differ: `hyperfast.inherit`.
    """
    config, tuning, folder = config or TrainConfig(), tuning or TuneConfig(), Path(folder)
    names = [candidate.name for candidate in candidates]
    if len(set(names)) < len(names):
        raise ValueError(f"a candidate is given twice: {', '.join(names)}")
    to_device(teacher, config)
    plans = load_plans(folder)
    digest = checkpoint.digest(teacher)
    for candidate in candidates:
        known = plans.get(candidate.name)
        if known is None or (known.config, known.teacher) != (candidate, digest):
            known = plans[candidate.name] = make_plan(teacher, candidate, data, config, seed=next(iter(seeds), 0))
        if on_plan is not None:
            on_plan(known)
    by_name = dict(zip(names, candidates, strict=True))
    methods: dict[str, Training] = {
        name: FineTuning(candidate, tuning, _follows(plans[name].report, tuning), plans[name].report.inherited)
        for name, candidate in by_name.items()
    }

    def student(name: str, seed: int) -> nn.Module:
        save_plans(folder, plans)  # here, since by now the folder is known to hold no other sweep
        network, _ = start(teacher, by_name[name], data, config)
        if on_start is not None:
            on_start(name, seed, network)
        return network

    def with_plans(comparison: Comparison) -> Any:
        return page(comparison, plans)

    return compare(
        methods,
        student,
        teacher,
        data,
        config,
        folder=folder,
        seeds=seeds,
        settings=settings,
        retry=retry,
        progress=progress,
        tensorboard=tensorboard,
        on_run=on_run,
        page=with_plans,
    )


def start(
    teacher: nn.Module, candidate: InheritConfig, data: Splits | None, config: TrainConfig
) -> tuple[nn.Module, InheritReport]:
    """The network that a run begins with, calibrated and recalibrated where that is wanted, and its report.

    Args:
        teacher: on the device of `config`.
        candidate: how to make it; gates and deviations are drawn from torch's random state.
        data: the images; None where the candidate needs none.
        config: batch size, augmentation and seed of the batches.

    Raises:
        ValueError: as `hyperfast.inherit`; batches are wanted and there are no images.
    """
    if data is None and (candidate.calibration or candidate.recalibrate):
        raise ValueError("calibration and recalibrate show images to the network; give data, or leave them at 0")
    calibration = None
    if data is not None and candidate.calibration:
        calibration = list(islice(_batches(data.train, config, train=True), candidate.calibration))
    network, report = inherit(teacher, **candidate.keywords(), calibration=calibration)
    if data is not None and candidate.recalibrate:
        recalibrate_norms(network, islice(_batches(data.train, config, train=True), candidate.recalibrate))
    return network, report


def make_plan(
    teacher: nn.Module, candidate: InheritConfig, data: Splits, config: TrainConfig, seed: int = 0
) -> InheritPlan:
    """Decompose the teacher, and measure what came of it; torch's random state is put back.

    Args:
        teacher: on the device of `config`.
        candidate: how to make it.
        data: the images.
        config: of the training.
        seed: of gates and deviations.
    """
    device = config.torch_device()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        network, report = start(teacher, candidate, data, config)
    judged = next((part for part in (data.val, data.test) if len(part)), None)
    accuracy = None
    if judged is not None:
        loader = DeviceLoader(judged, config.batch_size, device=device, train=False)
        accuracy = evaluate(network, loader.epoch(), device, config.amp).accuracy
    few = data.train.subset(torch.arange(min(_TIMED_IMAGES, len(data.train))))
    images = next(_batches(few, replace(config, batch_size=len(few))))
    costs = layer_costs(teacher, network, images, [row.name for row in report.rows])
    return InheritPlan(candidate, checkpoint.digest(teacher), report, costs, len(images), accuracy)


def _follows(report: InheritReport, tuning: TuneConfig) -> bool:
    return report.energy < tuning.enough if tuning.kd is None else tuning.kd


def _batches(images: ImageSet, config: TrainConfig, train: bool = False) -> Iterator[Tensor]:
    """Images without labels; in training augmented and in the order of the first epoch."""
    size = min(config.batch_size, len(images))
    loader = DeviceLoader(
        images,
        size,
        device=config.torch_device(),
        train=train,
        augment=config.augment,
        seed=config.seed,
        channels_last=config.channels_last,
    )
    return (batch for batch, _ in loader.epoch())
