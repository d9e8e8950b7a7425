"""Options that several commands share."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from hyperfast.data import Augment, Splits, default_augment, load
from hyperfast.recipes import TrainConfig

Repeated = tyro.conf.UseAppendAction[tuple[str, ...]]


@dataclass(frozen=True)
class DataOptions:
    """Images.

    Attributes:
        dataset: digits (comes with scikit-learn, needs no files), cifar10, cifar100, or folder (one folder of images
            per class, or train/ and test/ with such folders in them).
        data: folder with the files. For CIFAR the one that holds cifar-10-batches-bin or cifar-10-batches-py (or the
            folders of CIFAR-100) as they come out of the archive.
        val_fraction: part of the training images that is set apart to choose the best epoch by; or, from 1, a number
            of images. The test images are measured once, at the end.
        limit: take at most so many images of each of the three sets, for quick runs.
        allow_missing: CIFAR: do with the batch files that are there.
        size: folder: height and width in pixels to which images are brought.
        channels: folder: 3 (colour) or 1 (grey).
        pad: augmentation: pixels of black around an image, of which a window is cut out at random. Default: 4, for
            digits 1.
        flip: augmentation: mirror images by chance. Default: yes, for digits no.
    """

    dataset: str
    data: Path | None = None
    val_fraction: float = 0.1
    limit: int | None = None
    allow_missing: bool = False
    size: int = 32
    channels: Literal[1, 3] = 3
    pad: int | None = None
    flip: bool | None = None

    def load(self) -> Splits:
        """Read the images."""
        options: dict[str, Any] = {}
        if self.dataset.startswith("cifar"):
            options = {"allow_missing": self.allow_missing}
        elif self.dataset == "folder":
            options = {"size": self.size, "channels": self.channels}
        return load(self.dataset, self.data, val_fraction=self.val_fraction, limit=self.limit, **options)

    def augment(self) -> Augment:
        """The set's own augmentation, with what was asked for otherwise."""
        own = default_augment(self.dataset)
        return Augment(own.pad if self.pad is None else self.pad, own.flip if self.flip is None else self.flip)

    def settings(self) -> dict[str, Any]:
        """What a run depends on; where the files lie is not part of it."""
        return {key: value for key, value in asdict(self).items() if key != "data"}


@dataclass(frozen=True)
class OptionalData(DataOptions):
    """Images, where there are any."""

    dataset: str = ""


@dataclass(frozen=True)
class HypernetOptions:
    """The hypernetwork, where there is one.

    Attributes:
        hidden: widths of its hidden layers. The head has as many values as the network times the last width, so large
            networks want a small one: 16 16 16.
        condition: what it is fed with: constant (0.5), learned, per_layer, per_target (a learned row for each layer or
            parameter), or stochastic (uniform in [0, 1] in training: a family of networks).
        condition_size: values in a row of it.
        encoding: of the condition; cos|sin is magnitude-invariant (MIP).
        activation: of the hidden layers.
        init: hyperlight, bias_hyperinit (starts exactly at theta0), hyperfan_in or hyperfan_out.
        theta0: where theta0 starts: init, the draw of the scheme; model, the weights of the network.
        norm: affine parameters of norm layers: keep them as ordinary parameters, or generate them too.
        select: generate only parameters whose names match (glob, such as "layer3.*"); may be given several times.
    """

    hidden: tuple[int, ...] = (16, 64, 128)
    condition: Literal["constant", "learned", "per_layer", "per_target", "stochastic"] = "constant"
    condition_size: int = 1
    encoding: Literal["cos|sin", "z|1-z", "none"] = "cos|sin"
    activation: Literal["leaky_relu", "relu", "gelu", "tanh"] = "leaky_relu"
    init: Literal["hyperlight", "bias_hyperinit", "hyperfan_in", "hyperfan_out"] = "hyperlight"
    theta0: Literal["init", "model"] = "init"
    norm: Literal["keep", "generate"] = "keep"
    select: Repeated = ()

    def keywords(self) -> dict[str, Any]:
        """As `hyperfast.hypernetize` takes them."""
        return {**asdict(self), "select": list(self.select) or None}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> HypernetOptions:
        """Back from `asdict` and JSON, which has lists for tuples."""
        known = {field.name for field in fields(cls)}
        restored: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known}
        return cls(**restored)


@dataclass(frozen=True)
class TrainOptions(TrainConfig):
    """The settings of `TrainConfig` with its texts; what augmentation suits is a question of the set, `DataOptions`."""

    augment: tyro.conf.Suppress[Augment] = Augment()  # noqa: RUF009 - frozen

    def for_data(self, options: DataOptions) -> TrainConfig:
        """The settings of the run, with the augmentation that suits the set."""
        return replace(self, augment=options.augment())


def key_values(given: Sequence[str], flag: str) -> dict[str, Any]:
    """`("width=8", "shortcut=B")` as a dict; values are Python literals where they can be read as such.

    Raises:
        ValueError: an entry without `=`.
    """
    found: dict[str, Any] = {}
    for entry in given:
        key, separator, value = entry.partition("=")
        if not separator or not key:
            raise ValueError(f"{flag} {entry!r} has no value; write {flag} {key or 'width'}=VALUE")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found

