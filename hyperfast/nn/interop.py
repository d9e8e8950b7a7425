"""Weights of other projects' hypernetworks, and ours for them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from hyperfast.nn.hypernetwork import Hypernetwork
    from hyperfast.nn.weight_predictor import WeightPredictor

_KINDS = ("weight", "bias")
_NERN_LAST = "final_linear_layer"
_KEY = re.compile(r"backbone\.(?:block\d+_lin|output)\.(?:weight|bias)$")


@torch.no_grad()
def load_hyperlight(
    hypernetwork: Hypernetwork,
    state_dict: Mapping[str, Tensor],
    shapes_order: Sequence[str] | Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Copy the weights of a HyperLight `HyperNet` into a `Hypernetwork` for the same primary network.

    Needs the same hidden widths, encoding and selection of parameters. HyperLight concatenates its named inputs in
    alphabetical order; the condition takes them so. Outputs and gradients then agree.

    Args:
        hypernetwork: is overwritten; where an error is raised, nothing was.
        state_dict: of `hyperlight.HyperNet`: `backbone.block{i}_lin.*` and `backbone.output.*`, whose bias is theta0.
        shapes_order: the order of HyperLight's `output_shapes`: parameter names, or that dict itself. By default the
            order of the hypernetwork's own targets, which is that of HyperLight's `external_shapes()`.

    Raises:
        ValueError: keys that are missing or foreign, shapes that do not fit, or names that are not those of the
            generated parameters.
    """
    _check_keys(hypernetwork, state_dict)
    rows = _row_order(hypernetwork, shapes_order)
    sources: list[tuple[Tensor, Tensor, str]] = []
    for level, layer in enumerate(hypernetwork.trunk):
        assert isinstance(layer, nn.Linear)
        name = f"backbone.block{level}_lin"
        sources += [(layer.weight, state_dict[f"{name}.weight"], f"{name}.weight")]
        sources += [(layer.bias, state_dict[f"{name}.bias"], f"{name}.bias")]
    sources.append((hypernetwork.head.weight, state_dict["backbone.output.weight"], "backbone.output.weight"))
    if "backbone.output.bias" in state_dict:
        sources.append((hypernetwork.theta0, state_dict["backbone.output.bias"], "backbone.output.bias"))
    for own, given, key in sources:
        if own.shape != given.shape:
            raise ValueError(
                f"{key} is {list(given.shape)}; this hypernetwork needs {list(own.shape)}. Use the hidden widths, "
                "encoding, condition_size and selection that the HyperLight network had"
            )
    for own, given, key in sources:
        if rows is None or not key.startswith("backbone.output"):
            own.copy_(given)
            continue
        for to, start in zip(torch.split(own, [target.numel for target in hypernetwork.targets]), rows, strict=True):
            to.copy_(given[start : start + len(to)])
    if "backbone.output.bias" not in state_dict:  # HyperLight's out_bias=False
        hypernetwork.theta0.zero_()


def _check_keys(hypernetwork: Hypernetwork, state_dict: Mapping[str, Tensor]) -> None:
    blocks = [f"backbone.block{level}_lin.{kind}" for level in range(len(hypernetwork.trunk)) for kind in _KINDS]
    needed = {*blocks, "backbone.output.weight"}
    missing = sorted(needed - set(state_dict))
    foreign = sorted(set(state_dict) - needed - {"backbone.output.bias"})
    if not missing and not foreign:
        return
    if foreign and all(_KEY.match(key) for key in foreign):
        hint = f"it has more trunk layers than this hypernetwork's {len(hypernetwork.trunk)}; set hidden accordingly"
    else:
        hint = "expected the state_dict of a hyperlight.HyperNet with as many hidden layers"
    raise ValueError(f"state_dict: missing keys {missing[:8]}, unexpected keys {foreign[:8]}; {hint}")


def _row_order(
    hypernetwork: Hypernetwork, order: Sequence[str] | Mapping[str, Sequence[int]] | None
) -> list[int] | None:
    """Row of HyperLight's output where each target begins, or `None` where the orders are the same."""
    if order is None:
        return None
    targets = {name: target for target in hypernetwork.targets for name in target.names}
    starts: dict[str, int] = {}
    start = 0
    for name in order:
        if name not in targets or targets[name].name in starts:
            raise ValueError(
                f"shapes_order: {name!r} is not one of the generated parameters, or is there twice; they are "
                f"{', '.join(t.name for t in hypernetwork.targets[:20])}"
            )
        target = targets[name]
        if isinstance(order, Mapping) and tuple(order[name]) != tuple(target.shape):
            raise ValueError(f"shapes_order: {name!r} is {list(order[name])}, but {list(target.shape)} here")
        starts[target.name] = start
        start += target.numel
    missing = [target.name for target in hypernetwork.targets if target.name not in starts]
    if missing:
        raise ValueError(f"shapes_order lacks the generated parameters {', '.join(missing[:20])}")
    return [starts[target.name] for target in hypernetwork.targets]


def nern_state_dict(predictor: WeightPredictor) -> dict[str, Tensor]:
    """The parameters under NeRN's names: `layers.{i}.*` of all layers but the last, `final_linear_layer.*`.

    They share the predictor's memory, as those of `state_dict()` do.
    """
    last = len(predictor.layers) - 1
    return {key.replace(f"layers.{last}.", f"{_NERN_LAST}."): value for key, value in predictor.state_dict().items()}


@torch.no_grad()
def load_nern(predictor: WeightPredictor, state_dict: Mapping[str, Tensor]) -> None:
    """Copy the weights of a NeRN predictor (a file `nern_*.pth`) into a `WeightPredictor` of the same widths.

    Base, levels, fusion and permutations are in NeRN's configuration, not in its file: give the predictor the same.

    Args:
        predictor: is overwritten; where an error is raised, nothing was.
        state_dict: with the names of `nern_state_dict`.

    Raises:
        ValueError: keys that are missing or foreign, or shapes that do not fit.
    """
    own = nern_state_dict(predictor)
    missing, foreign = sorted(set(own) - set(state_dict)), sorted(set(state_dict) - set(own))
    if missing or foreign:
        raise ValueError(
            f"state_dict: missing keys {missing[:8]}, unexpected keys {foreign[:8]}; expected that of a NeRN predictor "
            f"with {len(predictor.layers)} linear layers"
        )
    for key, value in own.items():
        if value.shape != state_dict[key].shape:
            raise ValueError(
                f"{key} is {list(state_dict[key].shape)}; this predictor needs {list(value.shape)}. Use the hidden "
                "width, levels, fusion and outputs that the NeRN predictor had"
            )
    for key, value in own.items():
        value.copy_(state_dict[key])
