"""Checks that every operation makes of its arguments."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def check_choice(name: str, given: str, choices: Sequence[str]) -> None:
    """Raise a ValueError unless `given` is one of `choices`."""
    if given not in choices:
        raise ValueError(f"{name} is {given!r}; choose one of {', '.join(map(repr, choices))}")


def check_same_device(**tensors: Tensor) -> None:
    """Raise a ValueError that lists the tensors unless all are on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        listing = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"all tensors must be on one device; got {listing}. Move them with .to(device).")
