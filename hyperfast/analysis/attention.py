"""Attention maps of a network's taps: where it looks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hyperfast import surgery
from hyperfast.reference.attention_transfer import attention_map

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hyperfast.surgery.taps import At

_EPS = 1e-12


@torch.no_grad()
def attention_maps(network: nn.Module, images: Tensor, *, at: At = "stages", p: int = 2) -> dict[str, Tensor]:
    r"""Attention maps :math:`Q / \|Q\|_2` with :math:`Q = \sum_c |F_c|^p`, as attention transfer compares them.

    Args:
        network: any module, also a `Hypernetwork`. It runs in eval mode; its mode is put back.
        images: `[B, C, H, W]`, normalised, on the network's device.
        at: which taps, as in `hyperfast.taps`. Those without two spatial dimensions are left out.
        p: power of |F|.

    Returns:
        `[B, H_l, W_l]` in float32 on the CPU, by tap name in call order.

    Raises:
        ValueError: `at` taps nothing, or nothing with two spatial dimensions.

    Source: Zagoruyko and Komodakis, arXiv 1612.03928.
    """
    training = network.training
    network.eval()
    try:
        with surgery.taps(network, at=at) as taps:
            network(images)
    finally:
        network.train(training)
    features = {str(key): tensor.float() for key, tensor in taps.student.items() if tensor.ndim == 4}
    if not features:
        shapes = ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in taps.student.items())
        raise ValueError(f"at={at!r} taps no map [B, C, H, W], so there is no picture to show; it taps {shapes}")
    return {
        name: attention_map(tensor, p, "paper", _EPS).view(len(tensor), *tensor.shape[2:]).cpu()
        for name, tensor in features.items()
    }
