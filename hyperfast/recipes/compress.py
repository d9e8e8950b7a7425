"""Compression of a trained network into a small predictor of its weights."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hyperfast.analysis import answers, mcnemar
from hyperfast.analysis.paired import McNemar
from hyperfast.data import Augment, DeviceLoader, ImageSet, Splits
from hyperfast.nn import WeightPredictor, recalibrate_norms
from hyperfast.recipes import checkpoint
from hyperfast.recipes.artifact import Artifact
from hyperfast.recipes.checkpoint import JSON
from hyperfast.recipes.compress_config import RELABEL, CompressConfig
from hyperfast.recipes.compress_run import Run
from hyperfast.recipes.guided import Guidance, check_guide
from hyperfast.recipes.reconstruction import Reconstruction, Targets, new_predictor, permutation_kind
from hyperfast.surgery import Coverage, Permutation, cover, relabel

# A run may be resumed with other values of these: they do not change what it computes.
_FREE_SETTINGS = ("device", "log_every", "checkpoint_every")
# What a run that starts from another one's result may set anew.
_NEW_AFTER_START = (*_FREE_SETTINGS, "rounds", "seeds", "seed", "recalibrate", "select", "guide", "precision")
_CALIBRATION_BATCH = 256


@dataclass(frozen=True)
class RoundRecord:
    """One round of reconstruction, by the best of its seeds.

    Attributes:
        round: 1 for the first.
        seed: of the best predictor.
        rmse: against what it was to reconstruct, the network of the round before.
        rmse_to_original: against the original network.
        accuracy: on the images that select; None without.
        target_accuracy: of the network that it was to reconstruct.
        kept: whether the round improved on its target, or was the first. A round that did not is the last one, and is
            not used.
        ms_per_step: of the best predictor's training.
    """

    round: int
    seed: int
    rmse: float
    rmse_to_original: float
    accuracy: float | None
    target_accuracy: float | None
    kept: bool
    ms_per_step: float


@dataclass(frozen=True)
class CompressResult:
    """What a compression came to. Accuracies are shares in [0, 1] by split, `"val"` and `"test"`, where there are any.

    Attributes:
        artifact: predictor, permutation and what is not predicted.
        history: the rounds of reconstruction.
        rmse: of the reconstructed network against the original, over all covered weights.
        original: accuracies of the network.
        reconstruction: accuracies of what was reconstructed from it.
        mcnemar: by split, whether the two differ: `only_first` counts what only the original has right.
        steps: optimiser steps of the whole run.
        seconds: wall time of the whole run.
    """

    artifact: Artifact = field(repr=False)
    history: tuple[RoundRecord, ...]
    rmse: float
    original: Mapping[str, float]
    reconstruction: Mapping[str, float]
    mcnemar: Mapping[str, McNemar]
    steps: int
    seconds: float


def compress(
    model: nn.Module,
    config: CompressConfig | None = None,
    data: Splits | None = None,
    teacher: nn.Module | None = None,
    *,
    start: Artifact | None = None,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = False,
    metadata: Mapping[str, JSON] | None = None,
    on_step: Callable[[int], object] | None = None,
) -> CompressResult:
    """Compress a trained network into a predictor of its weights.

    Phase 1 reconstructs the weights and looks at nothing else; with `rounds` it reconstructs the reconstruction, which
    a predictor larger than the network improves by. Phase 2 (`config.guide`) starts from there and follows the logits
    of a teacher. Norms, biases and classifiers that are not covered stay those of the network; `config.recalibrate`
    renews the statistics of the norms.

    Args:
        model: any trained module; it is left as it is.
        config: settings; default `CompressConfig()`.
        data: images normalised as the network expects. Needed for phase 2 without noise, to recalibrate norms and to
            select by accuracy; otherwise only for the accuracies in the result.
        teacher: phase 2: maps the same images to as many logits. Default: the network itself.
        start: what an earlier call made of `model`, in place of the rounds that it has: phase 2, or further rounds,
            begin there. `config` must describe the same predictor, as `continuation` makes it.
        folder: where to write `checkpoint.safetensors` and `metrics.jsonl`. Default: nothing is written.
        resume: go on with the checkpoint in `folder`; where there is none yet, start.
        progress: show a progress bar on the terminal.
        metadata: goes into the artefact, such as the model's name and options.
        on_step: called after each step with the number of steps that the training has made.

    Raises:
        ValueError: weights that are NaN or infinite; kernels that are zero or larger than the predictor's output;
            phase 2 or `recalibrate` without images; a teacher with other classes; a checkpoint of another network or
            other settings; a `start` of another network or predictor, or with nothing left to do.
        FileExistsError: `folder` holds a run and `resume` is False.
        FloatingPointError: the loss is not finite any more; names the step and the last good checkpoint.
        OSError: a checkpoint cannot be written; the one from before is kept.
        KeyboardInterrupt: Ctrl-C, after the step under way was finished and a checkpoint was written.

    Notes:
        On the CPU, with the same number of threads, a resumed run ends with bit for bit the same weights as one that
        was never stopped.

    Example:
        >>> result = compress(resnet20, CompressConfig(hidden=180), folder="runs/r20")
        >>> result.artifact.save("r20.hf.safetensors")

    Source: NeRN, arXiv 2212.13554; progressive rounds and decoupled training, arXiv 2407.00356.
    """
    compression = _Compression(model, config or CompressConfig(), data, teacher, start)
    run = Run(
        None if folder is None else Path(folder),
        compression.settings(),
        log_every=compression.config.log_every,
        checkpoint_every=compression.config.checkpoint_every,
        resume=resume,
        progress=progress,
        on_step=on_step,
    )
    with run.open():
        return compression.result(run, dict(metadata or {}))


def continuation(start: Artifact, config: CompressConfig) -> CompressConfig:
    """`config` with the predictor, the cover and the reconstruction that `start` was made with.

    What is left of `config`: `rounds`, `seeds`, `seed`, `recalibrate`, `select`, `guide`, `precision`, `device`,
    `log_every` and `checkpoint_every`.

    Raises:
        ValueError: `start` does not say what it was made with; `config` has another value than `start` that is not the
            default either.
    """
    settings = _settings(start)
    if not settings:
        raise ValueError("start does not say what it was made with (metadata['settings']); give what compress() made")
    default, changes = CompressConfig(), dict[str, Any]()
    for name in (f.name for f in fields(CompressConfig) if f.name in settings and f.name not in _NEW_AFTER_START):
        value = tuple(settings[name]) if isinstance(settings[name], list) else settings[name]
        if getattr(config, name) not in (value, getattr(default, name)):
            raise ValueError(f"{name} is {getattr(config, name)!r}, but start was made with {value!r}; leave it out")
        changes[name] = value
    return replace(config, **changes)


class _Compression:
    """The network, what is covered of it, and who judges."""

    def __init__(
        self,
        model: nn.Module,
        config: CompressConfig,
        data: Splits | None,
        teacher: nn.Module | None,
        start: Artifact | None,
    ) -> None:
        self.config, self.data, self.start = config, data, start
        self.model = copy.deepcopy(model).to(config.torch_device()).eval().requires_grad_(False)
        if config.permutation == RELABEL:
            self.model = relabel(self.model.cpu())[0].to(config.torch_device())
        self.state = {name: tensor.detach().cpu() for name, tensor in self.model.state_dict().items()}
        _check_finite(self.state)
        self.coverage = _cover(self.model, config)
        self.tied = _tied(self.model, self.coverage)
        if config.recalibrate and (data is None or not len(data.train)):
            raise ValueError(
                f"recalibrate is {config.recalibrate}, but there are no training images to take the statistics from; "
                "give data, or recalibrate=0"
            )
        self.select = _selection(config, data)
        self.judged = copy.deepcopy(self.model)
        self.guide = None if config.guide is None else config.guide.resolved(config)
        self.teacher = self.model if teacher is None else teacher.to(config.torch_device())
        if self.guide is None and teacher is not None:
            raise ValueError("a teacher is given, but there is no second phase to follow it; give guide=GuideConfig()")
        if self.guide is not None:
            check_guide(self.guide, self.model, self.teacher, data)
        if start is not None:
            self._check_start(start)

    def settings(self) -> dict[str, JSON]:
        """What the result depends on, the weights of network and teacher included."""
        settings = {key: value for key, value in asdict(self.config).items() if key not in _FREE_SETTINGS}
        return {
            **settings,
            "coverage": self.coverage.fingerprint,
            "network": checkpoint.digest(self.model),
            "teacher": None if self.guide is None else checkpoint.digest(self.teacher),
            "start": None if self.start is None else checkpoint.digest(self.start.predictor),
            "train_images": None if self.data is None else len(self.data.train),
        }

    def result(self, run: Run, metadata: dict[str, JSON]) -> CompressResult:
        joint = self.guide is not None and self.guide.method == "joint"
        if not joint:
            self._rounds(run)
        predictor, permutation = self._accepted(run)
        state = self._reconstructed(predictor, permutation)
        if self.guide is not None:
            self._guided(run, predictor, permutation, state)
            # With the norms that it was trained with: new statistics would undo some of that.
            state = {**state, **self._predicted(predictor, permutation)}
        run.save()
        history = tuple(RoundRecord(**record) for record in run.facts.get("history", []))
        original, reconstruction, tests = self._measured(state)
        metadata |= {
            "settings": {key: value for key, value in asdict(self.config).items() if key not in _FREE_SETTINGS},
            "history": [asdict(record) for record in history],
            "accuracy": {"original": original, "reconstruction": reconstruction},
        }
        self.judged.load_state_dict(state)
        artifact = Artifact.of(self.judged, predictor.cpu(), self.coverage, permutation, metadata)
        rmse = _rmse(self.coverage, state, self.state)
        result = CompressResult(artifact, history, rmse, original, reconstruction, tests, run.steps, run.seconds)
        run.write("result", {"rmse": rmse, "original": original, "reconstruction": reconstruction})
        return result

    def _rounds(self, run: Run) -> None:
        """Rounds until one does not improve; the accepted predictor and its permutation are left in `run`."""
        facts, config = run.facts, self.config
        history = facts.setdefault("history", [])
        if self.start is not None and not history:
            history += _history(self.start)
            run.keep("accepted", self.start.predictor.state_dict())
            run.tensors["orders"] = self.start.permutation.orders
        while len(history) < config.rounds and (not history or history[-1]["kept"]):
            number = len(history) + 1
            target = self.state if number == 1 else self._reconstructed(*self._accepted(run))
            targets = Targets.of(target, self.coverage, config)
            trials = facts.setdefault("trials", [])
            while len(trials) < config.seeds:
                self._trial(run, targets, number, config.seed + (number - 1) * config.seeds + len(trials))
            best = trials[_best(trials)]
            target_accuracy = self._accuracy(target)
            better = number == 1 or best["accuracy"] is None or best["accuracy"] > target_accuracy
            history.append({**best, "round": number, "target_accuracy": target_accuracy, "kept": better})
            if better:
                run.keep("accepted", run.kept("best"))
                run.tensors["orders"] = targets.permutation.orders
            run.write("round", history[-1])
            facts["trials"] = []
            run.save()
            run.stop_if_interrupted()

    def _trial(self, run: Run, targets: Targets, number: int, seed: int) -> None:
        """Train and judge one predictor; the best of the round so far is left in `run`."""
        trials, config = run.facts["trials"], self.config
        predictor = new_predictor(self.coverage, config, seed)
        run.drive(Reconstruction(predictor, targets, config, seed), f"round {number}, seed {seed}")
        state = self._reconstructed(predictor, targets.permutation)
        trials.append(
            {
                "seed": seed,
                "rmse": float(targets.rmse(predictor)),
                "rmse_to_original": _rmse(self.coverage, state, self.state),
                "accuracy": self._accuracy(state),
                "ms_per_step": run.ms_per_step,
            }
        )
        if _best(trials) == len(trials) - 1:
            run.keep("best", predictor.state_dict())
        run.save()
        run.stop_if_interrupted()

    def _accepted(self, run: Run) -> tuple[WeightPredictor, Permutation]:
        """The predictor of the last accepted round, or a fresh one before the first."""
        predictor = new_predictor(self.coverage, self.config, self.config.seed)
        weights = run.kept("accepted")
        if not weights:
            return predictor, Targets.of(self.state, self.coverage, self.config).permutation
        predictor.load_state_dict(weights)
        return predictor, Permutation(permutation_kind(self.config), self.coverage.grids, run.tensors["orders"])

    def _guided(
        self, run: Run, predictor: WeightPredictor, permutation: Permutation, state: Mapping[str, Tensor]
    ) -> None:
        """Train `predictor`; everything else of the network is as in `state`."""
        assert self.guide is not None
        if not run.facts.get("guided"):
            targets = Targets.of(self.state, self.coverage, self.config, permutation)
            self.judged.load_state_dict(state)
            guidance = Guidance(predictor, targets, self.judged, self.teacher, self.data, self.guide, self.config)
            run.drive(guidance, "joint training" if self.guide.method == "joint" else "phase 2")
            run.keep("guided", predictor.state_dict())
            run.facts["guided"] = True
        predictor.load_state_dict(run.kept("guided"))

    @torch.no_grad()
    def _predicted(self, predictor: WeightPredictor, permutation: Permutation) -> dict[str, Tensor]:
        """The covered weights by all their names."""
        rows = permutation.invert(predictor()).cpu()
        predicted = self.coverage.scatter(rows)
        predicted |= {name: predicted[owner] for name, owner in self.tied.items()}
        return {name: tensor.to(self.state[name].dtype) for name, tensor in predicted.items()}

    @torch.no_grad()
    def _reconstructed(self, predictor: WeightPredictor, permutation: Permutation) -> dict[str, Tensor]:
        """The network's state dict with predicted weights, its norms recalibrated where that is asked for."""
        state = {**self.state, **self._predicted(predictor, permutation)}
        if not self.config.recalibrate:
            return state
        self.judged.load_state_dict(state)
        recalibrate_norms(self.judged, self._calibration())
        return {name: tensor.detach().cpu().clone() for name, tensor in self.judged.state_dict().items()}

    def _calibration(self) -> Iterator[Tensor]:
        assert self.data is not None
        loader = DeviceLoader(
            self.data.train,
            min(_CALIBRATION_BATCH, len(self.data.train)),
            device=self.config.torch_device(),
            train=True,
            augment=Augment() if self.guide is None else self.guide.augment,
            seed=self.config.seed,
        )
        return (images for images, _ in itertools.islice(loader.epoch(0), self.config.recalibrate))

    def _check_start(self, start: Artifact) -> None:
        config, made = self.config, start.predictor.configuration
        wanted = new_predictor(self.coverage, config, config.seed).configuration
        differs = [
            f"{key} is {made[key]!r} in start and {wanted[key]!r} in config"
            for key in made
            if key != "precision" and made[key] != wanted[key]
        ]
        if start.coverage.fingerprint != self.coverage.fingerprint:
            differs.append("the weights that they cover differ")
        if start.permutation.kind != permutation_kind(config):
            differs.append(
                f"permutation is {start.permutation.kind!r} in start and {permutation_kind(config)!r} in config"
            )
        if differs:
            raise ValueError(f"start does not fit: {'; '.join(differs)}. Use continuation(start, config)")
        renewed = _norm_statistics(self.model) if _settings(start).get("recalibrate") else set()
        for name, tensor in start.kept.items():
            if name not in renewed and not torch.equal(tensor, self.state[name]):
                raise ValueError(f"start was made from another network: its {name} has other values")
        if self.guide is not None and self.guide.method == "joint":
            raise ValueError("joint training begins with a fresh predictor; leave start out, or use method='kd'")
        rounds = len(_history(start))
        if self.guide is None and config.rounds <= rounds:
            raise ValueError(
                f"start has {rounds} rounds and rounds is {config.rounds}: there is nothing left to do; give "
                "guide=GuideConfig(), or more rounds"
            )

    def _accuracy(self, state: Mapping[str, Tensor]) -> float | None:
        """On the images that select; None where none do."""
        if self.select == "rmse":
            return None
        assert self.data is not None
        self.judged.load_state_dict(state)
        return answers(self.judged, getattr(self.data, self.select)).accuracy

    def _measured(self, state: Mapping[str, Tensor]) -> tuple[dict[str, float], dict[str, float], dict[str, McNemar]]:
        """Accuracies of the original and of `state` on every split, and whether they differ."""
        original, reconstruction, tests = {}, {}, {}
        for name, images in _measuring_splits(self.data):
            before = answers(self.model, images)
            self.judged.load_state_dict(state)
            after = answers(self.judged, images)
            original[name], reconstruction[name] = before.accuracy, after.accuracy
            tests[name] = mcnemar(before.correct, after.correct)
        return original, reconstruction, tests


def _settings(start: Artifact) -> dict[str, Any]:
    settings: Any = start.metadata.get("settings") or {}
    return dict(settings)


def _norm_statistics(model: nn.Module) -> set[str]:
    norms = {name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    return {name for name, _ in model.named_buffers() if name.rpartition(".")[0] in norms}


def _history(start: Artifact) -> list[Any]:
    history: Any = start.metadata.get("history") or []
    return list(history)


def _measuring_splits(data: Splits | None) -> Iterator[tuple[str, ImageSet]]:
    for name in ("val", "test") if data is not None else ():
        images = getattr(data, name)
        if len(images):
            yield name, images


def _selection(config: CompressConfig, data: Splits | None) -> str:
    if config.select == "rmse":
        return "rmse"
    has = {name for name, _ in _measuring_splits(data)}
    if config.select is None:
        return "val" if "val" in has else "rmse"
    if config.select not in has:
        raise ValueError(f"select is {config.select!r}, but there are no such images; give data, or select='rmse'")
    return config.select


def _best(trials: list[dict[str, Any]]) -> int:
    """The trial of the highest accuracy, the lowest error among equals."""
    return max(range(len(trials)), key=lambda i: (trials[i]["accuracy"] or 0.0, -trials[i]["rmse"]))


def _check_finite(state: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            bad = int((~tensor.isfinite()).sum())
            raise ValueError(f"{name} has {bad} of {tensor.numel()} entries that are NaN or infinite: train it again")


def _cover(model: nn.Module, config: CompressConfig) -> Coverage:
    sides = [max(m.kernel_size) for m in model.modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1]
    if config.cover == "nern" and not config.include and sides and config.kernel < min(sides):
        raise ValueError(
            f"kernel is {config.kernel}, but the kernels of {type(model).__name__} have sides from {min(sides)} on, "
            f"which do not fit; give kernel={max(sides)}, or cover='all', which splits them"
        )
    return cover(
        model,
        include=config.include or None,
        exclude=config.exclude or None,
        kernel=config.kernel,
        policy=config.cover,
    )


def _tied(model: nn.Module, coverage: Coverage) -> dict[str, str]:
    """Other names of covered weights that modules share."""
    named = dict(model.named_parameters(remove_duplicate=False))
    owners = {named[tensor.name]: tensor.name for tensor in coverage.tensors}
    return {name: owners[p] for name, p in named.items() if p in owners and name != owners[p]}


def _rmse(coverage: Coverage, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    squares = [
        (first[tensor.name].double() - second[tensor.name].double()).square().sum() for tensor in coverage.tensors
    ]
    return float((sum(squares) / coverage.weights) ** 0.5)
