"""Methods compared: every method with every seed is a run of its own, and the whole can be gone on with."""

from __future__ import annotations

import gc
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import nn

from hyperfast import env_report
from hyperfast.analysis import require_matplotlib
from hyperfast.data import DeviceLoader, ImageSet, Splits
from hyperfast.recipes import checkpoint
from hyperfast.recipes.compare_report import page as compare_page
from hyperfast.recipes.compare_report import write_results
from hyperfast.recipes.comparison import ComparedRun, Comparison, Record, TeacherAccuracy, run_folder
from hyperfast.recipes.config import TrainConfig
from hyperfast.recipes.cost import LaunchCounter
from hyperfast.recipes.distill import distill
from hyperfast.recipes.distill_config import DistillConfig
from hyperfast.recipes.evaluation import evaluate
from hyperfast.recipes.progress import progress_over_runs
from hyperfast.recipes.trainer import CHECKPOINT
from hyperfast.recipes.training import RunOptions, train

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from hyperfast.analysis import Report
    from hyperfast.recipes.result import TrainResult

logger = logging.getLogger(__name__)

# They change how a run is computed, not what; and the seed is each run's own.
_FREE = ("device", "compile", "checkpoint_every", "seed")
_TINY_LR = 1e-9

Student = Callable[[str, int], nn.Module]


class Procedure(Protocol):
    """How a student is trained, where neither `train` nor `distill` says it all."""

    def describe(self) -> Mapping[str, Any]:
        """Its settings as JSON, by which a comparison is gone on with; `weights` has those of its terms by name."""

    def train(
        self, model: nn.Module, teacher: nn.Module, data: Splits, config: TrainConfig, **run: Unpack[RunOptions]
    ) -> TrainResult:
        """Train `model`, as `distill` does."""


Training: TypeAlias = DistillConfig | Procedure | None


def compare(
    methods: Mapping[str, Training],
    student: Student,
    teacher: nn.Module,
    data: Splits,
    config: TrainConfig | None = None,
    *,
    folder: str | os.PathLike[str],
    seeds: Sequence[int] = (0, 1, 2),
    settings: Mapping[str, Any] | None = None,
    retry: bool = False,
    progress: bool = False,
    tensorboard: bool = False,
    on_run: Callable[[ComparedRun], object] | None = None,
    page: Callable[[Comparison], Report] = compare_page,
) -> Comparison:
    """Train a student by every method with every seed; all of them in the same way otherwise.

    Runs go seed by seed, and within a seed method by method: what the machine does meanwhile meets all methods, and the
    first tables have all of them. After each seed the tables and the page are written anew.

    Args:
        methods: what each student is distilled with, by name; None: it learns from the labels alone (`train`);
            or a `Procedure`.
        student: called with method and seed, returns a new student. Torch's random state is the seed's meanwhile, and
            is put back. A method may be another student, such as an ordinary network or another initialisation.
        teacher: as in `distill`.
        data: as in `distill`.
        config: settings of every run but for their seed; default `TrainConfig()`.
        folder: gets `comparison.json`, the tables `results.csv` and `results.json`, the page `report.html`, and for
            each run a folder `METHOD-seedK` as `distill` writes it. A comparison that is there already is gone on with:
            finished runs are not run again, others resume from their checkpoint, new methods and seeds are added.
        seeds: of the runs.
        settings: whatever else the runs depend on, as JSON; goes on with a comparison of the same settings only.
        retry: run those again that have failed.
        progress: show a progress bar over all runs.
        tensorboard: also write TensorBoard events.
        on_run: called after each run with what came of it.
        page: makes the page.

    Returns:
        All that the folder holds. A run that failed is in it with its message; it has stopped no other.

    Raises:
        ValueError: no methods or seeds, one of them twice, names that make the same folder; a batch larger than the
            training set; `folder` holds a comparison with other settings, which are named.
        ModuleNotFoundError: matplotlib (extra `hyperfast[demo]`), or TensorBoard where it is wanted, is not installed.
        OSError: a file cannot be written.
        KeyboardInterrupt: Ctrl-C, after the step under way was finished and a checkpoint was written.

    Notes:
        On the CPU a run that was stopped ends with bit for bit the same weights. On a GPU the kernel launches of one
        step of each method are counted first, on a student of their own.

    Example:
        >>> methods = {"mip": None, "at": DistillConfig(), "kd": DistillConfig(losses={}, kd_weight=1.0)}
        >>> def student(method, seed):
        ...     return hyperfast.hypernetize(models.create("resnet20"))
        >>> comparison = compare(methods, student, teacher, data.load("cifar10", "cifar"), folder="runs/compare")
        >>> print(comparison.of("at").percent("test_accuracy_best"))
    """
    config, folder = config or TrainConfig(), Path(folder)
    _check(methods, seeds)
    require_matplotlib()
    steps = config.epochs * len(DeviceLoader(data.train, config.batch_size, device="cpu", train=True))
    common = _settings(config, data, teacher)
    if settings is not None and (twice := common.keys() & settings.keys()):
        raise ValueError(f"settings has {min(twice)!r}, which is the recipe's own; give it another name")
    record = Record.open(folder, {**(settings or {}), **common}, {name: _describe(m) for name, m in methods.items()})
    _check_folders(record.methods)
    if record.teacher is None:
        record.teacher = asdict(_measure(teacher, data, config))
    if (environment := env_report.collect()) not in record.environments:
        record.environments.append(environment)
    asked = record.add(list(methods), seeds)
    record.save()
    states = {run: record.state(*run).state for run in asked}
    pending = [run for run in asked if states[run] == "not finished" or (retry and states[run] == "failed")]
    with progress_over_runs(progress, [steps] * len(pending)) as begin:
        for index, (method, seed) in enumerate(pending):
            run: RunOptions = {"on_step": begin(f"{method}, seed {seed}"), "tensorboard": tensorboard}
            record.note(method, seed, None)
            try:
                error = _attempt(record, methods[method], student, teacher, data, config, (method, seed), run)
                record.note(method, seed, error)
                if on_run is not None:
                    on_run(record.state(method, seed))
                if pending[index + 1 : index + 2] and pending[index + 1][1] != seed:
                    write_results(Comparison.load(folder), page)
            except KeyboardInterrupt as interrupt:
                write_results(Comparison.load(folder), page)
                done = len(asked) - len(pending) + index
                raise KeyboardInterrupt(
                    f"stopped in {method}, seed {seed}, after {done} of {len(asked)} runs; the same again goes on from "
                    "there"
                ) from interrupt
    comparison = Comparison.load(folder)
    write_results(comparison, page)
    return comparison


def _attempt(
    record: Record,
    method: Training,
    student: Student,
    teacher: nn.Module,
    data: Splits,
    config: TrainConfig,
    name: tuple[str, int],
    run: RunOptions,
) -> str | None:
    """A run from where it stands to its end; what went wrong, or None."""
    folder = record.folder / run_folder(*name)
    settings = replace(config, seed=name[1])
    gc.collect()  # what is left of other runs would count as memory of this one
    if config.compile:
        torch.compiler.reset()  # it compiles a class a few times only, and then no more
    try:
        if settings.torch_device().type == "cuda" and name[0] not in record.launches:
            counted = _launches(_new(student, name, settings), method, teacher, data, settings)
            if counted is not None:
                record.launches[name[0]] = counted
        where: RunOptions = {"folder": folder, "resume": (folder / CHECKPOINT).exists(), **run}
        _train(_new(student, name, settings), method, teacher, data, settings, **where)
    except (OSError, ImportError):
        raise  # the machine's fault, not the method's
    except Exception as error:
        logger.warning("%s, seed %d, has failed: %s", *name, error)
        return f"{type(error).__name__}: {error}"
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return None


def _new(student: Student, name: tuple[str, int], config: TrainConfig) -> nn.Module:
    device = config.torch_device()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(name[1])
        return student(*name)


def _train(
    model: nn.Module,
    method: Training,
    teacher: nn.Module,
    data: Splits,
    config: TrainConfig,
    **run: Unpack[RunOptions],
) -> None:
    if method is None:
        train(model, data, config, **run)
    elif isinstance(method, DistillConfig):
        distill(model, teacher, data, config, method, **run)
    else:
        method.train(model, teacher, data, config, **run)


def _launches(
    model: nn.Module, method: Training, teacher: nn.Module, data: Splits, config: TrainConfig
) -> int | None:
    """Kernels of one training step, on a model that is not needed afterwards."""
    counter = LaunchCounter(config.torch_device())
    count = counter.steps * config.batch_size
    images, none = data.train.subset(torch.arange(count) % len(data.train)), torch.arange(0)
    few = Splits(images, images.subset(none), images.subset(none))
    # The learning rate changes no launch, and a first step must not blow up here.
    settings = replace(config, epochs=1, warmup_epochs=0.0, lr=_TINY_LR, log_every=count, checkpoint_every=None)
    _train(model, method, teacher, few, settings, on_step=counter)
    return counter.launches


def _measure(teacher: nn.Module, data: Splits, config: TrainConfig) -> TeacherAccuracy:
    device = config.torch_device()

    def accuracy(images: ImageSet) -> float | None:
        if not len(images):
            return None
        loader = DeviceLoader(images, config.batch_size, device=device, train=False)
        return evaluate(teacher.to(device), loader.epoch(), device, config.amp).accuracy

    return TeacherAccuracy(accuracy(data.val), accuracy(data.test))


def _settings(config: TrainConfig, data: Splits, teacher: nn.Module) -> dict[str, Any]:
    """What every run depends on."""
    images = data.train
    sets = {"train": data.train, "val": data.val, "test": data.test}
    return {
        "training": {key: value for key, value in asdict(config).items() if key not in _FREE},
        "images": {
            **{name: len(part) for name, part in sets.items()},
            "shape": list(images.images.shape[1:]),
            "classes": len(images.classes),
            "mean": images.mean,
            "std": images.std,
        },
        "teacher_sha256": checkpoint.digest(teacher),
    }


def _describe(method: Training) -> dict[str, Any] | None:
    """A method as JSON, with the weights that it comes to; what JSON has no word for, by its name."""
    if method is None:
        return None
    if not isinstance(method, DistillConfig):
        return dict(method.describe())
    plain: dict[str, Any] = json.loads(
        json.dumps(asdict(method), default=lambda value: getattr(value, "__qualname__", type(value).__qualname__))
    )
    weights = {"labels": method.cross_entropy_weight, **method.betas(), "kd": method.kd_weight}
    return {**plain, "weights": {name: weight for name, weight in weights.items() if weight}}


def _check(methods: Mapping[str, Training], seeds: Sequence[int]) -> None:
    for what, given in (("methods", methods), ("seeds", seeds)):
        if not given:
            raise ValueError(f"{what} is empty; give at least one")
    if seed := _twice(seeds):
        raise ValueError(f"seeds has {seed[0]} twice")


def _check_folders(methods: Iterable[str]) -> None:
    """Some file systems take upper and lower case for the same."""
    folders = {name: run_folder(name, 0).lower() for name in methods}
    if folder := _twice(folders.values()):
        same = [repr(name) for name, own in folders.items() if own == folder[0]]
        raise ValueError(f"methods {' and '.join(same)} would share a folder; rename one of them")


def _twice(values: Iterable[Any]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]
