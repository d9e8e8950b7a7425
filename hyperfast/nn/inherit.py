"""A trained network with its layers decomposed into a shared projection and gated heads (InherNet)."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hyperfast.nn.inherited import GateInput, InheritedConv2d, InheritedLinear
from hyperfast.nn.inherited_structure import like, replace_module
from hyperfast.surgery.low_rank import SPLITS, MomentMeter, Spectrum, Split, budget_ranks
from hyperfast.surgery.modes import eval_mode

Predicate = Callable[[str, nn.Module], bool]
# They call functions with the weights of their layers instead of the layers.
_READ_BY_OTHERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


@dataclass(frozen=True)
class InheritRow:
    """A layer of the report.

    Attributes:
        name: dotted path.
        kind: class of the layer, such as `"Conv2d"`.
        shape: of its weight.
        full_rank: min(out, in * kernel).
        rank: kept; None where the layer was left as it is.
        energy: share of the squared singular values that is kept; 1 where the layer was left.
        parameters: of the layer before.
        inherited: of what stands in its place.
        reason: why it was left; None for those that were replaced.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    full_rank: int
    rank: int | None
    energy: float
    parameters: int
    inherited: int
    reason: str | None


@dataclass(frozen=True)
class InheritReport:
    """What became of every convolution and linear layer.

    Attributes:
        rows: in the order of the network.
        parameters: of the whole network before.
        inherited: of the whole network now.
    """

    rows: tuple[InheritRow, ...]
    parameters: int
    inherited: int

    @property
    def energy(self) -> float:
        """Mean over the replaced layers of what each keeps: behind a norm, the scale of a layer means nothing."""
        kept = [row.energy for row in self.rows if row.reason is None]
        return sum(kept) / len(kept)

    def __str__(self) -> str:
        replaced = [row for row in self.rows if row.reason is None]
        lines = [
            f"{row.name}: {row.kind} {list(row.shape)}, rank {row.rank} of {row.full_rank}, energy {row.energy:.3f}, "
            f"{row.parameters:,} to {row.inherited:,} parameters"
            if row.reason is None
            else f"{row.name}: {row.kind} {list(row.shape)} left as it is, {row.reason}"
            for row in self.rows
        ]
        total = f"{len(replaced)} of {len(self.rows)} layers, {self.parameters:,} to {self.inherited:,} parameters"
        return "\n".join([*lines, total])


def inherit(
    model: nn.Module,
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
    heads: int = 3,
    init: Literal["exact", "paper"] = "exact",
    split: Split = "balanced",
    gate: Literal["random", "zero"] = "random",
    gate_input: GateInput = "compressed",
    deviation: float = 0.0,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    classifier: bool = False,
    predicate: Predicate | None = None,
    only_smaller: bool = True,
    calibration: Iterable[Tensor] | None = None,
) -> tuple[nn.Module, InheritReport]:
    r"""A copy of a trained network with its layers in low rank: one shared projection and gated heads each.

    The weight of a convolution as a matrix `[out, in * k * k]`, or of a linear layer, is :math:`U \Sigma V^T`. Its
    first r singular vectors become the projection :math:`D = \Sigma_r^{1/2} V_r^T` and every head
    :math:`E_h = U_r \Sigma_r^{1/2}`, so that the layer begins as the best one of rank r whatever the gate says.

    Args:
        model: any trained module; left as it is.
        rank: r, of every layer. Give just one of rank, energy and budget.
        energy: share of the squared singular values, from which each layer's rank follows.
        budget: parameters of the whole network; the layers keep one share of energy, the largest that fits.
        heads: H.
        init: `"exact"`; `"paper"`: every head divided by H, as paper and demo have it, with which the layer begins as
            1 / H of that, since the gates sum to 1 already.
        split: where the singular values go: `"balanced"`, half to both; `"up"`, to the heads (the authors' demo);
            `"down"`.
        gate: `"random"`, as PyTorch initialises a linear layer; `"zero"`, uniform gates.
        gate_input: `"compressed"` or `"input"`, see `InheritedConv2d`.
        deviation: noise that tells the heads apart, in standard deviations of E, of which the mean over the heads is
            taken off. 0.005 to 0.01 in InherAct. With equal heads the gate gets no gradient.
        include: globs over module names of the layers to replace.
        exclude: globs of those to leave.
        classifier: replace the last linear layer too.
        predicate: `(name, layer) -> bool`, which has the last word; for instance to leave a stem.
        only_smaller: leave a layer that would grow.
        calibration: batches of inputs of the network. With them the decomposition minimises the error of each layer's
            output, not of its weight.

    Returns:
        The network, in the mode, on the device and in the dtype of `model`, and the report.

    Raises:
        ValueError: none or several of rank, energy and budget, or values out of range; globs that match no layer; a
            layer that `include` has by its full name and that cannot be replaced; a zero gate with equal heads, which
            would stay equal; weights that are not finite; nothing to replace.

    Notes:
        A layer is left where the rank is at least its full rank. Grouped and depthwise convolutions are left, and
        layers that a module reads the weights of (`nn.MultiheadAttention`, `nn.TransformerEncoderLayer`). Norms keep
        their statistics, which are those of the full layers: see `recalibrate_norms`.

    Example:
        >>> student, report = hyperfast.inherit(resnet56, rank=16)
        >>> print(report)

    Source: InherNet, arXiv 2602.09509; initialisation, deviations and calibration after the authors' later code.
    """
    _check(rank, energy, budget, heads, init, split, gate, deviation)
    student = copy.deepcopy(model)
    found = list(_layers(student))
    _check_globs([name for name, _ in found], include, exclude)
    reasons = _reasons(student, found, include, exclude, classifier, predicate)
    chosen = [(name, layer) for name, layer in found if reasons[name] is None]
    moments = {} if calibration is None else _moments(model, [name for name, _ in chosen], calibration)
    spectra = {name: _spectrum(name, layer, moments.get(name)) for name, layer in chosen}
    sizes = {name: _sizes(layer, heads, gate_input) for name, layer in chosen}
    ranks = _ranks(student, chosen, spectra, sizes, rank, energy, budget)
    rows = []
    for name, layer in found:
        reason, kept, own = reasons[name], ranks.get(name), _count(layer)
        size = own
        if reason is None:
            assert kept is not None
            per_rank, fixed = sizes[name]
            size = kept * per_rank + fixed
            if kept >= spectra[name].full_rank:
                reason = f"rank {kept} is its full rank"
            elif only_smaller and size >= own:
                reason = f"it would grow from {own:,} to {size:,} parameters"
        if reason is None:
            assert kept is not None
            new = _replacement(layer, spectra[name], kept, heads, init, split, gate, gate_input, deviation)
            replace_module(student, name, new.train(layer.training))
        share = spectra[name].energy(kept) if reason is None and kept is not None else 1.0
        rows.append(
            InheritRow(
                name,
                type(layer).__name__,
                tuple(layer.weight.shape),
                min(layer.weight.shape[0], layer.weight[0].numel()),
                kept if reason is None else None,
                share,
                own,
                size if reason is None else own,
                reason,
            )
        )
    for row in rows:
        if row.reason is not None and row.name in include:
            raise ValueError(f"layer {row.name!r} was asked for by name and cannot be replaced: {row.reason}")
    if all(row.reason for row in rows):
        raise ValueError("no layer was replaced: " + "; ".join(f"{row.name}, {row.reason}" for row in rows[:5]))
    return student, InheritReport(tuple(rows), _count(model), _count(student))


def fold(model: nn.Module) -> nn.Module:
    """A copy of a network whose inherited layers are two plain layers each, under the mean of their heads.

    For one head that is the same network. For several it is the network that a frozen, uniform gate has.
    """
    plain = copy.deepcopy(model)
    for name, layer in list(plain.named_modules()):
        if isinstance(layer, InheritedConv2d | InheritedLinear):
            replace_module(plain, name, layer.fold().train(layer.training))
    return plain


@torch.no_grad()
def recalibrate_norms(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the running statistics of all batch norms to the mean over `batches`, which are shown to the network.

    Norms that come from the full layers are off after truncation, the more the smaller the rank. About 16 batches do.

    Raises:
        ValueError: there is no batch.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    count = 0
    try:
        with eval_mode(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the mean of all
                norm.train()
            for batch in batches:
                model(batch)
                count += 1
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    if not count:
        raise ValueError("batches is empty; give about 16, as the network sees them in training")


def _check(
    rank: int | None,
    energy: float | None,
    budget: int | None,
    heads: int,
    init: str,
    split: str,
    gate: str,
    deviation: float,
) -> None:
    sizes = {"rank": rank, "energy": energy, "budget": budget}
    given = [name for name, value in sizes.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"give one of rank, energy and budget; got {', '.join(given) or 'none'}")
    if rank is not None and rank < 1:
        raise ValueError(f"rank is {rank}; it must be at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy is {energy}; expected a share in (0, 1]")
    if heads < 1:
        raise ValueError(f"heads is {heads}; it must be at least 1")
    for name, value, choices in (
        ("init", init, ("exact", "paper")),
        ("split", split, SPLITS),
        ("gate", gate, ("random", "zero")),
    ):
        if value not in choices:
            raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(repr, choices))}")
    if deviation < 0:
        raise ValueError(f"deviation is {deviation}; it must not be negative")
    if gate == "zero" and deviation == 0 and heads > 1:
        raise ValueError(
            "gate='zero' with equal heads: they would get equal gradients for ever. Give deviation=0.01, or "
            "gate='random'"
        )


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and name:
            yield name, module


def _check_globs(names: Sequence[str], include: Sequence[str], exclude: Sequence[str]) -> None:
    for argument, globs in (("include", include), ("exclude", exclude)):
        for glob in globs:
            if not fnmatch.filter(names, glob):
                raise ValueError(f"{argument}: {glob!r} matches no layer. Layers: {', '.join(names[:20])}")


def _reasons(
    model: nn.Module,
    layers: Sequence[tuple[str, Any]],
    include: Sequence[str],
    exclude: Sequence[str],
    classifier: bool,
    predicate: Predicate | None,
) -> dict[str, str | None]:
    """Why a layer is left as it is; None for the others."""
    readers = {name: type(m).__name__ for name, m in model.named_modules() if isinstance(m, _READ_BY_OTHERS)}
    linear = [name for name, layer in layers if isinstance(layer, nn.Linear)]
    reasons: dict[str, str | None] = {}
    for name, layer in layers:
        reader = next((kind for path, kind in readers.items() if name.startswith(f"{path}." if path else "")), None)
        if not any(fnmatch.fnmatchcase(name, glob) for glob in include):
            reasons[name] = "not among the included"
        elif any(fnmatch.fnmatchcase(name, glob) for glob in exclude):
            reasons[name] = "excluded"
        elif not classifier and linear and name == linear[-1]:
            reasons[name] = "it is the classifier"
        elif getattr(layer, "groups", 1) != 1:
            depthwise = layer.groups == layer.in_channels
            reasons[name] = "a depthwise convolution has rank 1" if depthwise else "a grouped convolution"
        elif reader is not None:
            reasons[name] = f"its {reader} reads its weights itself"
        elif type(layer) not in (nn.Conv2d, nn.Linear):
            reasons[name] = f"a {type(layer).__name__} may be more than its base class"
        elif predicate is not None and not predicate(name, layer):
            reasons[name] = "the predicate says no"
        else:
            reasons[name] = None
    return reasons


@torch.no_grad()
def _moments(model: nn.Module, names: Sequence[str], batches: Iterable[Tensor]) -> dict[str, Any]:
    """What each layer sees in the original network."""
    layers = dict(_layers(model))
    meters = {name: MomentMeter(layers[name]) for name in names}
    handles = [
        layers[name].register_forward_pre_hook(lambda _module, args, meter=meter: meter.add(args[0]))
        for name, meter in meters.items()
    ]
    try:
        with eval_mode(model):
            for batch in batches:
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
    found = {name: meter.moment() for name, meter in meters.items()}
    if any(moment is None for moment in found.values()):
        unseen = [name for name, moment in found.items() if moment is None]
        raise ValueError(f"calibration shows nothing to {', '.join(unseen[:5])}; give batches, or exclude these layers")
    return found


def _spectrum(name: str, layer: Any, moment: Any) -> Spectrum:
    try:
        return Spectrum.of(layer.weight, moment)
    except ValueError as error:
        raise ValueError(f"layer {name!r} cannot be decomposed: {error}") from None


def _sizes(layer: Any, heads: int, gate_input: str) -> tuple[int, int]:
    """Parameters of what takes the layer's place, per rank and whatever the rank."""
    outputs, inputs = layer.weight.shape[0], layer.weight[0].numel()
    bias = 0 if layer.bias is None else heads * outputs
    if gate_input == "compressed":
        return inputs + heads * outputs + heads, heads + bias
    return inputs + heads * outputs, heads * (layer.weight.shape[1] + 1) + bias


def _ranks(
    model: nn.Module,
    chosen: Sequence[tuple[str, Any]],
    spectra: dict[str, Spectrum],
    sizes: dict[str, tuple[int, int]],
    rank: int | None,
    energy: float | None,
    budget: int | None,
) -> dict[str, int]:
    names = [name for name, _ in chosen]
    if rank is not None:
        return dict.fromkeys(names, rank)
    if energy is not None:
        return {name: spectra[name].rank_for(energy) for name in names}
    assert budget is not None
    rest = _count(model) - sum(_count(layer) for _, layer in chosen)
    ranks = budget_ranks([spectra[n] for n in names], [sizes[n] for n in names], budget - rest)
    return dict(zip(names, ranks, strict=True))


@torch.no_grad()
def _replacement(
    layer: Any,
    spectrum: Spectrum,
    rank: int,
    heads: int,
    init: str,
    split: Split,
    gate: str,
    gate_input: GateInput,
    deviation: float,
) -> nn.Module:
    new = like(layer, rank, heads, gate_input)
    up, down = spectrum.factors(rank, split)
    experts = up.expand(heads, -1, -1)
    if init == "paper":
        experts = experts / heads
    if deviation:
        noise = torch.randn(experts.shape, dtype=torch.float64) * (deviation * up.std())
        experts = experts + noise - noise.mean(0)
    new.experts.copy_(experts)
    new.down.weight.copy_(down)
    if new.bias is not None:
        new.bias.copy_(layer.bias / heads if init == "paper" else layer.bias)
    if gate == "zero":
        nn.init.zeros_(new.gate.weight)
        nn.init.zeros_(new.gate.bias)
    return new.requires_grad_(layer.weight.requires_grad)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
