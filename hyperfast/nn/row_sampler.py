"""Which kernels a step of reconstruction sees (NeRN, arXiv 2212.13554)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TypeAlias

import torch
from torch import Tensor

State: TypeAlias = "dict[str, Tensor | int | str]"

METHODS = ("random_weighted", "all", "layer", "random_layer", "uniform", "epoch")


class RowSampler:
    r"""Draws the rows of a step, `rows` of `hyperfast.nn.WeightPredictor`, on their device and without waiting for it.

    =================  ================================================================================================
    method             rows of a step
    =================  ================================================================================================
    random_weighted    with probability `uniform` as in `uniform`; otherwise `batch` rows drawn with replacement, row r
                       with probability :math:`n_r / \sum n`
    uniform            `batch` different rows, each set of them equally likely
    epoch              `batch` different rows, none twice until all have been; the last of an epoch may be fewer
    random_layer       all rows of a layer, drawn anew each step
    layer              all rows of layer 0, 1, ..., and from the first again
    all                all, as `None`
    =================  ================================================================================================

    What is random on the host (which of the two kinds, which layer) comes from `generator`, the rows from
    `device_generator`.

    Args:
        norms: n, `[N]`, finite and not negative, on the device of the rows: L2 norms of the kernels. Methods without
            norms look at its length and device only.
        batch: rows per step, 1 to N; `all`, `layer` and `random_layer` have no use for it.
        uniform: of `random_weighted`, 0 to 1.
        method: see above.
        layers: numbers of consecutive rows that make a layer; sum to N. For `layer` and `random_layer`.
        generator: on the CPU; by default a new one with a seed from torch's. `device_generator` is seeded from it.

    Attributes:
        device_generator: a `torch.Generator` on the device of `norms`.

    Raises:
        ValueError: arguments that cannot be.

    Notes:
        To capture a step in a CUDA graph: `graph.register_generator_state(sampler.device_generator)`, one graph with
        `draw("uniform")` and one with `draw("magnitude")`; then at each step replay the one that `choose()` names.

    Example:
        >>> sampler = RowSampler(kernels.norm(dim=1), 4096)
        >>> loss = predictor.squared_error(kernels, rows=sampler())

    Source: NeRN, arXiv 2212.13554 (maorash/NeRN), `weights_batch_method`; `uniform` is fixed at 0.8 there. Its gradient
    is not reweighted for the probability of a row, and a row that was drawn twice counts twice.
    """

    def __init__(
        self,
        norms: Tensor,
        batch: int,
        *,
        uniform: float = 0.8,
        method: str = "random_weighted",
        layers: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method is {method!r}; choose one of {', '.join(map(repr, METHODS))}")
        if norms.ndim != 1 or len(norms) == 0 or not norms.is_floating_point():
            raise ValueError(f"norms is {norms.dtype} {list(norms.shape)}; expected floats [N], one per kernel")
        if not 0 <= uniform <= 1:
            raise ValueError(f"uniform is {uniform}; expected a probability, 0 to 1")
        if method in ("random_weighted", "uniform", "epoch") and not 1 <= batch <= len(norms):
            count = len(norms)
            raise ValueError(f"batch is {batch}, but there are {count} rows; give 1 to {count}, or use method='all'")
        self.count, self.batch, self.uniform, self.method = len(norms), batch, uniform, method
        self.device = norms.device
        self._layers = _layers(layers, self.count) if method in ("layer", "random_layer") else []
        self._upper = _upper_bounds(norms) if method == "random_weighted" else None
        if generator is None:
            generator = torch.Generator().manual_seed(_seed(None))
        self.generator = generator
        self.device_generator = torch.Generator(self.device).manual_seed(_seed(generator))
        self._rows = torch.arange(self.count, device=self.device) if self._layers else None
        self._step = 0
        self._order: Tensor | None = None  # of the rows in the current epoch
        self._before_order: Tensor | None = None  # the device generator's state

    def __call__(self) -> Tensor | None:
        """The rows of the next step, int64 `[R]` on the device, or `None` for all."""
        return self.draw(self.choose())

    def choose(self) -> str:
        """What the next step draws: `"uniform"` or `"magnitude"`; for other methods than random_weighted its name."""
        if self.method != "random_weighted":
            return self.method
        drawn = float(torch.rand((), dtype=torch.float64, generator=self.generator))
        return "uniform" if drawn < self.uniform else "magnitude"

    def draw(self, kind: str) -> Tensor | None:
        """Rows of the kind that `choose` names. `"uniform"` and `"magnitude"` may be captured in a CUDA graph.

        Raises:
            ValueError: a kind that the sampler's method does not draw.
        """
        kinds = ("uniform", "magnitude") if self.method == "random_weighted" else (self.method,)
        if kind not in kinds:
            raise ValueError(f"kind is {kind!r}; method {self.method!r} draws {' or '.join(map(repr, kinds))}")
        rows = None
        if kind == "uniform":
            rows = self._uniform()
        elif kind == "magnitude":
            rows = self._magnitude()
        elif kind == "epoch":
            rows = self._of_epoch()
        elif kind == "layer":
            rows = self._layer(self._step % len(self._layers))
        elif kind == "random_layer":
            rows = self._layer(int(torch.randint(len(self._layers), (), generator=self.generator)))
        self._step += 1
        return rows

    def state_dict(self) -> State:
        """What the next draws depend on. Tensors on the CPU, numbers and strings."""
        within_epoch = self._order is not None and self._step % self._steps_per_epoch != 0
        device_state = self._before_order if within_epoch else self.device_generator.get_state()
        assert device_state is not None
        return self._signature() | {
            "step": self._step,
            "generator": self.generator.get_state(),
            "device_generator": device_state.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor | int | str]) -> None:
        """Go on where `state_dict` was taken: the draws that follow are the same, bit for bit.

        Raises:
            ValueError: the state of a sampler with another method, other sizes or another kind of device.
        """
        for name, own in self._signature().items():
            if state.get(name) != own:
                raise ValueError(f"the state is of a sampler with {name} {state.get(name)!r}; this one has {own!r}")
        step, host, device = state["step"], state["generator"], state["device_generator"]
        assert isinstance(step, int) and isinstance(host, Tensor) and isinstance(device, Tensor)
        self.generator.set_state(host)
        self.device_generator.set_state(device)
        self._step, self._order = step, None  # drawn again, by the generator as it was at the start of the epoch

    @property
    def _steps_per_epoch(self) -> int:
        return -(-self.count // self.batch)

    def _signature(self) -> State:
        return {"method": self.method, "rows": self.count, "batch": self.batch, "device": self.device.type}

    def _uniform(self) -> Tensor:
        # An exact draw of `batch` rows alone (Fisher-Yates with its exchanges resolved by a sort) is cheaper only from
        # about a million rows on, on the CPU, where a step takes seconds.
        return torch.randperm(self.count, generator=self.device_generator, device=self.device)[: self.batch]

    def _magnitude(self) -> Tensor:
        assert self._upper is not None
        upper, total = self._upper
        place = torch.rand(self.batch, dtype=torch.float64, generator=self.device_generator, device=self.device) * total
        return torch.searchsorted(upper, place, right=True)

    def _of_epoch(self) -> Tensor:
        position = self._step % self._steps_per_epoch * self.batch
        if position == 0 or self._order is None:
            self._before_order = self.device_generator.get_state()
            self._order = torch.randperm(self.count, generator=self.device_generator, device=self.device)
        return self._order[position : position + self.batch]

    def _layer(self, layer: int) -> Tensor:
        assert self._rows is not None
        start, stop = self._layers[layer]
        return self._rows[start:stop]


def _seed(generator: torch.Generator | None) -> int:
    return int(torch.randint(2**63 - 1, (), generator=generator))


def _layers(layers: Sequence[int] | None, count: int) -> list[tuple[int, int]]:
    """Where each layer starts and stops."""
    if not layers or min(layers) < 1 or sum(layers) != count:
        raise ValueError(f"layers is {layers}; give the positive numbers of rows of every layer, {count} in all")
    stops = list(accumulate(layers))
    return list(zip([0, *stops[:-1]], stops, strict=True))


def _upper_bounds(norms: Tensor) -> tuple[Tensor, float]:
    """Row r is drawn where a place in [0, total) is below bound r, and not below bound r - 1."""
    wide = norms.detach().double().cpu()
    bad = (~(wide.isfinite() & (wide >= 0))).nonzero()
    if len(bad):
        row = int(bad[0])
        raise ValueError(f"norms[{row}] is {float(wide[row])}; expected finite numbers that are not negative")
    if not wide.any():
        raise ValueError("norms are all 0, so that no row can be drawn by magnitude; use method='uniform'")
    # Summed on the CPU: a parallel sum need not rise from row to row.
    bounds = wide.cumsum(0)
    return bounds.to(norms.device), float(bounds[-1])
