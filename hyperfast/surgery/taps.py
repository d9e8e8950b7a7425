"""Taps: feature maps read out of any model while it runs, without editing the model.

`find_taps` says where to read, `taps` reads. Keys are module paths that student and teacher share, whatever wraps them.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

Where: TypeAlias = Literal["input", "output"]
Predicate: TypeAlias = Callable[[str, nn.Module], "bool | Where"]
At: TypeAlias = "str | Sequence[str] | Predicate"

ACTIVATIONS: tuple[type[nn.Module], ...] = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid,
    nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6, nn.RReLU, nn.SELU, nn.Sigmoid, nn.SiLU, nn.Softplus, nn.Softshrink,
    nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip
_POOLINGS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# layer1, stage2, denseblock3, encoder_layer_0; or the numbered children of stages, blocks, layers, layer, groups.
_NUMBERED_STAGE = re.compile(r"(?:^|[._]|dense)(?:layer|stage|block|group)_?\d+$")
_STAGE_OF_LIST = re.compile(r"(?:^|\.)(?:stages|blocks|layers|layer|groups)\.\d+$")


class TapKey(NamedTuple):
    """Where a feature map was read.

    Attributes:
        path: dotted path of the module, without the prefixes of wrappers.
        call: 0 for the module's first call of a forward, 1 for its second, ...
        where: `"output"` or `"input"` of the module.
    """

    path: str
    call: int
    where: Where

    def __str__(self) -> str:
        call = f"#{self.call}" if self.call else ""
        return f"{self.path}{call}{':input' if self.where == 'input' else ''}"


@dataclass(frozen=True)
class Tap:
    """A module to read, and which side of it."""

    path: str
    module: nn.Module
    where: Where

    def __str__(self) -> str:
        return f"{self.path}:{self.where}"


class TapRecord(Mapping[TapKey, Tensor]):
    """Feature maps of one network's last forward, by `TapKey`, in call order.

    Reading raises `RuntimeError` before the first forward, and where the network overwrote a map after it was taken.
    """

    def __init__(self, network: str) -> None:
        self.network = network
        self._calls: Counter[tuple[str, Where]] = Counter()
        # The version tells whether the tensor was written to since; None where it cannot have been.
        self._maps: dict[TapKey, tuple[Tensor, int | None]] = {}

    def clear(self) -> None:
        """Forget the last forward; call indices start at 0 again."""
        self._calls.clear()
        self._maps.clear()

    def add(self, path: str, where: Where, features: Tensor, version: int | None) -> None:
        """Append the next call of a tap."""
        key = TapKey(path, self._calls[path, where], where)
        self._calls[path, where] += 1
        self._maps[key] = (features, version)

    def __getitem__(self, key: TapKey) -> Tensor:
        features, version = self._recorded()[key]
        if version is not None and features._version != version:
            raise RuntimeError(
                f"{self.network} tap {str(key)!r} was overwritten in place after it was read, so its values are no "
                "longer those of the tap; use taps(..., clone=True), or replace the in-place operation that follows it"
            )
        return features

    def __iter__(self) -> Iterator[TapKey]:
        return iter(self._recorded())

    def __len__(self) -> int:
        return len(self._recorded())

    def __repr__(self) -> str:
        shapes = ", ".join(f"{key}: {list(features.shape)}" for key, (features, _) in self._maps.items())
        return f"TapRecord({self.network}; {shapes or 'no forward yet'})"

    def _recorded(self) -> dict[TapKey, tuple[Tensor, int | None]]:
        if not self._maps:
            raise RuntimeError(
                f"the {self.network} taps hold nothing: no forward of the {self.network} reached a tapped module "
                "inside the with block. If the model is compiled, it may have been compiled without the taps: call "
                "torch.compiler.reset() and make its first forward inside the block. If no teacher was given to "
                "taps(), it has no record."
            )
        return self._maps


@dataclass(frozen=True)
class Taps:
    """Records of the two networks; they stay readable after the `with` block."""

    student: TapRecord
    teacher: TapRecord


@contextlib.contextmanager
def taps(
    student: nn.Module,
    teacher: nn.Module | None = None,
    *,
    at: At = "stages",
    teacher_at: At | None = None,
    clone: bool = False,
    detach_teacher: bool = True,
) -> Iterator[Taps]:
    """Record feature maps of a student and a teacher during the forwards made inside the `with` block.

    Args:
        student: any module; also a `Hypernetwork`, a compiled module, or one inside DistributedDataParallel.
        teacher: any module. Put it in eval mode, otherwise distillation moves its statistics.
        at: where to read; one of

            - `"stages"`: the model's `tap_stages` (globs) where it declares them; else the outputs of its outermost
              numbered stages (`layer1`, `stage2`, `blocks.3`, ...); else, for a Sequential called `features`, the
              inputs of the layers that shrink the map and the output of the last layer.
            - `"activations"`: the *input* of every activation module (pre-activation maps, as activation-boundary
              distillation needs); where the model declares `tap_activations` (globs), of those that match. A VGG does:
              the activations of its classifier follow no feature map.
            - `"embedding"`: the input of the last linear layer, the pooled embedding that the classifier sees.
            - `"logits"`: the output of the last linear layer.
            - a glob over module paths, or several; `*` matches dots too. `":input"` or `":output"` may follow, the
              default is the output.
            - `predicate(path, module)`, returning True or `"output"`, `"input"`, or False.
        teacher_at: the same for a teacher whose modules have other names; default `at`.
        clone: copy every map. Needed where the model overwrites it with a functional in-place operation such as
            `out += shortcut`; reading such a map raises otherwise.
        detach_teacher: False keeps the graph of the teacher's maps, for a loss that differentiates them by the images.

    Yields:
        `Taps` with `.student` and `.teacher`, mappings from `TapKey` to tensor in call order. A second forward of a
        network replaces the record of its first.

    Raises:
        ValueError: nothing matches `at`; the message lists what it could have matched.
        TypeError: (in the forward) a tapped module takes or returns something else than a tensor.
        RuntimeError: (on reading) no forward was made, or a map was overwritten in place.

    Notes:
        Inside the block the `inplace` flags of all modules of both networks are off: an in-place activation would
        overwrite the map before it. They are restored at the end. A module called twice gives two maps.
        `torch.compile`: the first forward of a compiled model must be made inside the block, since the compiler does
        not notice hooks that are added later.

    Example:
        >>> with hyperfast.taps(student, teacher, at="stages") as taps:
        ...     logits = student(images)
        ...     with torch.no_grad():
        ...         teacher(images)
        >>> loss = F.cross_entropy(logits, labels) + AttentionTransfer(beta=1000)(taps.student, taps.teacher)
    """
    records = Taps(TapRecord("student"), TapRecord("teacher"))
    with contextlib.ExitStack() as stack:
        networks = [(student, at, records.student)]
        if teacher is not None:
            networks.append((teacher, at if teacher_at is None else teacher_at, records.teacher))
        found = [(network, find_taps(network, where), record) for network, where, record in networks]
        for network, points, record in found:
            stack.enter_context(_without_inplace(network))
            detach = detach_teacher and record is records.teacher
            _attach(network, points, record, clone, detach, stack)
        yield records


def find_taps(model: nn.Module, at: At = "stages") -> list[Tap]:
    """The modules that `taps(model, at=at)` reads, in the order of their definition.

    Raises:
        ValueError: nothing matches; the message lists the candidates, the nearest names first.
    """
    model = _network(model)
    modules = _named_modules(model)
    if callable(at):
        found = _by_predicate(modules, at)
    elif at == "activations":
        declared = getattr(model, "tap_activations", None)
        if declared is not None:
            modules = {tap.path: tap.module for tap in _by_globs(modules, declared, "tap_activations of the model")}
        found = [Tap(path, module, "input") for path, module in modules.items() if isinstance(module, ACTIVATIONS)]
    elif at in ("embedding", "logits"):
        side: Where = "input" if at == "embedding" else "output"
        linear = [Tap(path, module, side) for path, module in modules.items() if isinstance(module, nn.Linear)]
        found = linear[-1:]
    elif at == "stages":
        declared = getattr(model, "tap_stages", None)
        found = _stages(modules) if declared is None else _by_globs(modules, declared, "tap_stages of the model")
    else:
        found = _by_globs(modules, [at] if isinstance(at, str) else at, "at")
    if not found:
        hint = {
            "stages": "the model has no stages that are recognised by name; declare `tap_stages` on its class",
            "activations": "the model has no activation modules (a functional F.relu cannot be tapped at its input)",
            "embedding": "the model has no linear layer",
            "logits": "the model has no linear layer",
        }.get(at if isinstance(at, str) else "", "the predicate accepts no module")
        raise ValueError(f"at={at!r} taps nothing: {hint}, or give a glob. Modules: {_candidates(modules)}")
    return found


def _root(model: nn.Module) -> nn.Module:
    """`model` without the wrappers that call it exactly once: compiled, data parallel and averaged modules."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and list(model._modules) == ["module"]:
            inner = model._modules["module"]
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _network(model: nn.Module) -> nn.Module:
    """The module whose paths are shared by student and teacher: inside wrappers and hypernetworks."""
    model = _root(model)
    if isinstance(model._modules.get("primary"), nn.Module) and "trunk" in model._modules:
        return _network(model._modules["primary"])  # type: ignore[arg-type]
    return model


def _named_modules(network: nn.Module) -> dict[str, nn.Module]:
    """Modules that are called, by path. A compiled submodule stands for its own content."""
    modules: dict[str, nn.Module] = {}
    for path, module in network.named_modules():
        path = ".".join(part for part in path.split(".") if part != "_orig_mod")
        if path and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            modules[path] = module
    return modules


def _by_predicate(modules: Mapping[str, nn.Module], predicate: Predicate) -> list[Tap]:
    found = []
    for path, module in modules.items():
        where = predicate(path, module)
        if where:
            found.append(Tap(path, module, "input" if where == "input" else "output"))
    return found


def _by_globs(modules: Mapping[str, nn.Module], globs: Sequence[str], argument: str) -> list[Tap]:
    found: dict[Tap, None] = {}
    for glob in globs:
        pattern, _, suffix = glob.partition(":")
        if suffix not in ("", "input", "output"):
            raise ValueError(f"{argument}: {glob!r} ends in {':' + suffix!r}; use ':input' or ':output'")
        where: Where = "input" if suffix == "input" else "output"
        matching = [Tap(path, module, where) for path, module in modules.items() if fnmatch.fnmatchcase(path, pattern)]
        if not matching:
            raise ValueError(f"{argument}: {glob!r} matches no module. Modules: {_candidates(modules, pattern)}")
        found.update(dict.fromkeys(matching))
    return list(found)


def _candidates(modules: Mapping[str, nn.Module], pattern: str = "") -> str:
    """The first 20 module paths, those nearest to `pattern` in front."""
    near = difflib.get_close_matches(pattern, modules, n=5)
    paths = list(dict.fromkeys((*near, *modules)))
    more = f", ... and {len(paths) - 20} more" if len(paths) > 20 else ""
    return ", ".join(paths[:20]) + more


def _stages(modules: Mapping[str, nn.Module]) -> list[Tap]:
    named = [path for path in modules if _NUMBERED_STAGE.search(path) or _STAGE_OF_LIST.search(path)]
    if named:
        outermost = min(path.count(".") for path in named)
        return [Tap(path, modules[path], "output") for path in named if path.count(".") == outermost]
    for path, module in modules.items():
        if path.split(".")[-1] == "features" and isinstance(module, nn.Sequential):
            return _stages_of_features(path, module)
    return []


def _stages_of_features(path: str, features: nn.Sequential) -> list[Tap]:
    """A map is complete where it is about to shrink. The first layer's input is the image, no feature."""
    layers = [(f"{path}.{name}", layer) for name, layer in features.named_children()]
    found = [Tap(name, layer, "input") for name, layer in layers[1:] if _shrinks(layer)]
    if layers and not _shrinks(layers[-1][1]):
        found.append(Tap(*layers[-1], "output"))
    return found


def _shrinks(layer: nn.Module) -> bool:
    for module in layer.modules():
        stride = module.stride if isinstance(module, (*_POOLINGS, *_CONVOLUTIONS)) else 1
        if max(stride if isinstance(stride, tuple) else (stride,)) > 1:
            return True
    return False


@contextlib.contextmanager
def _without_inplace(model: nn.Module) -> Iterator[None]:
    changed: list[Any] = [module for module in model.modules() if getattr(module, "inplace", False) is True]
    for module in changed:
        module.inplace = False
    try:
        yield
    finally:
        for module in changed:
            module.inplace = True


def _attach(
    model: nn.Module, points: Sequence[Tap], record: TapRecord, clone: bool, detach: bool, stack: contextlib.ExitStack
) -> None:
    root = _root(model)

    def start(called: nn.Module, _args: Any) -> None:
        if called is root:
            record.clear()

    stack.callback(root.register_forward_pre_hook(start, prepend=True).remove)
    for point in points:
        stack.callback(_hook(point, record, clone, detach).remove)


def _hook(tap: Tap, record: TapRecord, clone: bool, detach: bool) -> torch.utils.hooks.RemovableHandle:
    """Attach one tap. Copies of the model made in the block carry the hook along; they are not recorded."""

    def keep(called: nn.Module, features: Any) -> None:
        if called is tap.module:
            features = _tensor(features, tap, record.network)
            record.add(tap.path, tap.where, *_snapshot(features, clone, detach))

    if tap.where == "output":
        return tap.module.register_forward_hook(lambda module, _args, output: keep(module, output))
    return tap.module.register_forward_pre_hook(
        lambda module, args, kwargs: keep(module, next(iter((*args, *kwargs.values())), None)), with_kwargs=True
    )


def _tensor(features: Any, tap: Tap, network: str) -> Tensor:
    if isinstance(features, Tensor):
        return features
    raise TypeError(
        f"{network} tap {str(tap)!r}: the module's {tap.where} is a {type(features).__name__}, not a tensor; "
        "tap a module inside it, or the next one's input"
    )


def _snapshot(features: Tensor, clone: bool, detach: bool) -> tuple[Tensor, int | None]:
    """The tensor to keep and the version it must still have when it is read."""
    if detach:
        features = features.detach()
    # A compiler returns the last value of a tensor that is overwritten; where nothing is, it drops the copy.
    if clone or torch.compiler.is_compiling():
        return features.clone(), None
    return features, None if features.is_inference() else features._version
