"""CIFAR-10 and CIFAR-100 from the files of https://www.cs.toronto.edu/~kriz/cifar.html, binary or pickled."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from hyperfast.data.dataset import ImageSet, Splits
from hyperfast.data.unpickle import RefusedPickle, load_arrays

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["read_cifar"]

_PIXELS = 3 * 32 * 32
_log = logging.getLogger(__name__)

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class _Layout:
    """Where one of the two official layouts of a set keeps its images."""

    folder: str
    train: tuple[str, ...]
    test: str


@dataclass(frozen=True)
class _Cifar:
    """What is fixed about one of the two sets."""

    title: str
    classes: tuple[str, ...]
    coarse_classes: int  # 0: the records have no coarse label
    train_images: int
    test_images: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    binary: _Layout
    pickled: _Layout
    label_key: str


_BATCHES = tuple(f"data_batch_{k}" for k in range(1, 6))

_CIFAR10 = _Cifar(
    title="CIFAR-10",
    classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    coarse_classes=0,
    train_images=50_000,
    test_images=10_000,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    binary=_Layout("cifar-10-batches-bin", tuple(f"{batch}.bin" for batch in _BATCHES), "test_batch.bin"),
    pickled=_Layout("cifar-10-batches-py", _BATCHES, "test_batch"),
    label_key="labels",
)

_CIFAR100_CLASSES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""

_CIFAR100 = _Cifar(
    title="CIFAR-100",
    classes=tuple(_CIFAR100_CLASSES.split()),
    coarse_classes=20,
    train_images=50_000,
    test_images=10_000,
    mean=(0.5070, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2761),
    binary=_Layout("cifar-100-binary", ("train.bin",), "test.bin"),
    pickled=_Layout("cifar-100-python", ("train",), "test"),
    label_key="fine_labels",
)


def read_cifar(root: str | Path | None, classes: int = 10, *, allow_missing: bool = False) -> Splits:
    """Read CIFAR in whichever official layout is there; where both are, the binary one.

    Pickled files are read by an unpickler that runs nothing (`hyperfast.data.unpickle`).

    Args:
        root: the folder that holds `cifar-10-batches-bin` or `cifar-10-batches-py` (`cifar-100-binary` or
            `cifar-100-python`), or that folder itself.
        classes: 10 or 100.
        allow_missing: go on, with a warning, where some of CIFAR-10's five training batches are not there.

    Returns:
        Splits with images `[N, 3, 32, 32]` in the order of the files, and no validation images; `load` sets some
        apart. `mean` and `std` are those of the 50,000 training images. A file of whole records but fewer than the
        official number is taken as a deliberate subset, with a warning.

    Raises:
        FileNotFoundError: the set, or part of it, is not there; lists what was looked for.
        ValueError: a file that is cut short, labels out of range, or a pickle that asks for more than arrays.
    """
    if classes not in (10, 100):
        raise ValueError(f"classes is {classes}; CIFAR has 10 or 100")
    return _read(_CIFAR10 if classes == 10 else _CIFAR100, root, allow_missing)


def _read(cifar: _Cifar, root: str | Path | None, allow_missing: bool) -> Splits:
    folder, layout = _find(cifar, root)
    read = _read_binary if layout is cifar.binary else _read_pickled
    test_path, train_paths = folder / layout.test, [folder / name for name in layout.train]
    present = [path for path in train_paths if path.is_file()]
    missing = [path.name for path in train_paths if not path.is_file()]
    if not test_path.is_file():
        raise FileNotFoundError(f"{cifar.title} in {folder} has no {layout.test}")
    if not present or (missing and not allow_missing):
        choice = "; pass allow_missing=True to train on the batches that are there" if present else ""
        raise FileNotFoundError(f"{cifar.title} in {folder} has no {', '.join(missing)}{choice}")
    if missing:
        _log.warning("%s in %s: going on without %s", cifar.title, folder, ", ".join(missing))
    parts = [read(path, cifar) for path in present]
    if not missing:
        _warn_if_fewer(cifar, folder, "training", sum(len(labels) for _, labels in parts), cifar.train_images)
    test = read(test_path, cifar)
    _warn_if_fewer(cifar, folder, "test", len(test[1]), cifar.test_images)
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Splits(
        _image_set(cifar, images, labels), _image_set(cifar, images[:0], labels[:0]), _image_set(cifar, *test)
    )


def _find(cifar: _Cifar, root: str | Path | None) -> tuple[Path, _Layout]:
    layouts = (cifar.binary, cifar.pickled)
    if root is None:
        raise FileNotFoundError(
            f"{cifar.title} needs root, the folder that holds {' or '.join(layout.folder for layout in layouts)}"
        )
    looked_for = []
    for layout in layouts:
        for folder in (Path(root) / layout.folder, Path(root)):
            if any((folder / name).is_file() for name in (*layout.train, layout.test)):
                return folder, layout
            looked_for.append(str(folder / layout.train[0]))
    raise FileNotFoundError(
        f"no {cifar.title} at {root}; looked for {', '.join(looked_for)}. "
        "Unpack the archive from https://www.cs.toronto.edu/~kriz/cifar.html there."
    )


def _read_binary(path: Path, cifar: _Cifar) -> tuple[Array, Array]:
    """Images `[N, 3072]` and labels `[N]`: a record is a coarse label (CIFAR-100 only), the label and the pixels."""
    columns = 2 if cifar.coarse_classes else 1
    record = columns + _PIXELS
    content = np.fromfile(path, np.uint8)
    if not len(content) or len(content) % record:
        whole, rest = divmod(len(content), record)
        raise ValueError(
            f"{path} is cut short: {len(content):,} bytes are {whole:,} records of {record:,} bytes and {rest:,} more"
        )
    records = content.reshape(-1, record)
    if cifar.coarse_classes:
        _check_labels(path, "coarse label", records[:, 0], cifar.coarse_classes)
    labels = records[:, columns - 1]
    _check_labels(path, "label", labels, len(cifar.classes))
    return records[:, columns:], labels


def _read_pickled(path: Path, cifar: _Cifar) -> tuple[Array, Array]:
    """Images `[N, 3072]` and labels `[N]` of a pickled dict with keys that are strings or bytes."""
    try:
        content = load_arrays(path.read_bytes())
    except (RefusedPickle, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a {type(content).__name__}; expected a dict with 'data' and '{cifar.label_key}'"
        )
    entries = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in content.items()}
    for key in ("data", cifar.label_key):
        if key not in entries:
            raise ValueError(f"{path} has no '{key}'; it has {', '.join(map(str, entries)) or 'nothing'}")
    images, labels = entries["data"], _label_array(path, entries[cifar.label_key])
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape != (len(labels), _PIXELS):
        given = f"{images.dtype} {list(images.shape)}" if isinstance(images, np.ndarray) else type(images).__name__
        raise ValueError(f"{path}: 'data' is {given}; expected uint8 [{len(labels)}, {_PIXELS}], one row per label")
    _check_labels(path, "label", labels, len(cifar.classes))
    return images, labels


def _label_array(path: Path, labels: object) -> Array:
    given: Array
    if isinstance(labels, np.ndarray):
        given = labels
    elif isinstance(labels, list) and labels and all(type(label) is int for label in labels):
        given = np.asarray(labels)
    else:
        raise ValueError(f"{path}: the labels are a {type(labels).__name__}; expected a list of whole numbers")
    if given.dtype.kind not in "iu" or given.ndim != 1:
        raise ValueError(f"{path}: the labels are {given.dtype} {list(given.shape)}; expected whole numbers [N]")
    return given


def _check_labels(path: Path, what: str, labels: Array, classes: int) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise ValueError(
            f"{path}: {what} {labels[wrong[0]]} of image {wrong[0]} is out of range 0 to {classes - 1} "
            f"({len(wrong):,} of {len(labels):,} are); is it a file of another set?"
        )


def _warn_if_fewer(cifar: _Cifar, folder: Path, what: str, found: int, official: int) -> None:
    if found != official:
        _log.warning("%s in %s has %d %s images; the official set has %d", cifar.title, folder, found, what, official)


def _image_set(cifar: _Cifar, images: Array, labels: Sequence[int] | Array) -> ImageSet:
    return ImageSet(
        torch.from_numpy(np.array(images)).view(-1, 3, 32, 32),
        torch.from_numpy(np.asarray(labels, np.int64)),
        cifar.classes,
        cifar.mean,
        cifar.std,
    )
