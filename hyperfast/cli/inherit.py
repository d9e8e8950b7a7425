"""`hyperfast inherit`."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import tyro

from hyperfast.cli.compare import sized
from hyperfast.cli.distill import check_fits, measure_teacher
from hyperfast.cli.export import write_safetensors
from hyperfast.cli.network import Run, Trained, load_run, load_trained
from hyperfast.cli.options import OptionalData, Repeated, TrainOptions, key_values
from hyperfast.cli.session import describe, percent
from hyperfast.nn import Hypernetwork, inherited_layers
from hyperfast.recipes import Comparison, InheritConfig, TrainConfig, TuneConfig, checkpoint, inherit_sweep
from hyperfast.recipes.compare_report import PAGE, failed
from hyperfast.recipes.comparison import RECORD, run_folder
from hyperfast.recipes.inherit import start
from hyperfast.recipes.inherit_plan import InheritPlan, layer_table, load_plans
from hyperfast.recipes.inherit_report import sweep_table
from hyperfast.recipes.layer_cost import layer_costs
from hyperfast.recipes.trainer import to_device

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

_BATCH = 64


@dataclass(frozen=True)
class LayerOptions(InheritConfig):
    """The settings of `InheritConfig` with its texts; sizes and heads are several.

    Attributes:
        include: glob over the names of the layers to replace, such as layer3.*; may be given several times. Default:
            all.
        exclude: glob of those to leave, such as conv1; may be given several times.
    """

    rank: tyro.conf.Suppress[int | None] = None
    energy: tyro.conf.Suppress[float | None] = None
    budget: tyro.conf.Suppress[int | None] = None
    heads: tyro.conf.Suppress[int] = 3
    include: Repeated = ()
    exclude: Repeated = ()


@dataclass(frozen=True)
class TuneOptions(TuneConfig):
    """The settings of `TuneConfig` with its texts."""

    kd: tyro.conf.Suppress[bool | None] = None


@dataclass(frozen=True)
class FineTuneOptions(TrainOptions):
    """The settings of `TrainConfig`, by default the paper's but for the number of epochs, of which it has 240."""

    batch_size: int = 64
    lr: float = 0.05
    lr_steps: tuple[float, ...] | None = (0.625, 0.75, 0.875)
    nesterov: bool = False
    decay_norm_and_bias: bool = True


@dataclass(frozen=True)
class Inherit:
    """Make small networks of a trained one.

    Attributes:
        teacher: trained weights: a safetensors file, a state dict of torch.save, or the folder that "hyperfast train"
            wrote.
        model: of the teacher: resnet56, vgg16_bn, timm:NAME, torchvision:NAME, package.module:function. Not needed for
            the folder of a run.
        option: option of the model, such as shortcut=B; may be given several times. Width, channels and shortcut are
            seen from the weights.
        rank: of every layer. Several: one network of each, with each number of heads.
        energy: instead: share of the squared singular values that each layer keeps, such as 0.9.
        budget: instead: parameters of the whole network.
        heads: of each layer.
        layers: how layers are made.
        images: to fine-tune on. Without, the table of the layers and the file are all.
        ce: fine-tune on labels alone.
        kd: fine-tune with the logits of the teacher. Default: where the network keeps less of the energy than --enough.
        tuning: what is minimised.
        training: settings of the training.
        seeds: runs of each network; their seeds are --seed and those after it.
        retry: run those again that have failed.
        out: file to write, such as resnet56_r16.safetensors, which hyperfast loads without the teacher; where there is
            one network and one seed. It has the weights of the best epoch.
        folder: of the runs and of the page about them. Default: runs/inherit-DATASET-MODEL. Runs that are there
            already, with the same settings, are gone on with; new ranks, heads and seeds are added to them.
        resume: fail where there is nothing to go on with.
        image: channels, height and width of the images that layers are timed with where there are none.
        tensorboard: write TensorBoard events into the folder of each run (extra 'tensorboard').
    """

    teacher: tyro.conf.Positional[Path]
    model: str | None = None
    option: Repeated = ()
    rank: tuple[int, ...] = ()
    energy: tuple[float, ...] = ()
    budget: tuple[int, ...] = ()
    heads: tuple[int, ...] = (3,)
    layers: LayerOptions = field(default_factory=LayerOptions)
    images: OptionalData = field(default_factory=OptionalData)
    ce: tyro.conf.FlagCreatePairsOff[bool] = False
    kd: tyro.conf.FlagCreatePairsOff[bool] = False
    tuning: TuneOptions = field(default_factory=TuneOptions)
    training: FineTuneOptions = field(default_factory=FineTuneOptions)
    seeds: int = 1
    retry: bool = False
    out: Path | None = None
    folder: Path | None = None
    resume: bool = False
    image: tuple[int, int, int] = (3, 32, 32)
    tensorboard: bool = False

    @staticmethod
    def help() -> str:
        return """Make small networks of a trained one: layers in low rank with gated heads, fine-tuned (InherNet).

Examples:
    hyperfast inherit resnet56.safetensors --model resnet56 --rank 16 --out r16.safetensors
    hyperfast inherit resnet56.safetensors --model resnet56 --rank 8 --kd --dataset cifar10 --data DIR \\
                      --epochs 60 --recalibrate 16 --out r8.safetensors
    hyperfast inherit resnet56.safetensors --model resnet56 --energy 0.9 --heads 1 --dataset cifar10 --data DIR
    hyperfast inherit resnet56.safetensors --model resnet56 --rank 4 8 16 --heads 1 2 3 --dataset cifar10 --data DIR \\
                      --folder runs/sweep

One network is shown layer by layer: what became of each and why, the energy that it keeps, parameters, operations and
time on this machine before and after. Of several there is one line each; the page in FOLDER has all tables, and
accuracy against size. Each run has a folder in it, which "hyperfast export" (with --fold for one head) and "hyperfast
analyze" take. Ctrl-C writes a checkpoint; the same command then goes on where it stopped."""

    def run(self, console: Console) -> None:
        """Decompose, fine-tune where there are images, and print the tables."""
        candidates = self._candidates()
        config = self.training.for_data(self.images) if self.images.dataset else TrainConfig()
        tuning = self._tuning()
        if not self.images.dataset:
            self._decompose(candidates, console)
            return
        splits = self.images.load()
        trained = self._teacher(len(splits.train.classes))
        check_fits(trained.network, splits)
        if trained.mean is not None and trained.std is not None:
            splits = splits.normalised(trained.mean, trained.std)
        model = trained.network.model
        folder = self.folder or Path("runs") / f"inherit-{self.images.dataset}-{model.replace(':', '-')}"
        if self.resume and not (folder / RECORD).exists():
            raise FileNotFoundError(f"there is no {RECORD} in {folder} to go on with; leave --resume out to start")
        judge, accuracy = measure_teacher(trained.module, splits, config)
        console.print(f"teacher: {model}, {percent(accuracy)} on the {judge} images", highlight=False)

        def note(name: str, seed: int, network: nn.Module) -> None:
            # Beside the weights, so that other commands can build the network again.
            own = replace(trained.network, inherited=inherited_layers(network))
            settings = {"command": "inherit", "method": name}
            describe(own, splits, replace(config, seed=seed), **settings).save(folder / run_folder(name, seed))

        try:
            comparison = inherit_sweep(
                trained.module,
                splits,
                candidates,
                config,
                tuning,
                folder=folder,
                seeds=range(config.seed, config.seed + self.seeds),
                settings={"data": self.images.settings(), "student": asdict(trained.network)},
                retry=self.retry,
                progress=console.is_terminal,
                tensorboard=self.tensorboard,
                on_plan=lambda plan: _say(plan, len(candidates) == 1, console),
                on_start=note,
            )
        except KeyboardInterrupt:
            so_far = Comparison.load(folder) if (folder / RECORD).exists() else None
            if so_far is not None and any(run.result for run in so_far.runs):
                _print(so_far, console)
            raise
        _print(comparison, console)
        asked = {(c.name, config.seed + seed) for c in candidates for seed in range(self.seeds)}
        runs = [run for run in comparison.runs if (run.method, run.seed) in asked]
        if not any(run.result for run in runs):
            raise ValueError(f"every run has failed, the first with {runs[0].error}")
        if self.out is not None:
            run, network = load_run(folder / run_folder(candidates[0].name, config.seed))
            self._write(network, run, console)

    def _candidates(self) -> list[InheritConfig]:
        sizes: dict[str, tuple[Any, ...]] = {"rank": self.rank, "energy": self.energy, "budget": self.budget}
        given = [name for name, values in sizes.items() if values]
        if len(given) != 1:
            raise ValueError(f"give one of --rank, --energy and --budget; got {', '.join(given) or 'none'}")
        if not self.heads:
            raise ValueError("--heads is empty; give at least one number, such as 3")
        if self.seeds < 1:
            raise ValueError(f"--seeds is {self.seeds}; give at least 1")
        common = {f.name: getattr(self.layers, f.name) for f in fields(InheritConfig)}
        common["include"] = self.layers.include or ("*",)
        found = [
            InheritConfig(**{**common, given[0]: size, "heads": heads})
            for size, heads in itertools.product(sizes[given[0]], self.heads)
        ]
        if self.out is not None and (len(found) > 1 or self.seeds > 1):
            raise ValueError(
                f"--out is one file, but {len(found) * self.seeds} networks were asked for; leave it out: each is in "
                "its own folder"
            )
        if self.out is not None and self.out.suffix != ".safetensors":
            raise ValueError(
                f"--out is {self.out}; its ending must be .safetensors. hyperfast export writes other forms"
            )
        return found

    def _tuning(self) -> TuneConfig:
        if self.ce and self.kd:
            raise ValueError("--ce and --kd: give one of them, or none")
        values = {f.name: getattr(self.tuning, f.name) for f in fields(TuneConfig)}
        return TuneConfig(**{**values, "kd": True if self.kd else False if self.ce else None})

    def _teacher(self, classes: int) -> Trained:
        trained = load_trained(self.teacher, self.model, key_values(self.option, "--option"), classes)
        if trained.network.inherited is not None:
            raise ValueError(f"{self.teacher} is inherited itself; give the network that it was made of")
        if isinstance(trained.module, Hypernetwork):
            plain = trained.module.materialize().eval()
            return replace(trained, module=plain, network=replace(trained.network, hypernet=None))
        return trained

    def _decompose(self, candidates: list[InheritConfig], console: Console) -> None:
        """Without images: the table of the layers, and the file."""
        if self.images.data is not None:
            raise ValueError("--data is given without --dataset; add --dataset cifar10, cifar100 or folder")
        trained = self._teacher(10)
        config = self.training
        to_device(trained.module, config)
        images = torch.zeros(_BATCH, *self.image, device=config.torch_device())
        for candidate in candidates:
            with torch.random.fork_rng([]):
                torch.manual_seed(config.seed)
                network, report = start(trained.module, candidate, None, config)
            costs = layer_costs(trained.module, network, images, [row.name for row in report.rows])
            plan = InheritPlan(candidate, checkpoint.digest(trained.module), report, costs, _BATCH)
            _say(plan, True, console)
            if self.out is not None:
                own = replace(trained.network, inherited=inherited_layers(network))
                self._write(network, Run(own, self.image, trained.mean or (), trained.std or (), {}), console)

    def _write(self, network: nn.Module, run: Run, console: Console) -> None:
        assert self.out is not None
        with checkpoint.staged(self.out) as staging:
            write_safetensors(network, run, staging)
        console.print(
            f"{self.out}: {run.network.model}, inherited, {self.out.stat().st_size:,} bytes",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _say(plan: InheritPlan, whole: bool, console: Console) -> None:
    """The table of a network's layers, or a line of it."""
    report, name = plan.report, plan.config.name
    at_once = "" if plan.accuracy is None else f", {percent(plan.accuracy)} at once"
    line = f"{name}: {report.parameters:,} to {report.inherited:,} parameters, energy {report.energy:.3f}{at_once}"
    if whole:
        title = f"{name}; ms: of a forward pass of {plan.batch} images on this machine"
        console.print(sized(console, *layer_table(plan), title=title), crop=False)
    console.print(line, highlight=False, soft_wrap=True)


def _print(comparison: Comparison, console: Console) -> None:
    plans = load_plans(comparison.folder)
    title = f"{comparison.folder}"
    shown = sized(console, *sweep_table(comparison, plans), title=title)
    if shown.width is None:
        shown = sized(console, *sweep_table(comparison, plans, brief=True), title=title)
    console.print(shown, crop=False)
    for runs, message in failed(comparison).items():
        console.print(f"{runs} {message}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    console.print(f"{comparison.folder / PAGE}", markup=False, highlight=False, soft_wrap=True)
