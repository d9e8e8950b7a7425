"""Which channels of a network can change places: followed through its graph from the layers that write them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from hyperfast.surgery.select import CONVOLUTIONS, TRANSPOSED

_ELEMENTWISE_MODULES = (
    *(nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus),
    *(nn.Sigmoid, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Tanh, nn.Dropout, nn.Dropout1d, nn.Dropout2d),
)
_POOLING_MODULES = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.Upsample),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)
_ELEMENTWISE: set[Callable[..., Any] | str] = {
    *(F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.sigmoid, F.hardsigmoid, F.hardswish, F.hardtanh),
    *(F.tanh, F.dropout, torch.relu, torch.sigmoid, torch.tanh),
    *("relu", "relu_", "sigmoid", "tanh", "contiguous", "clone", "detach"),
}
_POOLING: set[Callable[..., Any] | str] = {
    *(F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.max_pool1d, F.avg_pool1d),
}
_BINARY: set[Callable[..., Any] | str] = {
    *(operator.add, operator.iadd, operator.sub, operator.isub, operator.mul, operator.imul),
    *(torch.add, torch.sub, torch.mul, "add", "add_", "sub", "mul", "mul_"),
}
_METADATA: set[Callable[..., Any] | str] = {getattr, "size", "dim"}


@dataclass(frozen=True)
class Use:
    """A dimension of a parameter or buffer that runs over the channels of a group.

    Attributes:
        tensor: dotted name.
        dim: the dimension.
        writes: whether the layer computes the channels; else it reads or transforms them one by one.
        spread: consecutive entries of each channel: the positions of a feature map that was flattened.
    """

    tensor: str
    dim: int
    writes: bool
    spread: int = 1


@dataclass
class Group:
    """Channels that are the same wherever they appear, and so keep one order.

    Attributes:
        channels: how many there are.
        uses: everything that has to be reordered with them.
        barriers: why they have to stay as they are; empty where they may change places.
    """

    channels: int
    uses: list[Use] = field(default_factory=list)
    barriers: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Value:
    """What a node of the graph computes: its channels are those of `group`, along dimension 1 or the last one."""

    group: int
    last: bool
    flattened: bool = False  # channels and positions in one dimension


def channel_groups(module: nn.Module) -> list[Group]:
    """The groups of channels that some layer of `module` writes, in the order of the graph.

    Followed are convolutions (also transposed and depthwise), linear layers, norms, activations, dropout, pooling,
    flattening, and sums and products of maps. Everything else is a barrier, the network's result included.

    Raises:
        ValueError: `torch.fx` cannot trace the module.
    """
    try:
        graph = fx.Tracer().trace(module)
    except Exception as error:  # whatever a forward raises when it is given symbolic values
        raise ValueError(
            f"{type(module).__name__} cannot be traced by torch.fx, so that its channels cannot be followed: {error}. "
            "Relabel the parts of it that can be, or use a stored permutation"
        ) from error
    follower = _Follower(module)
    for node in graph.nodes:
        follower.visit(node)
    return follower.groups_found()


class _Follower:
    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.groups: list[Group] = []
        self.parents: list[int] = []
        self.values: dict[fx.Node, _Value | None] = {}
        self.calls: dict[str, tuple[_Value | None, _Value | None]] = {}
        self.read_directly: set[str] = set()

    def groups_found(self) -> list[Group]:
        """Groups with everything that was joined to them."""
        names: dict[int, int] = {}
        for _, parameter in self.module.named_parameters(remove_duplicate=False):
            names[id(parameter)] = names.get(id(parameter), 0) + 1
        tensors = {**dict(self.module.named_parameters(remove_duplicate=False)), **dict(self.module.named_buffers())}
        found = [group for index, group in enumerate(self.groups) if self.parents[index] == index]
        for group in found:
            for use in group.uses:
                if names.get(id(tensors[use.tensor]), 1) > 1:
                    group.barriers.append(f"{use.tensor} is shared between modules")
                if use.tensor in self.read_directly:
                    group.barriers.append(f"{use.tensor} is read by the forward itself")
        return found

    def visit(self, node: fx.Node) -> None:
        if node.op == "call_module":
            self.values[node] = self._module(node)
        elif node.op in ("call_function", "call_method"):
            self.values[node] = self._function(node)
        else:
            if node.op == "get_attr":
                self.read_directly.add(str(node.target))
            self.values[node] = self._barrier(node)

    def _barrier(self, node: fx.Node) -> _Value | None:
        """What `node` reads has to stay as it is, and so has what it computes."""
        name = "the network's result" if node.op == "output" else f"{node.op} {_name(node.target)}"
        for source in node.all_input_nodes:
            value = self.values[source]
            if value is not None:
                self._group(value).barriers.append(f"read by {name}")
        return None

    def _root(self, index: int) -> int:
        while self.parents[index] != index:
            index = self.parents[index]
        return index

    def _group(self, value: _Value) -> Group:
        return self.groups[self._root(value.group)]

    def _new(self, channels: int, last: bool) -> _Value:
        self.groups.append(Group(channels))
        self.parents.append(len(self.parents))
        return _Value(len(self.parents) - 1, last)

    def _join(self, a: _Value | None, b: _Value | None) -> bool:
        """Whether both now have one order. A value whose channels are unknown is a barrier to the other's."""
        if a is None or b is None or a.last != b.last or a.flattened != b.flattened:
            return a is None and b is None
        first, second = sorted((self._root(a.group), self._root(b.group)))
        if self.groups[first].channels != self.groups[second].channels:
            return False
        if first != second:
            self.parents[second] = first
            self.groups[first].uses += self.groups[second].uses
            self.groups[first].barriers += self.groups[second].barriers
        return True

    def _module(self, node: fx.Node) -> _Value | None:
        path = str(node.target)
        module: Any = self.module.get_submodule(path)
        sources = node.all_input_nodes
        if len(sources) != 1 or node.kwargs:
            return self._barrier(node)
        x = self.values[sources[0]]
        if isinstance(module, _ELEMENTWISE_MODULES):
            return x
        if isinstance(module, _POOLING_MODULES):
            return x if x is not None and not x.last else self._barrier(node)
        if isinstance(module, nn.Flatten):
            return self._flatten(node, x, module.start_dim, module.end_dim)
        if path in self.calls:
            before, result = self.calls[path]
            if self._join(before, x):
                return result
            for value in (before, result):
                if value is not None:
                    self._group(value).barriers.append(f"{path} is called on different channels")
            return self._barrier(node)
        result = self._layer(node, path, module, x)
        self.calls[path] = (x, result)
        return result

    def _layer(self, node: fx.Node, path: str, module: Any, x: _Value | None) -> _Value | None:
        if isinstance(module, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)) and module._parameters.get("weight") is not None:
            return self._writer(node, path, module, x)
        size = _norm_size(module)
        if x is None or size is None or not self._transforms(x, module, size):
            return self._barrier(node)
        spread = size // self._group(x).channels
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensor = getattr(module, name, None)
            if tensor is not None and tensor.numel() > 1:
                self._group(x).uses.append(Use(f"{path}.{name}", 0, False, spread))
        return x

    def _transforms(self, x: _Value, module: Any, size: int) -> bool:
        """Whether a norm or PReLU over `size` channels works on those of `x`, each by itself or all alike."""
        channels = self._group(x).channels
        if isinstance(module, nn.PReLU) and size == 1:
            return True
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and not x.last:
            return False
        return size % channels == 0 if x.flattened else size == channels

    def _writer(self, node: fx.Node, path: str, module: Any, x: _Value | None) -> _Value | None:
        linear, transposed = isinstance(module, nn.Linear), isinstance(module, TRANSPOSED)
        inputs = module.in_features if linear else module.in_channels
        outputs = module.out_features if linear else module.out_channels
        if getattr(module, "groups", 1) > 1:
            depthwise = module.groups == inputs == outputs and x is not None and not x.last
            if x is None or not depthwise or self._group(x).channels != inputs:
                return self._barrier(node)
            self._group(x).uses += self._own(path, module, 0, False)
            return x
        if x is not None:
            spread, rest = divmod(inputs, self._group(x).channels)
            if x.last == linear and rest == 0 and (spread == 1 or x.flattened):
                self._group(x).uses.append(Use(f"{path}.weight", 0 if transposed else 1, False, spread))
            else:
                self._barrier(node)
        result = self._new(outputs, last=linear)
        self._group(result).uses += self._own(path, module, 1 if transposed else 0, True)
        return result

    @staticmethod
    def _own(path: str, module: Any, dim: int, writes: bool) -> list[Use]:
        bias = [Use(f"{path}.bias", 0, writes)] if module.bias is not None else []
        return [Use(f"{path}.weight", dim, writes), *bias]

    def _function(self, node: fx.Node) -> _Value | None:
        target, sources = node.target, node.all_input_nodes
        x = self.values[sources[0]] if sources and node.args and node.args[0] is sources[0] else None
        if target in _METADATA:
            return None
        if target in _BINARY and len(sources) == 2 and x is not None:
            return x if self._join(x, self.values[sources[1]]) else self._barrier(node)
        if x is None or len(sources) > 1:
            return self._barrier(node)
        if target in _ELEMENTWISE or target in _BINARY:
            return x
        if target in _POOLING and not x.last:
            return x
        if target in (torch.flatten, "flatten"):
            start, end = _arguments(node, ("start_dim", 0), ("end_dim", -1))
            return self._flatten(node, x, start, end)
        if target in (torch.mean, "mean") and not x.last:
            dims, keep = _arguments(node, ("dim", None), ("keepdim", False))
            if _are_positions(dims):
                return x if keep else replace(x, last=True)
        return self._barrier(node)

    def _flatten(self, node: fx.Node, x: _Value | None, start: Any, end: Any) -> _Value | None:
        if x is None or (start, end) != (1, -1) or (x.last and not x.flattened):
            return self._barrier(node)
        return replace(x, last=True, flattened=True)


def _norm_size(module: Any) -> int | None:
    """Channels of a norm or PReLU, whose parameters run over them; None for any other module."""
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return module.num_features
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and len(module.normalized_shape) == 1:
        return int(module.normalized_shape[0])
    if isinstance(module, nn.GroupNorm) and module.num_groups == 1:
        return module.num_channels
    return module.num_parameters if isinstance(module, nn.PReLU) else None


def _arguments(node: fx.Node, *defaults: tuple[str, Any]) -> list[Any]:
    """The arguments of a call after the first one."""
    given = dict(zip((name for name, _ in defaults), node.args[1:], strict=False))
    return [node.kwargs.get(name, given.get(name, default)) for name, default in defaults]


def _are_positions(dims: Any) -> bool:
    """Whether a reduction leaves the batch and the channels of `[B, C, H, W]` or `[B, C, L]` alone."""
    return isinstance(dims, (list, tuple)) and set(dims) in ({2, 3}, {-1, -2}, {2, 3, 4})


def _name(target: Any) -> str:
    return str(getattr(target, "__name__", target))
