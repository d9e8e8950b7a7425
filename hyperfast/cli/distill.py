"""`hyperfast distill`."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from hyperfast.cli.network import Network, load_trained
from hyperfast.cli.options import DataOptions, DistillOptions, HypernetOptions, Repeated, TrainOptions, key_values
from hyperfast.cli.session import announce, describe, open_folder, options, percent, summarise
from hyperfast.data import DeviceLoader
from hyperfast.recipes import TrainConfig, distill, evaluate

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from hyperfast.data import ImageSet, Splits


class Teacher(NamedTuple):
    """A teacher, and what its file says about the images it was trained on (None: nothing)."""

    model: nn.Module
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


@dataclass(frozen=True)
class Distill:
    """Train a student with the help of a teacher.

    Attributes:
        images: what to learn from.
        model: of the student; see "hyperfast train --help".
        teacher: trained weights: a safetensors file, a state dict of torch.save, or the folder that "hyperfast train"
            wrote. Where the file names mean and std of its images, they are used for student and teacher.
        loss: what the student follows the teacher by; may be given several times. at=200 has another weight, ab@0:0.3
            counts in the first 30 % of the training. At the stages: at (attention transfer, weight 1000, the
            default), cwd (channel-wise distillation, 3), fitnets (squared difference over the teacher's variance, 1),
            fsp (flow of solution, 50), ft (factor transfer, 200), sp (similarity preserving, 3000). At the activations:
            ab (activation boundary, 10), fmd (NeRN's feature maps, 1). At the embedding: rkd (relational, 1). And
            jacobian (gradients of the logits by the images, 20), kd (softened logits, 1). Between architectures: hcd
            (complementary distillation, 1, in the place of the labels' loss, which is part of it), hcd_stable (the same
            with gentler settings), ofa (exits behind the stages, 1), ickd (channels that go together, 2.5), hcl (pooled
            differences, 1), icd (alike cells, 1), frequency (magnitudes, 1); at the embedding infonce (contrast, 1),
            wcord (transport, 1); at the logits sinkd (transport, 0.0008).
        teacher_model: of the teacher. Default: that of --model, or what the run's own notes say.
        teacher_option: option of the teacher, such as shortcut=B or width=32; may be given several times. By default
            shortcut, width and channels of ResNets and VGGs are seen from the weights.
        shortcut: of both, for ResNets: A (no parameters) or B (1x1 convolution). Default: as in the teacher's weights.
        option: option of the student, such as width=8; may be given several times. Where teacher and student have the
            same model, the student's options are by default those of the teacher.
        hypernetize: generate the student's weights from a hypernetwork; --no-hypernetize trains an ordinary student.
        hypernet: options of the hypernetwork.
        comparison: how it follows it.
        training: settings of the training.
        out: folder of the run. Default: runs/distill-DATASET-MODEL, numbered where that holds a run with other
            settings. A run that is there already, with the same settings, is gone on with.
        resume: fail where there is no run to go on with.
        tensorboard: write TensorBoard events to OUT/tensorboard (extra 'tensorboard').
    """

    images: DataOptions
    model: str
    teacher: Path
    loss: Repeated = ()
    teacher_model: str | None = None
    teacher_option: Repeated = ()
    shortcut: Literal["A", "B"] | None = None
    option: Repeated = ()
    hypernetize: bool = True
    hypernet: HypernetOptions = field(default_factory=HypernetOptions)
    comparison: DistillOptions = field(default_factory=DistillOptions)
    training: TrainOptions = field(default_factory=TrainOptions)
    out: Path | None = None
    resume: bool = False
    tensorboard: bool = False

    @staticmethod
    def help() -> str:
        return """Train a student, whose weights come from a hypernetwork, with the help of a trained teacher.

Examples:
    hyperfast distill --dataset cifar10 --data DIR --model resnet20 --teacher cifar10_resnet20.safetensors \\
                      --loss at --epochs 3
    hyperfast distill --dataset cifar10 --data DIR --model resnet20 --teacher resnet56.pt --teacher-model resnet56 \\
                      --loss at=500 --loss kd=0.9
    hyperfast distill --dataset digits --model resnet8 --teacher runs/train-digits-resnet8 --loss kd --epochs 10

The teacher is measured first; one that only guesses is an error. What OUT holds, and how Ctrl-C and going on work, is
as in "hyperfast train"."""

    def run(self, console: Console) -> None:
        """Measure the teacher, train the student, and print the table."""
        config = self.training.for_data(self.images)
        distillation = self.comparison.config(self.loss or ("at",))
        splits, spec, teacher, network = self._prepare(console)
        student = network.build(config.seed)
        judge, accuracy = measure_teacher(teacher.model, splits, config)
        console.print(f"teacher: {spec.model}, {percent(accuracy)} on the {judge} images", highlight=False)
        run = describe(
            network,
            splits,
            config,
            command="distill",
            data=self.images.settings(),
            teacher={"network": asdict(spec), "sha256": _digest(self.teacher)},
            distillation=asdict(distillation),
        )
        name = f"distill-{self.images.dataset}-{self.model.replace(':', '-')}"
        folder = open_folder(run, self.out, name, self.resume, console)
        announce(network, student, splits, console)
        how = options(folder, self.tensorboard, console)
        result = distill(student, teacher.model, splits, config, distillation, **how)
        accuracies = {judge: accuracy}
        if len(splits.test) and judge != "test":
            accuracies["test"] = _accuracy(teacher.model, splits.test, config)
        summarise(result, folder, console, {f"teacher, {name} accuracy": share for name, share in accuracies.items()})

    def _prepare(self, console: Console) -> tuple[Splits, Network, Teacher, Network]:
        """The images, the teacher's network, the teacher, the student's network."""
        splits = self.images.load()
        spec, teacher = self._teacher(splits)
        check_fits(spec, splits)
        if teacher.mean is not None and teacher.std is not None:
            splits = splits.normalised(teacher.mean, teacher.std)
            console.print(
                f"images are normalised as the teacher's file says: mean {_short(teacher.mean)}, "
                f"std {_short(teacher.std)}",
                markup=False,
                highlight=False,
            )
        return splits, spec, teacher, self._student(spec, splits)

    def _teacher(self, splits: Splits) -> tuple[Network, Teacher]:
        """Build the teacher from its file, or from the run that it is part of."""
        given = {} if self.shortcut is None else {"shortcut": self.shortcut}
        given |= key_values(self.teacher_option, "--teacher-option")
        name = self.teacher_model or self.model
        trained = load_trained(self.teacher, name, given, len(splits.train.classes))
        channels = splits.train.images.shape[1]
        for key, values in (("mean", trained.mean), ("std", trained.std)):
            if values is not None and len(values) != channels:
                raise ValueError(
                    f"{self.teacher}: its metadata give {key} for {len(values)} channels; the images have {channels}"
                )
        return trained.network, Teacher(trained.module, trained.mean, trained.std)

    def _student(self, teacher: Network, splits: Splits) -> Network:
        channels = splits.train.images.shape[1]
        inherited = dict(teacher.options) if teacher.model == self.model else {}
        if not inherited and channels != 3:
            inherited["in_channels"] = channels
        if self.shortcut is not None:
            inherited["shortcut"] = self.shortcut
        model_options = inherited | key_values(self.option, "--option")
        hypernet = self.hypernet if self.hypernetize else None
        # As many logits as the teacher has, so that they can be compared.
        return Network(self.model, max(teacher.classes, len(splits.train.classes)), model_options, hypernet)


def measure_teacher(teacher: nn.Module, splits: Splits, config: TrainConfig) -> tuple[str, float]:
    """Its accuracy on the validation images; on the test images where there are none.

    A teacher may well have been trained on the images that are set apart for validation here.

    Returns:
        Which images, `"validation"` or `"test"`, and the share that it gets right.

    Raises:
        ValueError: it is no better than guessing: at most three standard deviations above the share of the most
            frequent class.
    """
    name, images = ("validation", splits.val) if len(splits.val) else ("test", splits.test)
    accuracy = _accuracy(teacher, images, config)
    chance = float(images.labels.bincount().max()) / len(images)
    if accuracy <= chance + 3 * (chance * (1 - chance) / len(images)) ** 0.5:
        raise ValueError(
            f"the teacher has {percent(accuracy)} on the {len(images):,} {name} images, where guessing has "
            f"{percent(chance)}: there is nothing to learn from it. Its weights may be of another dataset or order of "
            "classes, or its images normalised otherwise"
        )
    return name, accuracy


def check_fits(teacher: Network, splits: Splits) -> None:
    """Raise a ValueError unless a teacher has as many classes and channels as the images."""
    classes, channels = len(splits.train.classes), splits.train.images.shape[1]
    if teacher.classes < classes:
        raise ValueError(f"the teacher tells {teacher.classes} classes apart; the images have {classes}")
    wanted = teacher.options.get("in_channels", channels)
    if wanted != channels:
        raise ValueError(f"the teacher takes images of {wanted} channels; these have {channels}")


def _accuracy(teacher: nn.Module, images: ImageSet, config: TrainConfig) -> float:
    device = config.torch_device()
    loader = DeviceLoader(images, config.batch_size, device=device, train=False)
    return evaluate(teacher.to(device), loader.epoch(), device, config.amp).accuracy


def _short(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def _digest(path: Path) -> str:
    """sha256 of the teacher's file: a run goes on with the same teacher only."""
    file = path / "best.safetensors" if path.is_dir() else path
    return hashlib.sha256(file.read_bytes()).hexdigest()
