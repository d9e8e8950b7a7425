"""A network as the command line describes it, so that `run.json` can build it again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hyperfast
from hyperfast import models
from hyperfast.cli.options import HypernetOptions
from hyperfast.nn import build_inherited, check_gates
from hyperfast.recipes import checkpoint

RUN = "run.json"
_OF_RUN = ("best.safetensors", "last.safetensors", "checkpoint.safetensors")
_CLASSIFIERS = ("fc", "linear", "classifier", "classifier.1", "classifier.6")
# The first convolution of hyperfast's own models: ResNet, VGG, MobileNet, ShuffleNet, RepVGG, fused RepVGG and the
# networks over patches.
_STEMS = ("conv1", "features.0", "features.0.0", "conv1.0", "stage0.rbr_dense.conv", "stage0.rbr_reparam", "embed")


@dataclass(frozen=True)
class Network:
    """What a network is built from.

    Attributes:
        model: name for `hyperfast.models.create`.
        classes: width of the logits.
        options: of the model.
        hypernet: of the hypernetwork; None for an ordinary network.
        inherited: layers of low rank, as `nn.inherited_layers` describes them; None: the layers of the model.
    """

    model: str
    classes: int
    options: Mapping[str, Any] = field(default_factory=dict)
    hypernet: HypernetOptions | None = None
    inherited: Mapping[str, Any] | None = None

    def build(self, seed: int, weights: Path | None = None) -> nn.Module:
        """A freshly initialised network; the global random state is left as it was.

        Args:
            seed: of the initialisation.
            weights: file to start from; a hypernetwork then has them as theta0.

        Raises:
            ValueError: unknown names or options; weights that do not fit.
        """
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            try:
                model = models.create(self.model, self.classes, **self.options)
            except (TypeError, AttributeError) as error:
                raise ValueError(f"model {self.model!r} cannot be made: {error}") from error
            if self.inherited is not None:
                build_inherited(model, self.inherited)
            if weights is not None:
                models.load_weights(model, weights)
            if self.hypernet is None:
                return model
            keywords = self.hypernet.keywords() | ({"theta0": "model"} if weights is not None else {})
            return hyperfast.hypernetize(model, **keywords)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Network:
        """Back from `asdict` and JSON."""
        hypernet = values["hypernet"]
        return cls(
            values["model"],
            values["classes"],
            values["options"],
            None if hypernet is None else HypernetOptions.from_json(hypernet),
            values.get("inherited"),
        )

    def metadata(self) -> dict[str, str]:
        """What a file of its weights says about it; all that `load_trained` needs where layers are inherited."""
        known = {"model": self.model, "classes": str(self.classes)}
        if self.inherited is None:
            return known
        return known | {"options": json.dumps(dict(self.options)), "inherited": json.dumps(self.inherited)}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], path: Path) -> Network | None:
        """The network of a file with inherited layers; None of another file.

        Raises:
            ValueError: the metadata are damaged.
        """
        if "inherited" not in metadata:
            return None
        try:
            options, inherited = json.loads(metadata["options"]), json.loads(metadata["inherited"])
            return cls(metadata["model"], int(metadata["classes"]), options, None, inherited)
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{path} is damaged: what it says about its inherited layers is unreadable ({error!r})"
            ) from error


@dataclass(frozen=True)
class Run:
    """What `run.json` says about a run.

    Attributes:
        network: what was trained.
        image: shape `(C, H, W)` of its images.
        mean: that its images are normalised with.
        std: likewise.
        settings: everything else that the run depends on, to tell whether two runs are the same.
    """

    network: Network
    image: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    settings: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """As it comes back from the file."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    def save(self, folder: Path) -> None:
        """Write `folder/run.json`."""
        checkpoint.write_json(folder / RUN, self.to_json())

    @classmethod
    def load(cls, folder: Path) -> Run:
        """Read `folder/run.json`.

        Raises:
            FileNotFoundError: there is none.
            ValueError: hyperfast did not write it.
        """
        path = folder / RUN
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no {RUN} in {folder}: hyperfast train and distill write it beside their weights, and "
                "without it the network cannot be built again. Keep the two together"
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            height_first = tuple(int(size) for size in values["image"])
            channels, height, width = height_first
            return cls(
                Network.from_json(values["network"]),
                (channels, height, width),
                tuple(values["mean"]),
                tuple(values["std"]),
                values["settings"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged or was not written by this hyperfast ({error!r})") from error


def load_run(path: Path) -> tuple[Run, nn.Module]:
    """The network of a run with its weights, in eval mode.

    Args:
        path: the folder of a run (its best weights), or one of the safetensors files in it.

    Raises:
        FileNotFoundError: no such file, or no `run.json` beside it.
        ValueError: a file that is cut short, that hyperfast did not write, or that is of another network.
    """
    if path.is_dir():
        path = path / "best.safetensors"
    saved = checkpoint.load(path)
    run = Run.load(path.parent)
    network = run.network.build(seed=0)
    weights = saved.section("best") if saved.metadata.get("kind") == "training" else saved.tensors
    if not weights:
        raise ValueError(f"{path} is from before the end of the first epoch: there are no best weights in it yet")
    check_gates(network, weights, str(path))
    checkpoint.load_module(network, weights, str(path))
    return run, network.eval()


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained network, and what its file says about the images it was trained on (None: nothing)."""

    network: Network
    module: nn.Module
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


def load_trained(path: Path, name: str | None, given: Mapping[str, Any], classes: int = 10) -> Trained:
    """A trained network from a run of `hyperfast train`, or from a file of weights.

    Args:
        path: folder of a run or one of the files in it; a safetensors file; a state dict of torch.save.
        name: of the model; a run's own notes say it, and a file with inherited layers, whose word counts.
        given: options of the model, beside those that are seen from the weights.
        classes: where they are not seen from the weights.

    Raises:
        ValueError: `name` is missing; weights that do not fit.
    """
    folder = path if path.is_dir() else path.parent
    if (path.is_dir() or path.name in _OF_RUN) and (folder / RUN).exists():
        run, module = load_run(path)
        return Trained(run.network, module, run.mean, run.std)
    saved = models.read_checkpoint(path)
    network = Network.from_metadata(saved.metadata, path)
    if network is None:
        if name is None:
            raise ValueError(f"{path} does not say of which model it is; give its name, such as resnet20")
        network = Network(name, classes_in(saved.tensors) or classes, options_in(saved.tensors, name) | dict(given))
    module = network.build(seed=0)
    check_gates(module, saved.tensors, str(path))
    metadata = models.load_weights(module, path)
    mean, std = (numbers_in(metadata, key, path) for key in ("mean", "std"))
    return Trained(network, module.eval(), mean, std)


def numbers_in(metadata: Mapping[str, str], key: str, path: Path) -> tuple[float, ...] | None:
    """`"0.485,0.456,0.406"` as numbers; None where the file says nothing."""
    if key not in metadata:
        return None
    try:
        return tuple(float(value) for value in metadata[key].strip("[]() ").split(","))
    except ValueError:
        raise ValueError(f"{path}: its metadata say {key} is {metadata[key]!r}, which are no numbers") from None


def options_in(tensors: Mapping[str, Tensor], model: str) -> dict[str, Any]:
    """Options of one of hyperfast's own models that are seen from the weights of a file."""
    if model not in models.names():
        return {}
    first = next((tensors[f"{stem}.weight"] for stem in _STEMS if f"{stem}.weight" in tensors), None)
    if first is None or first.ndim != 4:
        return {}
    options: dict[str, Any] = {"width": first.shape[0], "in_channels": first.shape[1]}
    if model.startswith("resnet"):
        options["shortcut"] = "B" if any(".downsample." in name for name in tensors) else "A"
    if model.startswith("repvgg"):
        options["deploy"] = "stage0.rbr_reparam.weight" in tensors
    if model.startswith(("vit", "mixer")):
        options |= _options_of_patches(tensors, first.shape[-1])
    return options


def _options_of_patches(tensors: Mapping[str, Tensor], patch: int) -> dict[str, Any]:
    """Options of a network over patches; how many heads there are is not seen."""
    if "positions" in tensors:
        tokens = tensors["positions"].shape[1]
    else:
        tokens = tensors["stages.0.0.token_mlp.0.weight"].shape[1]
    depth = sum(name.startswith("stages.") and name.endswith(".norm1.weight") for name in tensors)
    return {"patch": patch, "depth": depth, "image_size": patch * math.isqrt(tokens)}


def classes_in(tensors: Mapping[str, Tensor]) -> int | None:
    """Width of the logits, where the last layer has one of the usual names."""
    for name in _CLASSIFIERS:
        if f"{name}.weight" in tensors:
            return int(tensors[f"{name}.weight"].shape[0])
    return None
