"""Which parameters of a model a hypernetwork generates."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, TypeAlias

import torch
from torch import nn

Role: TypeAlias = Literal["weight", "bias", "norm_weight", "norm_bias"]
Predicate: TypeAlias = Callable[[str, nn.Module, nn.Parameter], bool]
Select: TypeAlias = "type[nn.Module] | tuple[type[nn.Module], ...] | str | Sequence[str] | Predicate | None"

LINEAR = (nn.Linear,)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS: tuple[type[nn.Module], ...] = (*LINEAR, *CONVOLUTIONS, *TRANSPOSED)
# _NormBase: batch norm (also synchronised) and instance norm of every dimension.
NORMS: tuple[type[nn.Module], ...] = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
NORM_POLICIES = ("keep", "generate")


@dataclass(frozen=True)
class Target:
    """One parameter that is to be generated.

    Attributes:
        names: every dotted name under which the parameter is reached; `names[0]` is the canonical one.
        shape: of the parameter.
        role: `"weight"`, `"bias"`, `"norm_weight"` or `"norm_bias"`.
        fan_in: input values that one output value sums over, in the target's layer (also for a bias).
        fan_out: output values that one input value reaches. Both count groups, and strides on average; they agree
            with `torch.nn.init` where there are neither groups nor strides.
        has_bias: whether the layer's bias is generated as well.
        layer: dotted path of the module.
    """

    names: tuple[str, ...]
    shape: torch.Size
    role: Role
    fan_in: int
    fan_out: int
    has_bias: bool
    layer: str

    @property
    def name(self) -> str:
        """The canonical name."""
        return self.names[0]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class _Slot:
    """A place in the model where a parameter is registered."""

    path: str
    leaf: str
    module: nn.Module
    parameter: nn.Parameter

    @property
    def name(self) -> str:
        return f"{self.path}.{self.leaf}" if self.path else self.leaf


def select_parameters(
    model: nn.Module, select: Select = None, *, norm: Literal["keep", "generate"] = "keep"
) -> list[Target]:
    """The parameters of `model` that `select` names, in the order of `model.named_parameters()`.

    Args:
        model: any module.
        select: `None`: weight and bias of every linear layer and convolution (1d, 2d, 3d, transposed). Else one of

            - a module type, or a tuple of types: the parameters that such modules own themselves;
            - a glob over parameter names (`"layer1.*.weight"`; `*` matches dots too), or a list of globs;
            - `predicate(name, module, parameter) -> bool`, called with the module that owns the parameter.
        norm: `"keep"`: the affine parameters of batch, layer, group, instance and RMS norm are never selected;
            `"generate"`: they are, where `select` is `None` or matches them.

    Returns:
        Targets. A parameter that two modules share is one target with several names; it is selected when any of them
        is.

    Raises:
        TypeError: `select` is none of the above.
        ValueError: the model has no parameters, nothing matches (the message lists what could have), or a selected
            parameter cannot be generated: not floating point, not initialised yet, computed from others, or of a
            recurrent layer.
    """
    if norm not in NORM_POLICIES:
        raise ValueError(f"norm is {norm!r}; choose one of {', '.join(map(repr, NORM_POLICIES))}")
    slots = _slots(model)
    if not slots:
        raise ValueError(f"the model ({type(model).__name__}) has no parameters, so there is nothing to generate")
    matching = _matching(model, slots, select, norm)
    chosen = [slot for slot in matching if norm == "generate" or not isinstance(slot.module, NORMS)]
    if not chosen:
        if matching:
            raise ValueError(
                f"select={select!r} matches parameters of normalisation layers only ({_listing(matching)}), which "
                "norm='keep' leaves in the model; use norm='generate'"
            )
        raise ValueError(f"select={select!r} matches no parameter. Parameters: {_listing(slots)}")
    for slot in chosen:
        _check_can_be_generated(slot)
    return _targets(slots, chosen)


def _slots(model: nn.Module) -> list[_Slot]:
    return [
        _Slot(path, leaf, module, parameter)
        for path, module in model.named_modules(remove_duplicate=False)
        for leaf, parameter in module._parameters.items()
        if parameter is not None
    ]


def _matching(model: nn.Module, slots: Sequence[_Slot], select: Select, norm: str) -> list[_Slot]:
    if select is None:
        return _of_types(model, slots, (*LAYERS, *NORMS) if norm == "generate" else LAYERS)
    if isinstance(select, type) or (isinstance(select, tuple) and all(isinstance(t, type) for t in select)):
        return _of_types(model, slots, select if isinstance(select, tuple) else (select,))
    if isinstance(select, str):
        return _of_globs(slots, [select])
    if isinstance(select, Sequence) and all(isinstance(item, str) for item in select):
        return _of_globs(slots, [str(item) for item in select])
    if callable(select):
        return [slot for slot in slots if select(slot.name, slot.module, slot.parameter)]
    raise TypeError(
        f"select is {select!r}; expected None, a module type or a tuple of types, a glob or a list of globs over "
        "parameter names, or a predicate(name, module, parameter)"
    )


def _of_types(model: nn.Module, slots: Sequence[_Slot], types: tuple[type[nn.Module], ...]) -> list[_Slot]:
    for path, module in model.named_modules():
        if isinstance(module, types):
            _check_owns_weight(path, module)
    found = [slot for slot in slots if isinstance(slot.module, types)]
    if not found:
        owners = ", ".join(dict.fromkeys(type(slot.module).__name__ for slot in slots))
        raise ValueError(
            f"no module of type {', '.join(t.__name__ for t in types)} has parameters of its own. "
            f"Types that have: {owners}. Parameters: {_listing(slots)}"
        )
    return found


def _check_owns_weight(path: str, module: nn.Module) -> None:
    """Parametrised layers (weight norm, spectral norm, ...) compute their weight, it cannot be swapped."""
    if not isinstance(module, LAYERS) or module._parameters.get("weight") is not None:
        return
    own = [name for name, _ in module.named_parameters() if name != "bias"]
    source = f"it is computed from {', '.join(own)}; select those by name or predicate" if own else "it has none"
    raise ValueError(
        f"the weight of {path or 'the model'} ({type(module).__name__}) is not a parameter of its own and cannot be "
        f"generated: {source}, or leave the layer out"
    )


def _of_globs(slots: Sequence[_Slot], globs: Sequence[str]) -> list[_Slot]:
    found: set[str] = set()
    for glob in globs:
        matching = {slot.name for slot in slots if fnmatch.fnmatchcase(slot.name, glob)}
        if not matching:
            raise ValueError(f"select: the glob {glob!r} matches no parameter. Parameters: {_listing(slots, glob)}")
        found |= matching
    return [slot for slot in slots if slot.name in found]


def _check_can_be_generated(slot: _Slot) -> None:
    if isinstance(slot.parameter, nn.parameter.UninitializedParameter):
        raise ValueError(f"{slot.name} has no shape yet (a lazy module); run the model once before selecting")
    if isinstance(slot.module, nn.RNNBase):
        raise ValueError(
            f"{slot.name} belongs to a {type(slot.module).__name__}, which keeps a list of its weights besides its "
            "parameters and would hold on to generated ones; leave it out"
        )
    if not slot.parameter.is_floating_point():
        raise ValueError(f"{slot.name} is {slot.parameter.dtype}; only floating point parameters can be generated")


def _targets(slots: Sequence[_Slot], chosen: Sequence[_Slot]) -> list[Target]:
    names: dict[int, list[str]] = {}
    for slot in slots:
        names.setdefault(id(slot.parameter), []).append(slot.name)
    first: dict[int, _Slot] = {}
    for slot in chosen:
        first.setdefault(id(slot.parameter), slot)
    with_bias = {id(slot.module) for slot in chosen if _is_bias(slot.leaf)}
    targets = []
    for parameter in names:
        if parameter in first:
            slot = first[parameter]
            fan_in, fan_out = _fans(slot)
            targets.append(
                Target(
                    names=tuple(names[parameter]),
                    shape=slot.parameter.shape,
                    role=_role(slot),
                    fan_in=fan_in,
                    fan_out=fan_out,
                    has_bias=id(slot.module) in with_bias,
                    layer=slot.path,
                )
            )
    return targets


def _is_bias(leaf: str) -> bool:
    return leaf == "bias" or leaf.endswith("_bias") or leaf.startswith("bias_")


def _role(slot: _Slot) -> Role:
    if isinstance(slot.module, NORMS):
        return "norm_bias" if _is_bias(slot.leaf) else "norm_weight"
    return "bias" if _is_bias(slot.leaf) else "weight"


def _fans(slot: _Slot) -> tuple[int, int]:
    module = slot.module
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        taps = prod(module.kernel_size)
        fans = (module.in_channels // module.groups * taps, module.out_channels // module.groups * taps)
        thinned = tuple(max(1, round(fan / prod(module.stride))) for fan in fans)
        # A stride skips outputs of a convolution and inputs of a transposed one.
        return (thinned[0], fans[1]) if isinstance(module, TRANSPOSED) else (fans[0], thinned[1])
    shape = slot.parameter.shape
    if len(shape) < 2:
        return 1, 1
    return prod(shape[1:]), shape[0] * prod(shape[2:])


def _listing(slots: Iterable[_Slot], pattern: str = "") -> str:
    """The first 20 parameter names, those nearest to `pattern` in front."""
    names = [slot.name for slot in slots]
    names = list(dict.fromkeys((*difflib.get_close_matches(pattern, names, n=5, cutoff=0.5), *names)))
    more = f", ... and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(names[:20]) + more
