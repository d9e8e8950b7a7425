"""Which weights of a network a predictor of weights covers, and in which order."""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from hyperfast.surgery.select import CONVOLUTIONS, LAYERS, NORMS, TRANSPOSED
from hyperfast.surgery.tiling import CROPS, TILES, CoveredTensor, choose_tiling, fits, grid_coordinates

POLICIES = ("all", "nern")
_FORMAT = 1
_CLASSIFIERS = ("classifier", "head", "fc", "linear")


@dataclass(frozen=True)
class Coverage:
    """The covered weights of a network, as rows that a predictor computes.

    A row (layer l, filter f, channel c) holds up to K = kernel^2 elements. Rows are ordered by l, then f, then c: the
    natural grid.

    Attributes:
        tensors: the covered weights in order; l is the position in here.
        kernel: side of the predictor's square output.
    """

    tensors: tuple[CoveredTensor, ...]
    kernel: int = 3
    _starts: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        starts = [0]
        for tensor in self.tensors:
            starts.append(starts[-1] + tensor.rows)
        object.__setattr__(self, "_starts", tuple(starts))

    @property
    def rows(self) -> int:
        """N, rows of all tensors."""
        return self._starts[-1]

    @property
    def weights(self) -> int:
        """P, covered elements."""
        return sum(tensor.numel for tensor in self.tensors)

    @property
    def outputs(self) -> int:
        """K, elements of a row."""
        return self.kernel**2

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """(filters, channels) of each tensor's rows."""
        return tuple((tensor.filters, tensor.channels) for tensor in self.tensors)

    def slices(self) -> tuple[slice, ...]:
        """The rows of each tensor."""
        return tuple(slice(a, b) for a, b in zip(self._starts, self._starts[1:], strict=False))

    def coordinates(self) -> Tensor:
        """int64 `[N, 3]`: (layer, filter, channel) of each row."""
        return torch.cat([grid_coordinates(layer, *grid) for layer, grid in enumerate(self.grids)])

    def element_weights(self) -> Tensor | None:
        """float32 `[N, K]`, 1 where a row has an element and 0 where it is masked; None where none is."""
        if self.weights == self.rows * self.outputs:
            return None
        return self.gather({tensor.name: torch.ones(tensor.shape) for tensor in self.tensors})

    def gather(self, state: Mapping[str, Tensor]) -> Tensor:
        """`[N, K]`: the rows of the natural grid, 0 where masked.

        Args:
            state: a state dict, or any mapping that has the covered names; what else it has is ignored.

        Raises:
            ValueError: a covered weight is missing or has another shape.

        Notes:
            With `crop="average"` or `"max"` a smaller kernel still lies in the middle of its square: no row of
            targets exists for a prediction that is pooled. Compare `scatter` of the prediction with the weights then.
        """
        self._check({name: tensor.shape for name, tensor in state.items()}, "the state")
        return torch.cat([tensor.gather(state[tensor.name]) for tensor in self.tensors])

    def scatter(self, rows: Tensor) -> dict[str, Tensor]:
        """The covered weights by name, from rows `[N, K]` in natural order; differentiable, views where possible.

        Raises:
            ValueError: `rows` has another shape.
        """
        if tuple(rows.shape) != (self.rows, self.outputs):
            raise ValueError(f"rows are {list(rows.shape)}; this coverage has [{self.rows}, {self.outputs}]")
        pieces = zip(self.tensors, self.slices(), strict=True)
        return {tensor.name: tensor.scatter(rows[piece]) for tensor, piece in pieces}

    def check(self, module: nn.Module) -> None:
        """Raise a ValueError that says what changed unless `module` has every covered weight in its shape."""
        shapes = {name: parameter.shape for name, parameter in module.named_parameters(remove_duplicate=False)}
        self._check(shapes, f"the network ({type(module).__name__})")

    def _check(self, shapes: Mapping[str, Sequence[int]], what: str) -> None:
        changes = []
        for tensor in self.tensors:
            if tensor.name not in shapes:
                changes.append(f"{tensor.name} is missing{_nearest(tensor.name, shapes)}")
            elif tuple(shapes[tensor.name]) != tensor.shape:
                changes.append(f"{tensor.name} is {list(shapes[tensor.name])}, was {list(tensor.shape)}")
        if changes:
            raise ValueError(f"{what} is not what the coverage was made for: {_some(changes, '; ')}")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of names, shapes and layouts."""
        return hashlib.sha256(json.dumps(self._description()).encode()).hexdigest()

    def to_json(self) -> str:
        """The coverage as text, with its fingerprint."""
        return json.dumps({**self._description(), "fingerprint": self.fingerprint})

    @classmethod
    def from_json(cls, text: str) -> Coverage:
        """The coverage that `to_json` wrote.

        Raises:
            ValueError: it is no such text, of a later format, or was changed since.
        """
        try:
            read = json.loads(text)
            if read["format"] != _FORMAT:
                raise ValueError(f"format {read['format']!r}; this version reads {_FORMAT}")
            tensors = [
                CoveredTensor(t["name"], tuple(t["shape"]), t["how"], read["kernel"], t["crop"])
                for t in read["tensors"]
            ]
            coverage, fingerprint = cls(tuple(tensors), read["kernel"]), read["fingerprint"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"this is no coverage: {error}") from error
        if coverage.fingerprint != fingerprint:
            raise ValueError("the coverage was changed after it was written: its fingerprint does not match")
        return coverage

    def _description(self) -> dict[str, Any]:
        tensors = [{"name": t.name, "shape": t.shape, "how": t.how, "crop": t.crop} for t in self.tensors]
        return {"format": _FORMAT, "kernel": self.kernel, "tensors": tensors}


def cover(
    module: nn.Module,
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    kernel: int = 3,
    policy: str = "all",
    tile: str = "auto",
    crop: str = "center",
) -> Coverage:
    """Choose the weights of `module` that a predictor of `kernel` x `kernel` outputs is to cover.

    Args:
        module: any module. Weights are taken in the order of its modules; one that is shared is taken once.
        include: glob, or globs, over parameter names (`*` matches dots too): exactly these parameters, whatever they
            are (of at least one dimension), instead of the choice of `policy`.
        exclude: globs of parameters to leave out.
        kernel: side of the predictor's output.
        policy: - `"all"`: the weights of all convolutions (1d, 2d, 3d, transposed, grouped) and linear layers, and
                  every other parameter of two or four dimensions, as those of attention, embeddings and recurrent
                  layers. Nothing is wasted: what is smaller than a row is packed, what is larger is split.
                - `"nern"`: NeRN's choice and layout, one kernel per row: every Conv2d whose kernel fits, 1x1 as the
                  centre tap, but for the classifier (of a path that starts with `classifier`, `head`, `fc` or
                  `linear`). Where the network also has a convolution that does not fit (the 7x7 stem of an ImageNet
                  ResNet), 1x1 convolutions are left out as well. This is what NeRN covers in CIFAR ResNets of both
                  shortcuts, in torchvision's ResNet-18 and in SqueezeNet.
        tile: how `"all"` packs weights without taps: `"row"` (runs of consecutive channels), `"block"` (kernel x
            kernel squares of filters and channels) or `"auto"`, the one of fewer rows.
        crop: how `"nern"` gets a kernel smaller than the output from it: `"center"`, or pooling by `"average"` or
            `"max"` with stride 1, which `Coverage.scatter` applies.

    Raises:
        ValueError: an unknown option; a glob that matches nothing; nothing left to cover; under `"nern"` an included
            weight whose kernel is larger than the output; a parameter that is not initialised or not floating point.

    Source: github.com/maorash/NeRN for `"nern"`; its center crop takes [(K - k) // 2, (K + k) // 2).
    """
    for name, given, choices in (("policy", policy, POLICIES), ("tile", tile, TILES), ("crop", crop, CROPS)):
        if given not in choices:
            raise ValueError(f"{name} is {given!r}; choose one of {', '.join(map(repr, choices))}")
    if kernel < 1:
        raise ValueError(f"kernel is {kernel}; the side of the predictor's output is at least 1")
    if (policy == "all" and crop != "center") or (policy == "nern" and tile != "auto"):
        raise ValueError(
            f"policy={policy!r} does not go with tile={tile!r}, crop={crop!r}: only 'all' tiles and only 'nern' crops"
        )
    owners = _owners(module)
    parameters = {name: parameter for name, (_, parameter) in owners.items()}
    if include is not None:
        chosen = _matching(parameters, include, "include")
    elif policy == "nern":
        chosen = _choice_of_nern(owners, kernel)
    else:
        chosen = [name for name, (owner, parameter) in owners.items() if _is_weight(owner, parameter)]
    left_out = set(_matching(parameters, exclude, "exclude")) if exclude is not None else set()
    chosen = [name for name in chosen if name not in left_out]
    if not chosen:
        raise ValueError(
            f"there is nothing to cover in {type(module).__name__} with policy={policy!r}, include={include!r}, "
            f"exclude={exclude!r}. Parameters: {_some(parameters)}"
        )
    tensors = []
    for name in chosen:
        _check_parameter(name, parameters[name])
        shape = tuple(parameters[name].shape)
        if policy == "all":
            tensors.append(CoveredTensor(name, shape, choose_tiling(shape, kernel, tile), kernel))
        elif not fits(shape, kernel):
            raise ValueError(
                f"{name} {list(shape)} does not fit into {kernel}x{kernel} outputs, which policy='nern' needs; "
                "take a larger kernel, leave it out, or use policy='all', which splits it"
            )
        else:
            tensors.append(CoveredTensor(name, shape, "kernel", kernel, crop))
    return Coverage(tuple(tensors), kernel)


def _owners(module: nn.Module) -> dict[str, tuple[nn.Module, nn.Parameter]]:
    """Every parameter once, under its first name, with the module that owns it."""
    owners: dict[str, tuple[nn.Module, nn.Parameter]] = {}
    seen: set[int] = set()
    for path, owner in module.named_modules():
        for leaf, parameter in owner._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                owners[f"{path}.{leaf}" if path else leaf] = (owner, parameter)
    return owners


def _is_weight(owner: nn.Module, parameter: nn.Parameter) -> bool:
    if isinstance(parameter, nn.parameter.UninitializedParameter) or isinstance(owner, LAYERS):
        return parameter is owner._parameters.get("weight")
    return parameter.ndim in (2, 4) and parameter.is_floating_point() and not isinstance(owner, NORMS)


def _choice_of_nern(owners: Mapping[str, tuple[nn.Module, nn.Parameter]], kernel: int) -> list[str]:
    convolutions = [
        (name, owner)
        for name, (owner, parameter) in owners.items()
        if isinstance(owner, (*CONVOLUTIONS, *TRANSPOSED)) and parameter is owner._parameters.get("weight")
    ]
    largest = max((max(owner.kernel_size) for _, owner in convolutions), default=0)
    least_taps = 1 if largest <= kernel else 2
    return [
        name
        for name, owner in convolutions
        if isinstance(owner, nn.Conv2d)
        and max(owner.kernel_size) <= kernel
        and prod(owner.kernel_size) >= least_taps
        and name.split(".")[0] not in _CLASSIFIERS
    ]


def _matching(parameters: Mapping[str, Tensor], globs: str | Sequence[str], argument: str) -> list[str]:
    globs = [globs] if isinstance(globs, str) else list(globs)
    for glob in globs:
        if not fnmatch.filter(parameters, glob):
            raise ValueError(
                f"{argument}: the glob {glob!r} matches no parameter{_nearest(glob, parameters)}. "
                f"Parameters: {_some(parameters)}"
            )
    return [name for name in parameters if any(fnmatch.fnmatchcase(name, glob) for glob in globs)]


def _check_parameter(name: str, parameter: nn.Parameter) -> None:
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise ValueError(f"{name} has no shape yet (a lazy module); run the network once before covering it")
    if not parameter.is_floating_point() or parameter.numel() == 0 or parameter.ndim == 0:
        raise ValueError(
            f"{name} is {parameter.dtype} {list(parameter.shape)}; only weights of at least one dimension and one "
            "element, of a floating point type, can be covered"
        )


def _nearest(name: str, names: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(names), n=3)
    return f" (did you mean {' or '.join(matches)}?)" if matches else ""


def _some(items: Iterable[str], separator: str = ", ") -> str:
    items = list(items)
    more = f"{separator}and {len(items) - 10} more" if len(items) > 10 else ""
    return separator.join(items[:10]) + more
