"""`hyperfast analyze`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from hyperfast.analysis import StudyConfig, network_report, study_steps
from hyperfast.cli.network import Trained, load_trained
from hyperfast.cli.options import OptionalData, Repeated, key_values
from hyperfast.cli.session import percent
from hyperfast.recipes import Artifact, TrainConfig
from hyperfast.recipes.progress import progress_bar

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from hyperfast.analysis.network_study import NetworkStudy
    from hyperfast.data import Splits

_IMAGES_ON_CPU = 1000
_COLOURS = 3
_REPORT = "report.html"
_ORIGINAL = "original"


@dataclass(frozen=True)
class StudyOptions(StudyConfig):
    """The settings of `StudyConfig` with its texts; how many images is asked for by the command itself."""

    images: tyro.conf.Suppress[int] = StudyConfig.images


@dataclass(frozen=True)
class Analyze:
    """Compare a network with what was reconstructed from it.

    Attributes:
        network: the original: a safetensors file, a state dict of torch.save, or the folder that "hyperfast train"
            wrote.
        artifacts: compressed files that "hyperfast compress" made of it, in the order in which they are shown.
        out: folder for report.html and the tables as CSV files.
        data: test images for accuracies, attacks and corruptions, training images for a second landscape. Without
            --dataset only the weights are compared.
        model: of the network: resnet20, vgg16_bn, timm:NAME, torchvision:NAME, package.module:function. Default: what
            the first compressed file says.
        option: option of the model, such as shortcut=B; may be given several times.
        images: how many test images are shown, evenly spread. Default: 1000 on the CPU, all on a GPU.
        study: what is measured, and how finely.
        device: auto (a GPU where there is one), cpu, cuda, cuda:1.
        force: replace a report that is there already.
    """

    network: tyro.conf.Positional[Path]
    artifacts: tyro.conf.Positional[tuple[Path, ...]]
    out: Path
    data: OptionalData = field(default_factory=OptionalData)
    model: str | None = None
    option: Repeated = ()
    images: int | None = None
    study: StudyOptions = field(default_factory=StudyOptions)
    device: str = "auto"
    force: bool = False

    @staticmethod
    def help() -> str:
        return """Compare a network with what was reconstructed from it, in numbers and pictures.

Examples:
    hyperfast analyze resnet20.safetensors r20.hf.safetensors --out report
    hyperfast analyze resnet20.safetensors r20.hf.safetensors --data DIR --dataset cifar10 --out report
    hyperfast analyze resnet20.safetensors round1.hf.safetensors round5.hf.safetensors --blocks layer1.0 \\
                      --data DIR --dataset cifar10 --images 5000 --out report

Weights alone: differences and spectra of every layer. With images: accuracies with a paired test, also with int8
weights, the line from the original to each reconstruction, adversarial and corrupted images, spectra of --blocks
modulated, and, from two compressed files on, the loss landscape. On two cores and 1000 images this takes minutes for
a ResNet-20; --grid 0, --steps 0 and fewer --severities make it shorter."""

    def run(self, console: Console) -> None:
        """Load, measure, write, and print the summary."""
        if not self.artifacts:
            raise ValueError("no compressed file is given; name one or more after the network")
        if (self.out / _REPORT).exists() and not self.force:
            raise ValueError(f"{self.out / _REPORT} is there already; give another --out, or --force to replace it")
        if self.images is not None and self.images < 1:
            raise ValueError(f"--images is {self.images}; give at least 1")
        device = TrainConfig(device=self.device).torch_device()
        artifacts = {name: Artifact.load(path) for name, path in _named(self.artifacts).items()}
        splits = self._splits()
        original = self._original(next(iter(artifacts.values())), splits)
        networks = {name: _reconstructed(artifact, original, name) for name, artifact in artifacts.items()}
        for network in (original.module, *networks.values()):
            network.to(device)
        config = self._config(device.type)
        if splits is not None and splits.test.images.shape[1] != _COLOURS and config.corruptions:
            console.print("the images have no colours: corruptions are left out", style="yellow")
            config = replace(config, corruptions=())
        if splits is not None and original.mean is not None and original.std is not None:
            splits = splits.normalised(original.mean, original.std)
        sets = 1 if splits is None or not len(splits.train) else 2
        steps = study_steps(len(networks), config, with_data=splits is not None, sets=sets)
        with progress_bar(console.is_terminal, steps) as update:
            result = network_report(
                original.module,
                networks,
                None if splits is None else splits.test,
                train=splits.train if splits is not None and sets == 2 else None,
                out=self.out,
                config=config,
                facts=self._facts(original, artifacts),
                progress=update,
            )
        _summarise(result, console)
        console.print(f"{self.out / _REPORT}", markup=False, highlight=False, soft_wrap=True)

    def _splits(self) -> Splits | None:
        if self.data.dataset:
            return self.data.load()
        if self.data.data is not None:
            raise ValueError("--data is given without --dataset; add --dataset cifar10, cifar100 or folder")
        return None

    def _original(self, artifact: Artifact, splits: Splits | None) -> Trained:
        known: Mapping[str, Any] = artifact.metadata
        name = self.model or known.get("model")
        inherited = dict(known.get("model_options") or {}) if name == known.get("model") else {}
        classes = 10 if splits is None else len(splits.train.classes)
        options = inherited | key_values(self.option, "--option")
        try:
            return load_trained(self.network, name, options, known.get("classes") or classes)
        except ValueError as error:
            if name is None:
                raise ValueError(f"{self.artifacts[0]} does not say of which model it is; give --model") from error
            raise

    def _config(self, device: str) -> StudyConfig:
        images = self.images
        if images is None:
            images = _IMAGES_ON_CPU if device == "cpu" else StudyConfig.images
        return replace(self.study, images=images, plane_images=min(images, self.study.plane_images))

    def _facts(self, original: Trained, artifacts: Mapping[str, Artifact]) -> dict[str, object]:
        count = sum(parameter.numel() for parameter in original.module.parameters())
        facts: dict[str, object] = {_ORIGINAL: f"{self.network}, {original.network.model}, {count:,} parameters"}
        for (name, artifact), path in zip(artifacts.items(), self.artifacts, strict=True):
            size = artifact.size_report()
            ratio = size.ratios[0]
            facts[name] = (
                f"{path.stat().st_size:,} bytes; predictor of {size.parameters:,} parameters in {size.stored_as}, "
                f"{ratio.stored:.3f} of the {ratio.against} in float32, {ratio.with_permutations:.3f} with permutations"
            )
        return facts


def _named(paths: tuple[Path, ...]) -> dict[str, Path]:
    """By short names, where those tell them apart; in order.

    Raises:
        ValueError: a file is given twice.
    """
    twice = [path for index, path in enumerate(paths) if path in paths[:index]]
    if twice:
        raise ValueError(f"{twice[0]} is given twice")
    short = [path.name.removesuffix(".safetensors").removesuffix(".hf") for path in paths]
    clear = len(set(short)) == len(short) and _ORIGINAL not in short
    return dict(zip(short if clear else map(str, paths), paths, strict=True))


def _reconstructed(artifact: Artifact, original: Trained, name: str) -> nn.Module:
    module = copy.deepcopy(original.module)
    try:
        artifact.load_into(module)
    except ValueError as error:
        raise ValueError(f"{name} was not made from this {original.network.model}: {error}") from error
    return module


def _summarise(result: NetworkStudy, console: Console) -> None:
    for name, rmse in result.rmse.items():
        line = f"{name}: RMSE {rmse:.5f}"
        if name in result.answers:
            before, after = (percent(result.answers[network].accuracy) for network in (_ORIGINAL, name))
            line += f", accuracy {after} (original {before}, p {result.tests[name].p_value:.3g})"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
