"""Reading weights that others have saved, without running anything that they have saved."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

__all__ = ["Checkpoint", "load_weights", "read_checkpoint"]

_WRAPPERS = ("module.", "_orig_mod.")  # DataParallel and DistributedDataParallel, torch.compile
_CLASSIFIERS = ("fc", "linear", "classifier")
_NESTS = ("state_dict", "model", "model_state_dict")
# What names that do not fit have in common -> what to do about it.
_HINTS = {
    ".downsample.": "The shortcuts differ: ResNets with shortcut='B' have weights under `downsample`, with 'A' not.",
    ".rbr_reparam.": "One of the two is fused: a RepVGG takes fused weights with deploy=True, others without.",
}
# What torch.load raises on bytes that are no checkpoint depends on where it notices; OSError where it seeks outside.
_UNREADABLE = (
    SafetensorError,
    pickle.UnpicklingError,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a file of weights holds.

    Attributes:
        tensors: by parameter or buffer name, on the CPU, in the dtype of the file.
        metadata: a safetensors file's own entries; a torch file's numbers and strings beside its weights, as text.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a safetensors file, or a state dict (bare, or under `state_dict`, `model`) written by `torch.save`.

    What kind of file it is is seen from its content. torch files go through `torch.load(weights_only=True)`. The
    prefixes `module.` and `_orig_mod.`, which DDP and torch.compile add, are taken off the names.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file that is truncated, or of another kind, or without weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}" + (" (it is a folder)" if path.is_dir() else ""))
    read = _read_safetensors if _is_safetensors(path) else _read_torch
    try:
        tensors, metadata = read(path)
    except _UNREADABLE as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) is not a checkpoint hyperfast can read: it is truncated, or "
            f"neither safetensors nor a state dict saved by torch.save ({reason})"
        ) from error
    prefix = _wrapper_prefix(tensors)
    return Checkpoint({name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, metadata)


def load_weights(model: nn.Module, path: str | Path) -> dict[str, str]:
    """Copy the weights at `path` into `model`, all of them or none.

    Every parameter and buffer must have its tensor of its shape, and every tensor its parameter or buffer. Three
    differences between projects are bridged: the prefixes of `read_checkpoint`, on either side; a last layer called
    `fc`, `linear` or `classifier` in the file and otherwise in the model; and `num_batches_tracked`, which batch norms
    of old checkpoints do not have and which then stays as it is.

    Args:
        model: on any device, of any dtype; tensors are converted.
        path: a file that `read_checkpoint` reads.

    Returns:
        The metadata of the checkpoint (text by text), such as `mean` and `std` of the images it was trained on.

    Raises:
        FileNotFoundError, ValueError: as `read_checkpoint`; ValueError also for the weights of another architecture,
            with the number and the first five of the names that do not fit. The model is then unchanged.
    """
    checkpoint = read_checkpoint(path)
    own = model.state_dict()
    prefix = _wrapper_prefix(own)
    own = {name.removeprefix(prefix): tensor for name, tensor in own.items()}
    tensors = _with_classifier_of(own, checkpoint.tensors)
    for name in own:
        if name.endswith("num_batches_tracked"):
            tensors.setdefault(name, own[name])
    complaints = _differences(own, tensors)
    if complaints:
        complaints += _hints(own, checkpoint.tensors)
        raise ValueError(
            f"{path} holds the weights of another architecture than this {type(model).__name__}:\n  "
            + "\n  ".join(complaints)
        )
    model.load_state_dict({prefix + name: tensor for name, tensor in tensors.items()})
    return checkpoint.metadata


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(9)
    # A safetensors file begins with the length of its JSON header; pickles and zip archives cannot look like that.
    return len(start) == 9 and start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] <= path.stat().st_size


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def _read_torch(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds a {type(content).__name__}")
    metadata: dict[str, str] = {}
    for nest in _NESTS:
        if isinstance(content.get(nest), Mapping):
            metadata = {str(key): str(value) for key, value in content.items() if isinstance(value, int | float | str)}
            content = content[nest]
            break
    tensors: dict[str, Tensor] = {}
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"its entry {name!r} is a {type(value).__name__}, not a tensor")
        tensors[name] = value
    return tensors, metadata


def _wrapper_prefix(names: Iterable[str]) -> str:
    """What the wrappers put before every one of `names`; a module of its own that is called so has others beside it."""
    names, prefix = list(names), ""
    while names:
        found = [wrapper for wrapper in _WRAPPERS if all(name.startswith(prefix + wrapper) for name in names)]
        if not found:
            break
        prefix += found[0]
    return prefix


def _with_classifier_of(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` with the last layer called as in the model, where each has exactly one such layer."""

    def classifiers(state: Iterable[str]) -> list[str]:
        return [name for name in _CLASSIFIERS if f"{name}.weight" in state]

    here, there = classifiers(own), classifiers(tensors)
    if len(here) != 1 or len(there) != 1:
        return dict(tensors)
    renamed = {f"{there[0]}.{kind}": f"{here[0]}.{kind}" for kind in ("weight", "bias")}
    return {renamed.get(name, name): tensor for name, tensor in tensors.items()}


def _differences(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    missing = [name for name in own if name not in tensors]
    unexpected = [name for name in tensors if name not in own]
    mismatched = [
        f"{name} ({list(tensors[name].shape)} for {list(own[name].shape)})"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    kinds = {
        "missing from the file": missing,
        "unexpected in the file": unexpected,
        "of another shape in the file": mismatched,
    }
    return [
        f"{len(found)} {kind}: {', '.join(found[:5])}{', ...' if len(found) > 5 else ''}"
        for kind, found in kinds.items()
        if found
    ]


def _hints(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """For blocks that the model and the file both have, so that a whole other family gets none."""

    def in_both(block: str) -> bool:
        return all(any(name.startswith(f"{block}.") for name in state) for state in (own, tensors))

    differing = own.keys() ^ tensors.keys()
    return [
        hint
        for part, hint in _HINTS.items()
        if any(part in name and in_both(name.partition(part)[0]) for name in differing)
    ]
