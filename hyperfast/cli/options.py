"""Options that several commands share."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from hyperfast.cli.suggest import nearest
from hyperfast.data import Augment, Splits, default_augment, load
from hyperfast.recipes import METHODS, DistillConfig, LossTerm, TapWeights, TrainConfig

Repeated = tyro.conf.UseAppendAction[tuple[str, ...]]
_KD_WEIGHT = 1.0


def _widths(given: list[str]) -> tuple[int, ...]:
    """`16 64 128` and `16,64,128`."""
    return tuple(int(width) for entry in given for width in entry.split(",") if width)


Widths = Annotated[
    tuple[int, ...],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="INT [INT ...]",
        instance_from_str=_widths,
        is_instance=lambda value: isinstance(value, tuple) and all(isinstance(width, int) for width in value),
        str_from_instance=lambda widths: [str(width) for width in widths],
    ),
]


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
        hidden: widths of its hidden layers, as 16 64 128 or 16,64,128. The head has as many values as the network times
            the last width, so large networks want a small one: 16,16,16.
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

    hidden: Widths = (16, 64, 128)
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


@dataclass(frozen=True)
class DistillOptions:
    """What the student is compared by, besides the losses.

    Attributes:
        cross_entropy_weight: weight of the labels; 0 leaves them out.
        labels_from: share of the training from which on the labels count, such as 0.3.
        temperature: of the softened logits.
        taps: where the feature maps are read: stages, activations, embedding, logits, or a glob over module paths; may
            be given several times. Default: where each loss is meant to.
        teacher_taps: the same for a teacher whose modules have other names.
        tap_weight: weight of a feature map in all losses, as layer1=0.5; then every one is to be named. Default: all
            alike.
        schedule: shares of the feature maps in a loss: uniform, or travelling (from the first to the last).
        connector: auto puts a trained layer between maps of unequal shapes; always between all; none is an error there.
        pretrain_paraphraser: loss ft: epochs in which paraphrasers learn the teacher's maps first, 20 in the paper.
            Without, ft compares the maps themselves.
        cache_teacher: run the teacher once and keep what the losses need of it, for at, ab, fsp and kd on images that
            are not augmented (--pad 0 --no-flip).
    """

    cross_entropy_weight: float = 1.0
    labels_from: float = 0.0
    temperature: float = 4.0
    taps: Repeated = ()
    teacher_taps: Repeated = ()
    tap_weight: Repeated = ()
    schedule: Literal["uniform", "travelling"] = "uniform"
    connector: Literal["auto", "always", "none"] = "auto"
    pretrain_paraphraser: float = 0.0
    cache_teacher: bool = False

    def config(self, losses: Sequence[str]) -> DistillConfig:
        """As the recipe takes it, with `losses` such as `("at", "ab=10@0:0.3", "kd=0.9")`.

        Raises:
            ValueError: see `parse_losses`; tap weights that are no numbers.
        """
        terms = parse_losses(losses)
        kd = terms.pop("kd", None)
        weights = {name: _number(text, f"--tap-weight {name}={text}") for name, text in _pairs(self.tap_weight)}
        options = {"weights": weights} if weights else {}
        return DistillConfig(
            losses={name: replace(term, options=options, connector=self.connector) for name, term in terms.items()},
            cross_entropy_weight=self.cross_entropy_weight,
            labels_from=self.labels_from,
            kd_weight=0.0 if kd is None else _KD_WEIGHT if kd.beta is None else kd.beta,
            temperature=self.temperature,
            at=_globs(self.taps),
            teacher_at=_globs(self.teacher_taps),
            tap_weights=TapWeights(self.schedule),
            paraphraser_epochs=self.pretrain_paraphraser if "ft" in terms else 0.0,
            cache_teacher=self.cache_teacher,
        )


def parse_losses(given: Sequence[str]) -> dict[str, LossTerm]:
    """`("at", "ab=10@0:0.3", "kd=0.9")` by name; a weight that is left out is that of the method.

    Raises:
        ValueError: an unknown name, a name given twice, a weight that is no positive number, a span that is none.
    """
    known = (*METHODS, "kd")
    terms: dict[str, LossTerm] = {}
    for entry in given:
        head, at, span = entry.partition("@")
        name, equals, weight = head.partition("=")
        if name not in known:
            raise ValueError(f"unknown loss {name!r}{nearest(name, known)}; choose from {', '.join(known)}")
        if name in terms:
            raise ValueError(f"--loss {name} is given more than once")
        beta = _number(weight, f"--loss {entry}") if equals else None
        if beta is not None and not 0 < beta < float("inf"):
            raise ValueError(f"--loss {entry}: the weight must be a positive number")
        if at and name == "kd":
            raise ValueError(f"--loss {entry}: kd counts throughout; give a part of the training to the other losses")
        terms[name] = LossTerm(beta, span=_span(span, entry)) if at else LossTerm(beta)
    return terms


def _span(given: str, entry: str) -> tuple[float, float]:
    start, colon, end = given.partition(":")
    if not colon:
        raise ValueError(f"--loss {entry}: {given!r} is no part of the training; write @0:0.3 for its first 30 %")
    return _number(start or "0", f"--loss {entry}"), _number(end or "1", f"--loss {entry}")


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{where}: {text!r} is no number") from None


def _pairs(given: Sequence[str]) -> list[tuple[str, str]]:
    pairs = [(name, value) for name, equals, value in (entry.rpartition("=") for entry in given) if equals and name]
    if len(pairs) != len(given):
        raise ValueError(f"--tap-weight {' '.join(given)}: write NAME=WEIGHT, such as layer1=0.5")
    return pairs


def _globs(taps: Sequence[str]) -> str | list[str] | None:
    return None if not taps else taps[0] if len(taps) == 1 else list(taps)


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

