"""Networks that are only asked: batch norm folded into the layer before it, and the layout that is fastest."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import fx, nn

_log = logging.getLogger(__name__)

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FOLDABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


def fold_batch_norm(model: nn.Module, keep: Collection[str] = ()) -> nn.Module:
    r"""A copy of `model` in eval mode whose batch norms are folded into the layers before them.

    .. math::
        s = \gamma / \sqrt{\sigma^2 + \epsilon}, \qquad W' = s W, \qquad b' = \beta + s (b - \mu)

    What it is for: a frozen teacher, and a materialised network before export. Module paths stay as they are: a
    folded norm becomes an identity, so that a tap on its output reads what it read before. A tap on the output of the
    folded layer itself reads the norm's output instead.

    Args:
        model: a layer is folded where `torch.fx` shows that the norm is the only reader of its output, and that both
            are called once. A model that cannot be traced is copied as it is, with a warning in the log.
        keep: paths of layers and norms that are left as they are, for instance because they are tapped.

    Returns:
        The copy; its outputs agree to rounding.
    """
    model = copy.deepcopy(model).eval()
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:  # whatever a forward raises when it is given symbolic values
        _log.warning("batch norm is not folded, %s cannot be traced: %s", type(model).__name__, error)
        return model
    for layer, norm in list(_pairs(model, graph)):
        if layer in keep or norm in keep:
            continue
        _fold(model.get_submodule(layer), model.get_submodule(norm))
        parent, _, name = norm.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Identity().eval())
    return model


def freeze(teacher: nn.Module, keep: Collection[str] = ()) -> nn.Module:
    """A copy of a network that will only be asked, as fast as it can answer: a teacher.

    It is in eval mode, wants no gradients and has its batch norms folded (`fold_batch_norm`). On the CPU its
    convolutions are channels-last, which is faster there whatever the layout of the images is; feature maps and
    logits keep their shapes, and agree to rounding.

    Args:
        teacher: any module; it is left as it is.
        keep: paths of the modules that are tapped.
    """
    frozen = fold_batch_norm(teacher, keep).requires_grad_(False)
    if all(parameter.device.type == "cpu" for parameter in frozen.parameters()):
        frozen.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return frozen


def _pairs(model: nn.Module, graph: fx.Graph) -> Iterator[tuple[str, str]]:
    """Paths of (layer, norm) where the norm alone reads the layer and each is called once."""
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in graph.nodes:
        source = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
            continue
        layer, norm = model.get_submodule(str(source.target)), model.get_submodule(str(node.target))
        is_norm = isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None
        if is_norm and isinstance(layer, _FOLDABLE) and calls[node.target] == calls[source.target] == 1:
            yield str(source.target), str(node.target)


@torch.no_grad()
def _fold(layer: Any, norm: Any) -> None:
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean if layer.bias is None else layer.bias - norm.running_mean
    bias = shift * scale if norm.bias is None else shift * scale + norm.bias
    shape = [1] * layer.weight.ndim
    if isinstance(layer, _TRANSPOSED):  # [in, out / groups, *kernel]
        grouped = layer.weight.view(layer.groups, -1, *layer.weight.shape[1:])
        weight = (grouped * scale.view(layer.groups, 1, -1, *shape[2:])).view_as(layer.weight)
    else:
        weight = layer.weight * scale.view(-1, *shape[1:])
    layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    layer.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
