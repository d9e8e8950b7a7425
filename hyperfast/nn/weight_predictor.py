"""A network's kernels from their coordinates, as a layer (NeRN, arXiv 2212.13554)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperfast import functional

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "relu6": F.relu6,
    "elu": F.elu,
}
_RESIDUAL_AT = 2  # the layer that NeRN's residual variant adds the first one to
_FOURIER_SEED = 0  # NeRN's


class WeightPredictor(nn.Module):
    r"""An MLP from the coordinate (layer, filter, channel) of a kernel to its weights.

    .. math::
        \hat w = W_L \sigma(\dots \sigma(W_1 \gamma(l, f, c) + b_1) \dots) + b_L

    Args:
        sizes: how many layers, filters and channels there are at most; coordinates are smaller.
        hidden: width H of the hidden layers.
        coordinates: int32 or int64 `[N, 3]`, one row per kernel. `None`: all of `sizes`, channels fastest.
        layers: number of linear layers, 2 or more.
        outputs: K, weights per kernel; 9 for 3x3.
        base: b of the positional embedding :math:`\sin, \cos(\pi b^i p)`, i < `levels`.
        levels: of the embedding. A coordinate has 2 `levels` features.
        fusion: `"concat"` of the features of the three coordinates, or their `"sum"`.
        embedding: `"basic"`, the positional embedding; `"fourier"`, :math:`\sin, \cos(2 \pi B p)` with 3 `levels` rows
            of a normal B (drawn with seed 0), which mixes the coordinates and is kept as one row per kernel.
        gauss_scale: factors of the columns of B.
        normalization: `None`, whole numbers; `"local"`, (l / layers, f / filters, c / channels), the latter two of the
            kernel's own layer, as its coordinates show them; `"global"`, all divided by the largest of `sizes`. NeRN
            has the option and never reads it: what it trains is `None`, for which its base is made.
        activation: `"relu"`, `"leaky_relu"`, `"hardswish"`, `"gelu"`, `"relu6"` or `"elu"`.
        skip: `"nerf"` appends the embedding to the input of layer `layers // 2`; `"residual"` adds the first layer's
            pre-activation to that of layer 2, both counted from 0. They run layer by layer in plain PyTorch, not
            fused, and keep their activations. (In NeRN neither can be constructed.)
        precision: of the hidden products, as in `hyperfast.functional.predict`.
        frequencies: B of the Fourier features, float32 `[3 levels, 3]`, instead of a draw.

    Shape:
        `predictor()` is `[N, K]`, `predictor(rows)` `[R, K]`, in the dtype of the parameters whatever autocast says.

    Raises:
        ValueError: sizes, coordinates or options that cannot be.

    Attributes:
        layers: `nn.ModuleList` of `nn.Linear`, as PyTorch initialises them; what the state dict holds.
        indices: rows of the tables that a kernel reads, int32 `[N, J]`.
        frequencies: B of the Fourier features; `None` without.

    Notes:
        3 H^2 + 253 H + 9 parameters by default. Tables and indices follow from the arguments; they move with the
        module, but are not in its state dict.

    Example:
        >>> predictor = WeightPredictor((19, 64, 64), 140, coordinates)
        >>> loss = (predictor.squared_error(kernels) / kernels.numel()).sqrt()

    Source: NeRN, arXiv 2212.13554 (maorash/NeRN). A model trained there loads with `load_nern`.
    """

    indices: Tensor
    frequencies: Tensor | None

    def __init__(
        self,
        sizes: Sequence[int],
        hidden: int,
        coordinates: Tensor | None = None,
        *,
        layers: int = 5,
        outputs: int = 9,
        base: float = 0.76,
        levels: int = 40,
        fusion: str = "concat",
        embedding: str = "basic",
        gauss_scale: Sequence[float] = (1.0, 0.1, 0.1),
        normalization: str | None = None,
        activation: str = "relu",
        skip: str | None = None,
        precision: str = "fp32",
        frequencies: Tensor | None = None,
    ) -> None:
        super().__init__()
        _check_choices(fusion, embedding, normalization, activation, skip, precision)
        _check_numbers(hidden=(hidden, 1), layers=(layers, 2), outputs=(outputs, 1), levels=(levels, 1))
        if skip == "residual" and layers < _RESIDUAL_AT + 2:
            raise ValueError(f"layers is {layers}; skip='residual' adds to a hidden layer 2, so give at least 4")
        self.sizes, coordinates = _checked_coordinates(sizes, coordinates)
        self.fusion, self.embedding, self.normalization = fusion, embedding, normalization
        self.activation, self.skip, self.precision = activation, skip, precision
        self.hidden, self.base, self.levels, self.gauss_scale = hidden, base, levels, tuple(gauss_scale)
        positions = _normalized(coordinates, self.sizes, normalization)
        frequencies = _checked_frequencies(frequencies, embedding, levels, gauss_scale)
        self.register_buffer("frequencies", frequencies, persistent=False)
        if frequencies is not None:
            tables, indices = _fourier(positions, frequencies)
        else:
            tables, indices = _positional(positions, self.sizes, base, levels)
        for j, table in enumerate(tables):
            self.register_buffer(f"_embedding{j}", table, persistent=False)
        self.register_buffer("indices", indices.to(torch.int32), persistent=False)
        width = sum(table.shape[1] for table in tables) if fusion == "concat" else tables[0].shape[1]
        inputs = [width, *[hidden] * (layers - 1)]
        if skip == "nerf":
            inputs[layers // 2] += width
        self.layers = nn.ModuleList(
            nn.Linear(size, hidden if i < layers - 1 else outputs) for i, size in enumerate(inputs)
        )

    @property
    def configuration(self) -> dict[str, Any]:
        """The arguments that make it again, as JSON has them, but for `coordinates` and `frequencies`."""
        names = ("hidden", "base", "levels", "fusion", "embedding", "normalization", "activation", "skip", "precision")
        return {
            **{name: getattr(self, name) for name in names},
            "sizes": list(self.sizes),
            "layers": len(self.layers),
            "outputs": self._linear()[-1].out_features,
            "gauss_scale": list(self.gauss_scale),
        }

    @property
    def embeddings(self) -> list[Tensor]:
        """The J constant tables, as `hyperfast.functional.predict` takes them."""
        return [self.get_buffer(f"_embedding{j}") for j in range(self.indices.shape[1])]

    @property
    def weights(self) -> list[Tensor]:
        """Of the linear layers, first to last."""
        return [layer.weight for layer in self._linear()]

    @property
    def biases(self) -> list[Tensor]:
        """Of the linear layers, first to last."""
        return [layer.bias for layer in self._linear()]

    def forward(self, rows: Tensor | None = None) -> Tensor:
        """The kernels of `rows` (int64 `[R]`, with repetitions), `[R, K]`; of all N for `None`."""
        if self.skip is not None:
            return self._layer_by_layer(rows)
        return functional.predict(
            *self._network(), rows=rows, fusion=self.fusion, activation=self.activation, precision=self.precision
        )

    def squared_error(
        self, targets: Tensor, element_weights: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """The sum of w (prediction - target)^2 over the elements of `rows`, in one pass with its gradient.

        Args:
            targets: `[N, K]`, of which `rows` are taken.
            element_weights: w, `[N, K]`; 0 leaves an element out. `None`: 1.
            rows: int64 `[R]`, with repetitions, each of which counts. `None`: all.

        Returns:
            A scalar. NeRN's loss over P elements is `(it / P).sqrt()`.

        Raises:
            ValueError: targets or element_weights that are not `[N, K]`.
        """
        if self.skip is None:
            return functional.squared_error(
                *self._network(),
                targets,
                element_weights=element_weights,
                rows=rows,
                fusion=self.fusion,
                activation=self.activation,
                precision=self.precision,
            )
        shape = [self.indices.shape[0], self.weights[-1].shape[0]]
        for name, tensor in (("targets", targets), ("element_weights", element_weights)):
            if tensor is not None and list(tensor.shape) != shape:
                raise ValueError(f"{name} is {list(tensor.shape)}; expected {shape}, one row per kernel")
        squared = (self._layer_by_layer(rows) - _taken(targets.detach(), rows)).square()
        return (squared if element_weights is None else squared * _taken(element_weights.detach(), rows)).sum()

    def extra_repr(self) -> str:
        shown = {name: getattr(self, name) for name in ("fusion", "embedding", "normalization", "activation", "skip")}
        defaults = {"fusion": "concat", "embedding": "basic", "activation": "relu"}
        options = [f"{name}={value!r}" for name, value in shown.items() if value != defaults.get(name)]
        parameters = sum(parameter.numel() for parameter in self.parameters())
        kernels = f"sizes={self.sizes}, rows={len(self.indices)}"
        return ", ".join([kernels, *options, f"precision={self.precision!r}", f"parameters={parameters}"])

    def _linear(self) -> list[nn.Linear]:
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]

    def _network(self) -> tuple[list[Tensor], Tensor, list[Tensor], list[Tensor]]:
        return self.embeddings, self.indices, self.weights, self.biases

    def _layer_by_layer(self, rows: Tensor | None) -> Tensor:
        indices, activate = _taken(self.indices, rows), _ACTIVATIONS[self.activation]
        first, *others = self._linear()
        with torch.autocast(indices.device.type, enabled=False):
            z = start = self._embedded(indices, first.weight) + first.bias
            for i, layer in enumerate(others, 1):
                x = activate(z)
                z = F.linear(x, layer.weight[:, : x.shape[1]], layer.bias)
                if layer.in_features > x.shape[1]:
                    z = z + self._embedded(indices, layer.weight[:, x.shape[1] :])
                if self.skip == "residual" and i == _RESIDUAL_AT:
                    z = z + start
        return z

    def _embedded(self, indices: Tensor, weight: Tensor) -> Tensor:
        """The product of the kernels' embeddings with `weight`, by way of one small table per coordinate."""
        tables = self.embeddings
        parts = weight.split([e.shape[1] for e in tables], 1) if self.fusion == "concat" else [weight] * len(tables)
        products = [e @ part.t() for e, part in zip(tables, parts, strict=True)]
        total = F.embedding(indices[:, 0], products[0])
        for j, product in enumerate(products[1:], 1):
            total = total + F.embedding(indices[:, j], product)
        return total


def _taken(of_rows: Tensor, rows: Tensor | None) -> Tensor:
    return of_rows if rows is None else of_rows[rows]


def _check_choices(
    fusion: str, embedding: str, normalization: str | None, activation: str, skip: str | None, precision: str
) -> None:
    for name, given, choices in (
        ("fusion", fusion, ("concat", "sum")),
        ("embedding", embedding, ("basic", "fourier")),
        ("normalization", normalization, (None, "local", "global")),
        ("activation", activation, tuple(_ACTIVATIONS)),
        ("skip", skip, (None, "nerf", "residual")),
        ("precision", precision, ("fp32", "tf32", "bf16")),
    ):
        if given not in choices:
            raise ValueError(f"{name} is {given!r}; choose one of {', '.join(map(repr, choices))}")
    if embedding == "fourier" and fusion == "sum":
        raise ValueError("fusion is 'sum', but Fourier features already mix the coordinates; use fusion='concat'")
    if skip is not None and precision != "fp32":
        raise ValueError(f"precision is {precision!r}, but skip={skip!r} is not fused; use precision='fp32'")


def _check_numbers(**numbers: tuple[int, int]) -> None:
    for name, (given, least) in numbers.items():
        if given < least:
            raise ValueError(f"{name} is {given}; give at least {least}")


def _checked_coordinates(sizes: Sequence[int], coordinates: Tensor | None) -> tuple[tuple[int, int, int], Tensor]:
    """`sizes` as a tuple, and coordinates int64 `[N, 3]` on the CPU."""
    if len(sizes) != 3 or any(size < 1 for size in sizes):
        raise ValueError(f"sizes is {tuple(sizes)}; expected three positive numbers (layers, filters, channels)")
    triple = (int(sizes[0]), int(sizes[1]), int(sizes[2]))
    if coordinates is None:
        return triple, torch.cartesian_prod(*(torch.arange(size) for size in triple))
    if coordinates.dtype not in (torch.int32, torch.int64) or coordinates.ndim != 2 or coordinates.shape[1] != 3:
        raise ValueError(
            f"coordinates is {coordinates.dtype} {list(coordinates.shape)}; expected int32 or int64 [N, 3], "
            "a (layer, filter, channel) for every kernel"
        )
    if len(coordinates) == 0:
        raise ValueError("coordinates has no rows; there is no kernel to predict")
    coordinates = coordinates.cpu().long()
    outside = ((coordinates < 0) | (coordinates >= torch.tensor(triple))).any(1).nonzero()
    if len(outside):
        row = int(outside[0])
        raise ValueError(f"coordinates[{row}] is {coordinates[row].tolist()}; it must be below sizes {triple}, from 0")
    return triple, coordinates


def _normalized(coordinates: Tensor, sizes: Sequence[int], normalization: str | None) -> Tensor:
    if normalization is None:
        return coordinates
    if normalization == "global":
        return (coordinates.double() / max(sizes)).float()
    layer, others = coordinates[:, 0], coordinates[:, 1:]
    largest = torch.zeros(sizes[0], 2, dtype=torch.int64).scatter_reduce_(
        0, layer[:, None].expand(-1, 2), others, "amax"
    )
    counts = largest + 1
    of_row = torch.cat((torch.full((len(layer), 1), sizes[0]), counts[layer]), 1)
    return (coordinates.double() / of_row).float()


def _positional(positions: Tensor, sizes: Sequence[int], base: float, levels: int) -> tuple[list[Tensor], Tensor]:
    if not (base > 0 and math.isfinite(base)):
        raise ValueError(f"base is {base}; expected a positive number")
    if not positions.is_floating_point():
        return [functional.positional_embedding(size, base, levels) for size in sizes], positions
    # pi b^i p is 2 pi (b^i / 2) p, also in floating point: half a number is exact.
    frequencies = torch.tensor(base).double() ** torch.arange(levels)
    tables, columns = [], []
    for axis in positions.unbind(1):
        values, index = axis.unique(return_inverse=True)
        tables.append(functional.fourier_features(values[:, None], frequencies.float()[:, None] / 2))
        columns.append(index)
    return tables, torch.stack(columns, 1)


def _checked_frequencies(
    frequencies: Tensor | None, embedding: str, levels: int, gauss_scale: Sequence[float]
) -> Tensor | None:
    """B as it was given, or drawn; None for another embedding."""
    if embedding != "fourier":
        if frequencies is not None:
            raise ValueError(f"frequencies are given, but embedding={embedding!r} has none; use embedding='fourier'")
        return None
    scale = torch.tensor(gauss_scale, dtype=torch.float32)
    if scale.shape != (3,):
        raise ValueError(f"gauss_scale is {gauss_scale}; expected three numbers (layer, filter, channel)")
    if frequencies is None:
        return torch.randn(3 * levels, 3, generator=torch.Generator().manual_seed(_FOURIER_SEED)) * scale
    if frequencies.dtype != torch.float32 or tuple(frequencies.shape) != (3 * levels, 3):
        raise ValueError(
            f"frequencies is {frequencies.dtype} {list(frequencies.shape)}; expected torch.float32 [{3 * levels}, 3], "
            "three rows for each of the levels"
        )
    return frequencies.detach().cpu().clone()


def _fourier(positions: Tensor, frequencies: Tensor) -> tuple[list[Tensor], Tensor]:
    return [functional.fourier_features(positions, frequencies)], torch.arange(len(positions))[:, None]
