"""What both paths of `predict` read off their arguments."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperfast.kernels.config import DOT_MINIMUM, next_power_of_2


@dataclass(frozen=True)
class Arguments:
    """The predictor and the rows that are asked for; every tensor contiguous."""

    embeddings: tuple[Tensor, ...]
    indices: Tensor
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    rows: Tensor | None
    fusion: str
    activation: str
    precision: str

    @classmethod
    def of(
        cls,
        embeddings: Sequence[Tensor],
        indices: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        rows: Tensor | None,
        fusion: str,
        activation: str,
        precision: str,
    ) -> Arguments:
        """From the arguments of `forward`; copies where something is not contiguous."""
        return cls(
            tuple(e.contiguous() for e in embeddings),
            indices.contiguous(),
            tuple(w.contiguous() for w in weights),
            tuple(b.contiguous() for b in biases),
            None if rows is None else rows.contiguous(),
            fusion,
            activation,
            precision,
        )

    @property
    def count(self) -> int:
        """Rows that are asked for."""
        return self.indices.shape[0] if self.rows is None else self.rows.shape[0]

    @property
    def width(self) -> int:
        """Of the hidden layers."""
        return self.weights[0].shape[0]

    @property
    def outputs(self) -> int:
        """Of a row."""
        return self.weights[-1].shape[0]

    @property
    def block_outputs(self) -> int:
        """`outputs`, as a matrix product wants it."""
        return max(DOT_MINIMUM, next_power_of_2(self.outputs))

    @property
    def hidden_layers(self) -> int:
        """Layers but the last."""
        return len(self.weights) - 1

    @property
    def parameters(self) -> int:
        """Elements of the flat gradient."""
        return sum(w.numel() + b.numel() for w, b in zip(self.weights, self.biases, strict=True))

    @property
    def element(self) -> torch.dtype:
        """Of the operands of the hidden products."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def embedding_widths(self) -> tuple[int, ...]:
        """Of every coordinate."""
        return tuple(e.shape[1] for e in self.embeddings)

    @property
    def embedding_offsets(self) -> tuple[int, ...]:
        """Where a coordinate's embedding begins in what the first layer reads."""
        if self.fusion == "sum":
            return (0,) * len(self.embeddings)
        return tuple(itertools.accumulate(self.embedding_widths, initial=0))[:-1]

    @property
    def factorised(self) -> bool:
        """Whether tables of the first layer cost less than the layer on every row."""
        return sum(e.shape[0] for e in self.embeddings) <= self.count

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Workspace on the parameters' device."""
        return torch.empty(shape, dtype=dtype, device=self.weights[0].device)


@dataclass(frozen=True)
class Wanted:
    """What a pass over the rows reads besides the predictor, and what it fills.

    Attributes:
        prediction: `[R, K]`, or `None`.
        loss: one element, or `None`.
        gradient: flat parameter gradient, or `None`.
        grad: dL/dprediction `[R, K]`, instead of targets.
        targets: `[N, K]`.
        element_weights: `[N, K]`, or `None` for ones.
    """

    prediction: Tensor | None = None
    loss: Tensor | None = None
    gradient: Tensor | None = None
    grad: Tensor | None = None
    targets: Tensor | None = None
    element_weights: Tensor | None = None
