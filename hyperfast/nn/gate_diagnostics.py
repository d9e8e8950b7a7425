"""Whether the heads of inherited layers do different things, and whether their gates tell samples apart."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hyperfast.nn.inherited import InheritedConv2d, InheritedLinear
from hyperfast.surgery.modes import eval_mode


@dataclass(frozen=True)
class GateRow:
    r"""The heads of a layer.

    Attributes:
        name: dotted path.
        entropy: mean over the samples of :math:`-\sum_h g_h \log g_h / \log H`: 1 where all heads are mixed evenly, 0
            where the gate picks one.
        usage: the same of the mean gates: 1 where the heads are used evenly over all samples. With a low entropy and
            even usage the heads share the samples among them.
        similarity: mean cosine between the matrices of two heads; 1 where they are equal.
    """

    name: str
    entropy: float
    usage: float
    similarity: float


@torch.no_grad()
def gate_diagnostics(model: nn.Module, batches: Iterable[Tensor]) -> tuple[GateRow, ...]:
    """What the gates of every inherited layer with several heads say to `batches`; eval mode meanwhile.

    Raises:
        ValueError: there is no batch.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, InheritedConv2d | InheritedLinear) and layer.heads > 1
    }
    entropies = dict.fromkeys(layers, 0.0)
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(layers, 0)
    some = False
    with eval_mode(model):
        for batch in batches:
            model(batch)
            some = True
            for name, layer in layers.items():
                if layer.gates is None:
                    continue
                gates = layer.gates.double()
                entropies[name] += float(torch.special.entr(gates).sum())
                sums[name] = gates.sum(0) + sums.get(name, 0)
                counts[name] += len(gates)
    if not some:
        raise ValueError("batches is empty; give at least one")
    return tuple(
        GateRow(
            name,
            entropies[name] / counts[name] / math.log(layer.heads),
            float(torch.special.entr(sums[name] / counts[name]).sum()) / math.log(layer.heads),
            _similarity(layer.experts),
        )
        for name, layer in layers.items()
        if counts[name]
    )


def _similarity(experts: Tensor) -> float:
    """Mean cosine between two different heads of `[H, m, r]`."""
    heads = nn.functional.normalize(experts.double().flatten(1), dim=1)
    cosines = heads @ heads.T
    pairs = len(heads) * (len(heads) - 1)
    return float(cosines.sum() - cosines.diagonal().sum()) / pairs
