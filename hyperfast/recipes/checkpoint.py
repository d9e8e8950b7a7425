"""Checkpoints: safetensors files, written so that a full disk or a killed process leaves the previous one whole.

A checkpoint holds tensors and JSON, nothing pickled: opening one cannot run code. It is an ordinary safetensors file,
whose metadata have the single key `hyperfast`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from safetensors.torch import save_file
from torch import Tensor, nn

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"

VERSION = 1
_KEY = "hyperfast"


@dataclass(frozen=True)
class Checkpoint:
    """What `load` read.

    Attributes:
        path: the file.
        tensors: every tensor by name, on the CPU.
        metadata: the JSON values given to `save`.
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, JSON]

    def section(self, name: str) -> dict[str, Tensor]:
        """The tensors called `name/...`, without that prefix."""
        prefix = f"{name}/"
        return {key.removeprefix(prefix): t for key, t in self.tensors.items() if key.startswith(prefix)}


def section(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` with `name/` before every name; `Checkpoint.section` takes it off again."""
    return {f"{name}/{key}": tensor for key, tensor in tensors.items()}


def save(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, JSON] | None = None
) -> None:
    """Write a checkpoint, all or nothing.

    The file is written beside its destination, flushed to the disk and moved into place in one step. Whatever goes
    wrong before that step, the file that was at `path` stays as it was.

    Args:
        path: destination; its folder is created.
        tensors: any devices and layouts; tensors that share memory are written once each.
        metadata: values that JSON can hold.

    Raises:
        OSError: the file cannot be written (disk full, no permission). Nothing is left behind.
    """
    write(path, tensors, _header(metadata))


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Where to write `path` first: a file beside it, of the same suffix, that takes its place when the block ends.

    After an error it is gone, and what was at `path` is unchanged. The folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        yield staging
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


def write_json(path: Path, values: object) -> None:
    """Write a JSON file, all or nothing."""
    with staged(path) as staging:
        staging.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with these metadata and no others, as carefully as `save`.

    Raises:
        OSError: as `save`.
    """
    path = Path(path)
    # A folder of our own: safetensors writes to a random name first, and a kill must not pile up such files.
    staging = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        written = staging / path.name
        save_file(dict(_separate(tensors)), written, metadata=dict(metadata))
        written.chmod(0o666 & ~_umask())  # safetensors makes it readable by its owner alone
        _flush(written)
        os.replace(written, path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        message = f"could not save {path}: {error}. What was there before is unchanged."
        raise (OSError(message) if number is None else OSError(number, message)) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def size(tensors: Mapping[str, Tensor], metadata: Mapping[str, JSON] | None = None) -> int:
    """Bytes of the file that `save` writes."""
    return len(serialize(dict(_separate(tensors)), metadata=_header(metadata)))


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint that `save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut short, is no safetensors file, was not written by hyperfast, or by a later version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    try:
        # Clones: what safetensors returns may be a map of the file, which the next checkpoint will replace.
        with safe_open(path, framework="pt", device="cpu") as file:
            header = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is cut short or is not a safetensors file ({error})") from error
    if header is None:
        raise ValueError(
            f"{path} is a safetensors file, but hyperfast did not write it, so there is neither training state nor a "
            "compressed network in it. hyperfast.models.load_weights reads plain weights."
        )
    try:
        metadata = json.loads(header)
    except ValueError as error:
        raise ValueError(f"{path} was changed after it was written: its description is no JSON ({error})") from error
    version = metadata.pop("version", None)
    if version != VERSION:
        raise ValueError(f"{path} has checkpoint format {version}; this hyperfast reads format {VERSION}")
    return Checkpoint(path, tensors, metadata)


def load_module(module: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Copy `tensors` into the module's parameters and buffers; every name and shape must agree.

    Raises:
        ValueError: another architecture; lists what is missing, what is not wanted and which shapes differ.
    """
    own = module.state_dict()
    complaints = [f"{name} is missing" for name in own.keys() - tensors.keys()]
    complaints += [f"{name} does not belong here" for name in tensors.keys() - own.keys()]
    complaints += [
        f"{name} is {list(tensors[name].shape)}, expected {list(own[name].shape)}"
        for name in own.keys() & tensors.keys()
        if tensors[name].shape != own[name].shape
    ]
    if complaints:
        shown = "; ".join(sorted(complaints)[:5])
        more = f"; and {len(complaints) - 5} more" if len(complaints) > 5 else ""
        raise ValueError(f"{origin} does not fit this {type(module).__name__}: {shown}{more}")
    module.load_state_dict(dict(tensors))


def as_json(value: JSON) -> JSON:
    """`value` as it comes back from a checkpoint: tuples are lists, keys are strings."""
    restored: JSON = json.loads(json.dumps(value))
    return restored


def differences(before: JSON, now: JSON, path: str = "") -> list[str]:
    """What differs between two JSON values, leaf by leaf: `"training.lr was 0.1 and is now 0.2"`."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        pairs = [(key, before.get(key), now.get(key)) for key in sorted(before.keys() | now.keys())]
        return [text for key, b, n in pairs for text in differences(b, n, f"{path}.{key}" if path else key)]
    return [] if before == now else [f"{path} was {before!r} and is now {now!r}"]


def _header(metadata: Mapping[str, JSON] | None) -> dict[str, str]:
    return {_KEY: json.dumps({**(metadata or {}), "version": VERSION}, sort_keys=True)}


def _separate(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors on the CPU, dense, none sharing memory with another: safetensors refuses those."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        dense = tensor.detach().to("cpu").contiguous()
        storage = dense.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != dense.nbytes:
            dense = dense.clone()
        seen.add(storage.data_ptr())
        yield name, dense


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's random number generators: the CPU's, and that of `device` where it is a GPU."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_rng_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Put the generators back where `rng_state` found them."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def digest(module: nn.Module) -> str:
    """SHA-256 of its state dict."""
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
