"""A hypernetwork distilled on handwritten digits: three methods, several seeds, one table and one page.

    python -m hyperfast.recipes.demo

A small ResNet, the teacher, learns from all training images. The same network with generated weights then learns from
a few of them: from the labels alone, with attention transfer, and with the teacher's logits. Images, epochs, optimiser
and learning rate are the same for all three, the seed sets initialisation and order.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

import hyperfast
from hyperfast import data, env_report, models
from hyperfast.analysis import Report, attention_maps, curves_svg
from hyperfast.recipes.config import TrainConfig
from hyperfast.recipes.distill import distill
from hyperfast.recipes.distill_config import DistillConfig, LossTerm
from hyperfast.recipes.progress import OnStep, progress_over_runs
from hyperfast.recipes.seed_runs import SeedRuns, mebibytes, terminal_table
from hyperfast.recipes.training import train

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor, nn

    from hyperfast.recipes.result import TrainResult

__all__ = ["DemoConfig", "MethodRuns", "demo"]

_BATCH, _LR = 25, 0.05
# The usual weight 1000 belongs to maps of 32x32 to 8x8. In mode `code` the loss of a tap goes with 1 / positions,
# which are 16 times fewer here.
_METHODS: Mapping[str, DistillConfig | None] = {
    "MIP alone": None,
    "MIP + AT": DistillConfig(losses={"at": LossTerm(1000 / 16)}),
    "MIP + logit KD": DistillConfig(losses={}, kd_weight=1.0),
}
_COLUMNS = ("method", "test accuracy", "epochs to 95 % of teacher", "ms per step", "peak memory")
_SHOWN = (0, 2, 3, 6, 8)  # digits
_ENVIRONMENT = ("hyperfast", "python", "torch", "processor", "gpu", "backend")


@dataclass(frozen=True)
class DemoConfig:
    """Settings of the demo.

    Attributes:
        out: folder for report.html.
        seeds: runs of each method.
        epochs: of each of them, over the training images of the students.
        train_images: training images of the students, drawn by class; the teacher has all of them.
        teacher_epochs: of the teacher, over all training images.
    """

    out: Path = Path("runs/demo")
    seeds: int = 3
    epochs: int = 60
    train_images: int = 50
    teacher_epochs: int = 15

    def __post_init__(self) -> None:
        for name, least in (("seeds", 1), ("epochs", 1), ("train_images", _BATCH), ("teacher_epochs", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {least}")


@dataclass(frozen=True)
class MethodRuns(SeedRuns):
    """The runs of one method.

    Attributes:
        maps: attention maps of the first seed for all test images, by tap.
    """

    maps: Mapping[str, Tensor]

    def row(self, target: float) -> tuple[str, ...]:
        """The line of the table; `target` is the validation accuracy to be reached."""
        return (
            self.name,
            f"{self.percent('test_accuracy_best')} %",
            self.epochs_to_reach(target),
            f"{self.median('ms_per_step'):.1f}",
            mebibytes(self.median("peak_memory")),
        )


def demo(config: DemoConfig | None = None, *, console: Console | None = None) -> list[MethodRuns]:
    """Run the demo; prints a table and writes `report.html`.

    Args:
        config: default `DemoConfig()`.
        console: where the table and the progress bar go; default the terminal.

    Returns:
        The runs of the teacher and of every method.

    Raises:
        ModuleNotFoundError: scikit-learn or matplotlib (extra `hyperfast[demo]`) is not installed.
        KeyboardInterrupt: Ctrl-C.
    """
    from rich.console import Console

    config, console = config or DemoConfig(), console or Console()
    started = time.perf_counter()
    splits = data.load("digits", val_fraction=0.2)
    drawn, _ = data.stratified_split(splits.train.labels, min(config.train_images, len(splits.train)), seed=0)
    few = data.Splits(splits.train.subset(drawn), splits.val, splits.test)
    steps = [config.teacher_epochs * (len(splits.train) // _BATCH)]
    steps += [config.epochs * (len(few.train) // _BATCH)] * (config.seeds * len(_METHODS))
    with _one_thread(), progress_over_runs(console.is_terminal, steps) as begin:
        teacher, taught = _train_teacher(config, splits, begin("teacher"))
        runs = [taught, *_train_students(config, few, teacher, begin)]
        environment = env_report.collect()
    target = 0.95 * (taught.results[0].val_accuracy_best or 0.0)
    rows = [method.row(target) for method in runs]
    seconds = time.perf_counter() - started
    page = _report(config, few, runs, rows, environment, seconds).write(config.out / "report.html")
    _print(console, rows, page, seconds)
    return runs


def _network() -> nn.Module:
    return models.create("resnet8", in_channels=1, width=16)


def _train_config(epochs: int, seed: int) -> TrainConfig:
    return TrainConfig(
        epochs=epochs, batch_size=_BATCH, lr=_LR, seed=seed, augment=data.default_augment("digits"), device="cpu"
    )


def _train_teacher(
    config: DemoConfig, splits: data.Splits, on_step: OnStep
) -> tuple[nn.Module, MethodRuns]:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        teacher = _network()
    result = train(teacher, splits, _train_config(config.teacher_epochs, seed=0), on_step=on_step)
    return teacher.eval(), MethodRuns("teacher", [result], attention_maps(teacher, _images(splits.test)))


def _train_students(
    config: DemoConfig, splits: data.Splits, teacher: nn.Module, begin: Callable[[str], OnStep]
) -> list[MethodRuns]:
    results: dict[str, list[TrainResult]] = {name: [] for name in _METHODS}
    maps: dict[str, Mapping[str, Tensor]] = {}
    # Method by method within a seed: what the machine does meanwhile then meets all of them.
    for seed in range(config.seeds):
        for name, distillation in _METHODS.items():
            with torch.random.fork_rng([]):
                torch.manual_seed(seed)
                student = hyperfast.hypernetize(_network())
            settings, on_step = _train_config(config.epochs, seed), begin(f"{name}, seed {seed}")
            if distillation is None:
                result = train(student, splits, settings, on_step=on_step)
            else:
                result = distill(student, teacher, splits, settings, distillation, on_step=on_step)
            # The weights would pile up and count as memory of the runs that come later.
            results[name].append(replace(result, best_weights={}))
            if seed == 0:
                maps[name] = attention_maps(student, _images(splits.test))
    return [MethodRuns(name, results[name], maps[name]) for name in _METHODS]


def _images(images: data.ImageSet) -> Tensor:
    """All of them, normalised."""
    batch, _ = next(data.DeviceLoader(images, len(images), device="cpu", train=False).epoch())
    return batch


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """These tensors are too small to share out: two threads wait for one another more than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _print(console: Console, rows: Sequence[Sequence[str]], page: Path, seconds: float) -> None:
    console.print(terminal_table(_COLUMNS, rows))
    console.print(f"{page} has the curves and the attention maps ({seconds:.0f} s)", highlight=False, soft_wrap=True)


def _report(
    config: DemoConfig,
    splits: data.Splits,
    runs: Sequence[MethodRuns],
    rows: Sequence[Sequence[str]],
    environment: Mapping[str, str],
    seconds: float,
) -> Report:
    teacher, students = runs[0], runs[1:]
    report = Report(
        "Distilling a hypernetwork on handwritten digits",
        "One ResNet-8, four times: as the teacher, and three times with all convolution and linear weights generated "
        "by a magnitude-invariant (MIP) hypernetwork: from labels alone, with attention transfer (AT), and with the "
        "teacher's logits (KD).",
    )
    report.facts(_facts(config, environment, seconds))
    report.section("Results")
    report.table(_COLUMNS, rows, _table_caption(config, splits))
    report.section("Training curves")
    val = teacher.results[0].val_accuracy_best or 0.0
    report.figures(
        (
            curves_svg(
                [method.curve("val_accuracy") for method in students],
                ylabel="validation accuracy",
                percent=True,
                reference=("teacher", val),
            ),
            f"Validation accuracy. Line: mean of the seeds; band: lowest to highest. The teacher reaches {val:.1%}.",
        ),
        (
            curves_svg(
                [method.curve("val_loss") for method in students], ylabel="validation cross-entropy (nats)", log=True
            ),
            "Cross-entropy on the validation images, without the terms that only some methods have. Lower is better.",
        ),
    )
    report.section("Attention maps")
    _add_maps(report, splits.test, runs)
    return report


def _facts(config: DemoConfig, environment: Mapping[str, str], seconds: float) -> dict[str, str]:
    command = (
        f"hyperfast demo --seeds {config.seeds} --epochs {config.epochs} --train-images {config.train_images} "
        f"--teacher-epochs {config.teacher_epochs}"
    )
    known = {name: environment[name] for name in _ENVIRONMENT if name in environment}
    return {"command": command, **known, "wall time": f"{seconds:.0f} s, all runs"}


def _table_caption(config: DemoConfig, splits: data.Splits) -> str:
    return (
        f"{config.seeds} seeds each; accuracy on {len(splits.test)} test images with the weights of the best "
        f"validation epoch, mean and standard deviation. Students see {len(splits.train)} labelled images for "
        f"{config.epochs} epochs, the teacher sees all training images for {config.teacher_epochs}. Epochs: mean of "
        "the runs, on the validation images. Time: median of a training step on one thread. Memory: peak of the whole "
        "process, Python and PyTorch included."
    )


def _add_maps(report: Report, images: data.ImageSet, runs: Sequence[MethodRuns]) -> None:
    chosen = torch.tensor([int((images.labels == digit).nonzero()[0, 0]) for digit in _SHOWN])
    report.text(
        "Where the network looks: the sum of squared features over the channels, at the end of each stage, bright "
        "where it is large. Attention transfer asks the student for the teacher's maps."
    )
    report.maps(
        images.images[chosen],
        {method.name: {tap: maps[chosen] for tap, maps in method.maps.items()} for method in runs},
        [images.classes[label] for label in images.labels[chosen].tolist()],
        "Test images that no network has seen, first seed. Every map has its own colour scale.",
    )
    teacher, students = runs[0], runs[1:]
    rows = [
        (method.name, *(f"{_agreement(maps, teacher.maps[tap]):.3f}" for tap, maps in method.maps.items()))
        for method in students
    ]
    report.table(
        ("method", *teacher.maps),
        rows,
        "Agreement of the student's maps with the teacher's on all test images: mean cosine, 1 is equal.",
    )


def _agreement(student: Tensor, teacher: Tensor) -> float:
    return float(F.cosine_similarity(student.flatten(1), teacher.flatten(1)).mean())


if __name__ == "__main__":
    import tyro

    try:
        demo(tyro.cli(DemoConfig, prog="python -m hyperfast.recipes.demo"))
    except KeyboardInterrupt:
        sys.exit(130)
