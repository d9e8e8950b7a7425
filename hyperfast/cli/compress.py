"""`hyperfast compress`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from rich.table import Table

from hyperfast.cli.network import Trained, load_trained
from hyperfast.cli.options import OptionalData, Repeated, key_values
from hyperfast.cli.session import percent
from hyperfast.data import Augment
from hyperfast.recipes import CHECKPOINT, Artifact, CompressConfig, GuideConfig, compress, continuation

if TYPE_CHECKING:
    from rich.console import Console

    from hyperfast.data import Splits
    from hyperfast.recipes import CompressResult


@dataclass(frozen=True)
class CompressOptions(CompressConfig):
    """The settings of `CompressConfig` with its texts."""

    guide: tyro.conf.Suppress[GuideConfig | None] = None


@dataclass(frozen=True)
class GuideOptions:
    """Phase 2, and what it is guided by.

    Attributes:
        phase2: kd: after the reconstruction, follow the logits of a teacher on images or noise. joint: NeRN's own
            training, reconstruction, feature maps and logits at once, instead of the reconstruction. Default: none.
        teacher: trained weights of the teacher, for the same images and classes. Default: the network itself.
        teacher_model: of the teacher. Default: that of --model, or what the run's own notes say.
        teacher_option: option of the teacher, such as width=32; may be given several times.
        noise: phase 2 shows uniform noise instead of images; needs --phase2-steps.
        image: channels, height and width of the noise where no images are given.
        alpha: weight of the logits. Default: 0.01, joint 1e-4.
        beta: joint: weight of the feature maps.
        warmup: joint: first steps, in which reconstruction is all.
        phase2_epochs: passes over the images. Default: 100, joint 350.
        phase2_steps: steps instead of epochs.
        phase2_batch_size: images per step.
        phase2_batch_rows: kernels per step that get a gradient. Default: all, joint 4096.
        phase2_optimizer: ranger or adam.
        phase2_lr: learning rate. Default: 3e-4, joint that of the reconstruction.
        amp: bf16 runs network and teacher in bfloat16 where that is safe.
    """

    phase2: Literal["kd", "joint"] | None = None
    teacher: Path | None = None
    teacher_model: str | None = None
    teacher_option: Repeated = ()
    noise: bool = False
    image: tuple[int, int, int] = (3, 32, 32)
    alpha: float | None = None
    beta: float = 1e-4
    warmup: int = 0
    phase2_epochs: int | None = None
    phase2_steps: int | None = None
    phase2_batch_size: int = 256
    phase2_batch_rows: int | None = None
    phase2_optimizer: Literal["ranger", "adam"] = "ranger"
    phase2_lr: float | None = None
    amp: Literal["none", "bf16"] = "none"

    def config(self, data: OptionalData) -> GuideConfig | None:
        """As the recipe takes it; None without a second phase.

        Raises:
            ValueError: options of a second phase without --phase2.
        """
        if self.phase2 is None:
            default = GuideOptions()
            given = [f.name for f in fields(self) if getattr(self, f.name) != getattr(default, f.name)]
            if given:
                flag = given[0].replace("_", "-")
                raise ValueError(f"--{flag} belongs to the second phase; add --phase2 kd, or leave it out")
            return None
        return GuideConfig(
            method=self.phase2,
            alpha=self.alpha,
            beta=self.beta,
            warmup=self.warmup,
            epochs=self.phase2_epochs,
            steps=self.phase2_steps,
            batch_size=self.phase2_batch_size,
            batch_rows=self.phase2_batch_rows,
            optimizer=self.phase2_optimizer,
            lr=self.phase2_lr,
            noise=self.noise,
            image=self.image,
            amp=self.amp,
            augment=data.augment() if data.dataset else Augment(),
        )


@dataclass(frozen=True)
class Compress:
    """Compress a trained network into a predictor of its weights.

    Attributes:
        network: trained weights: a safetensors file, a state dict of torch.save, or the folder that "hyperfast train"
            wrote.
        out: the file to write, such as r20.hf.safetensors.
        model: of the network: resnet20, vgg16_bn, timm:NAME, torchvision:NAME, package.module:function. Not needed
            for the folder of a run.
        option: option of the model, such as shortcut=B; may be given several times. Width, channels and shortcut are
            seen from the weights.
        images: for accuracies, selection and phase 2.
        settings: of the reconstruction.
        guidance: of the second phase.
        start: what an earlier "hyperfast compress" made of the same network: go on from there with --phase2, or with
            more --rounds, under the settings of the reconstruction that it was made with.
        stored: how the predictor is stored: fp32, fp16 or int8.
        folder: where checkpoint and metrics go. Default: OUT.run, beside OUT. A run that is there already, with the
            same settings, is gone on with.
        resume: fail where there is no run to go on with.
    """

    network: tyro.conf.Positional[Path]
    out: Path
    model: str | None = None
    option: Repeated = ()
    images: OptionalData = field(default_factory=OptionalData)
    settings: CompressOptions = field(default_factory=CompressOptions)
    guidance: GuideOptions = field(default_factory=GuideOptions)
    start: Path | None = None
    stored: Literal["fp32", "fp16", "int8"] = "fp32"
    folder: Path | None = None
    resume: bool = False

    @staticmethod
    def help() -> str:
        return """Make a trained network small: a predictor of its weights, in one file that is all one needs.

Examples:
    hyperfast compress resnet20.safetensors --model resnet20 --hidden 180 --out r20.hf.safetensors
    hyperfast compress resnet20.safetensors --model resnet20 --hidden 140 --out r20.hf.safetensors \\
                       --phase2 kd --phase2-epochs 10 --data DIR --dataset cifar10
    hyperfast compress resnet20.safetensors --model resnet20 --start r20.hf.safetensors --out guided.hf.safetensors \\
                       --phase2 kd --teacher resnet56.safetensors --teacher-model resnet56 --data DIR --dataset cifar10
    hyperfast compress resnet20.safetensors --model resnet20 --hidden 300 --out r20.hf.safetensors \\
                       --rounds 5 --seeds 3 --data DIR --dataset cifar10

Without images it reconstructs the weights, and shows how far they are off; with images it also says what that does to
the accuracy. A predictor smaller than the network (hidden 180 for a ResNet-20) loses some, which --phase2 kd wins
back; one that is larger (hidden 300) can gain by --rounds. Either can follow later, with --start. --steps 10000 is a
quick look at a seventh of the time.

Ctrl-C writes a checkpoint; the same command then goes on where it stopped."""

    def run(self, console: Console) -> None:
        """Compress, write the file, and print the table."""
        start = None if self.start is None else Artifact.load(self.start)
        config = self._config()
        if start is not None:
            config = continuation(start, config)
        splits = self._splits()
        trained = load_trained(
            self.network,
            self.model,
            key_values(self.option, "--option"),
            10 if splits is None else len(splits.train.classes),
        )
        if splits is not None and trained.mean is not None and trained.std is not None:
            splits = splits.normalised(trained.mean, trained.std)
        folder = self.out.with_name(f"{self.out.name}.run") if self.folder is None else self.folder
        going_on = (folder / CHECKPOINT).exists()
        if self.resume and not going_on:
            raise FileNotFoundError(f"there is no {CHECKPOINT} in {folder} to resume from; leave --resume out to start")
        if going_on:
            console.print(f"going on with the run in {folder}", style="cyan", markup=False, highlight=False)
        result = compress(
            trained.module,
            config,
            splits,
            self._teacher(trained),
            start=start,
            folder=folder,
            resume=going_on,
            progress=console.is_terminal,
            metadata={
                "model": trained.network.model,
                "classes": trained.network.classes,
                "model_options": dict(trained.network.options),
                "mean": trained.mean,
                "std": trained.std,
            },
        )
        result.artifact.save(self.out, weights=self.stored)
        self._print(result, console)

    def _config(self) -> CompressConfig:
        values: dict[str, Any] = {f.name: getattr(self.settings, f.name) for f in fields(CompressConfig)}
        return CompressConfig(**{**values, "guide": self.guidance.config(self.images)})

    def _splits(self) -> Splits | None:
        if self.images.dataset:
            return self.images.load()
        if self.images.data is not None:
            raise ValueError("--data is given without --dataset; add --dataset cifar10, cifar100 or folder")
        if self.guidance.phase2 is not None and not self.guidance.noise:
            raise ValueError("--phase2 shows images to the network: give --dataset and --data, or --noise")
        return None

    def _teacher(self, network: Trained) -> Any:
        if self.guidance.teacher is None:
            return None
        name = self.guidance.teacher_model or self.model
        given = key_values(self.guidance.teacher_option, "--teacher-option")
        return load_trained(self.guidance.teacher, name, given, network.network.classes).module

    def _print(self, result: CompressResult, console: Console) -> None:
        size = result.artifact.size_report(self.stored)
        ratio = next(iter(size.ratios))
        table = Table(title=str(self.out), title_justify="left", show_header=False)
        table.add_column()
        table.add_column(justify="right")
        for record in result.history if len(result.history) > 1 else ():
            state = "" if record.kept else ", not used"
            table.add_row(f"round {record.round}{state}", f"{percent(record.accuracy)}, RMSE {record.rmse:.5f}")
        table.add_row("RMSE of the weights", f"{result.rmse:.5f}")
        for split, name in (("val", "validation"), ("test", "test")):
            if split in result.original:
                before, after = result.original[split], result.reconstruction[split]
                table.add_row(f"{name} accuracy, original", percent(before))
                table.add_row(f"{name} accuracy, reconstruction", percent(after))
                table.add_row("  the two differ by chance with p", f"{result.mcnemar[split].p_value:.3g}")
        table.add_row(f"predictor parameters / {ratio.against}", f"{ratio.parameters:.3f}")
        table.add_row("  in bytes, permutations included", f"{ratio.with_permutations:.3f}")
        table.add_row("size of the file", f"{self.out.stat().st_size:,} bytes")
        table.add_row(
            "of which predictor, permutations, rest", f"{size.predictor:,}, {size.permutations:,}, {size.kept:,}"
        )
        table.add_row("time", f"{result.seconds / 60:.1f} minutes, {result.steps:,} steps")
        console.print(table)
        console.print(
            f"the network from it: hyperfast reconstruct {self.out} --out network.safetensors",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
