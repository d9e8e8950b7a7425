"""Where the condition z of a hypernetwork comes from, behind one interface."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence

KINDS = ("constant", "learned", "per_layer", "per_target", "external", "stochastic")


class Condition(nn.Module):
    """Rows z for `hyperfast.functional.generate`: those given at the call, else its own.

    Attributes:
        kind: short name.
        size: D, the width of a row.
        offsets: `None` where one row serves all generated weights; else int64 `[S + 1]`, the segments of theta that
            have a row each.
        steady: whether `rows()` gives the same rows until its parameters change.
    """

    kind = "condition"
    steady = False
    offsets: Tensor | None

    def __init__(self, size: int, offsets: Tensor | None = None) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"condition_size is {size}; expected at least 1")
        self.size = size
        self.register_buffer("offsets", offsets, persistent=False)

    def forward(self, condition: Tensor | None = None) -> Tensor:
        """`condition` where it is given (already checked), else `rows()`."""
        return self.rows() if condition is None else condition

    def rows(self) -> Tensor:
        """The condition's own rows: `[D]`, or `[S, D]` with offsets."""
        raise NotImplementedError

    def typical(self) -> Tensor:
        """Rows `[N, D]` whose statistics stand for those met in training; initialisation and step sizes use them."""
        return self.rows().detach().view(-1, self.size)

    @property
    def segments(self) -> int | None:
        """S, or `None` where all weights share one row."""
        return None if self.offsets is None else self.offsets.shape[0] - 1

    def extra_repr(self) -> str:
        segments = f", {self.segments} rows" if self.segments else ""
        return f"size={self.size}{segments}"


class ConstantCondition(Condition):
    """A fixed row, by default 0.5 everywhere, where both halves of the `cos|sin` encoding are 1/sqrt(2).

    This is the way to hypernetise a network that has no hyperparameter; closest to HyperLight with a constant input.

    Args:
        size: D.
        value: a number, or D of them, in [0, 1].
    """

    kind = "constant"
    steady = True
    value: Tensor

    def __init__(self, size: int = 1, value: float | Sequence[float] | Tensor = 0.5) -> None:
        super().__init__(size)
        row = torch.as_tensor(value, dtype=torch.get_default_dtype()).expand(size).clone()
        if not bool(((row >= 0) & (row <= 1)).all()):
            raise ValueError(f"the constant condition is {value}; expected values in [0, 1]")
        self.register_buffer("value", row)

    def rows(self) -> Tensor:
        return self.value


class StochasticCondition(ConstantCondition):
    """z ~ U[0, 1] anew in every training forward: a family of networks. In eval mode the fixed row (0.5).

    The model's batch norm statistics are those of the whole family; re-estimate them for the condition that is used.
    Under DistributedDataParallel every process draws its own row.
    """

    kind = "stochastic"
    steady = False

    def rows(self) -> Tensor:
        return torch.rand_like(self.value) if self.training else self.value

    def typical(self) -> Tensor:
        return _grid(self.size).to(self.value)


class LearnedCondition(Condition):
    """A learned row gamma = sigmoid(v), v = 0 at first; `cos|sin` then stays on the manifold of constant norm."""

    kind = "learned"
    steady = True

    def __init__(self, size: int = 1) -> None:
        super().__init__(size)
        self.logit = nn.Parameter(torch.zeros(size))

    def rows(self) -> Tensor:
        return self.logit.sigmoid()


class PerLayerCondition(Condition):
    """One learned row gamma_l = sigmoid(v_l) per layer (or per target): layers share the trunk, not the features.

    This removes most of the coupling by which one layer's gradient moves the weights of another. gamma_l starts as
    U[0.05, 0.95], so that layers differ and none starts where the sigmoid is flat.

    Args:
        lengths: number of consecutive generated weights per row; they sum to P.
        size: D.
        kind: how it is called in reports.
    """

    steady = True

    def __init__(self, lengths: Sequence[int], size: int = 1, kind: str = "per_layer") -> None:
        offsets = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
        super().__init__(size, offsets)
        self.kind = kind
        self.logit = nn.Parameter(torch.empty(len(lengths), size).uniform_(0.05, 0.95).logit())

    def rows(self) -> Tensor:
        return self.logit.sigmoid()


class ExternalCondition(Condition):
    """No row of its own: the caller gives one at every call, such as a hyperparameter scaled to [0, 1]."""

    kind = "external"

    def rows(self) -> Tensor:
        raise ValueError(
            f"this hypernetwork takes an external condition: call it with condition=a tensor [{self.size}] or "
            f"[B, {self.size}]"
        )

    def typical(self) -> Tensor:
        return _grid(self.size)


def make_condition(kind: str, size: int, layers: Sequence[int], targets: Sequence[int]) -> Condition:
    """The condition called `kind`, for layers and targets of the given numbers of weights."""
    if kind == "constant":
        return ConstantCondition(size)
    if kind == "learned":
        return LearnedCondition(size)
    if kind == "per_layer":
        return PerLayerCondition(layers, size)
    if kind == "per_target":
        return PerLayerCondition(targets, size, kind)
    if kind == "external":
        return ExternalCondition(size)
    if kind == "stochastic":
        return StochasticCondition(size)
    raise ValueError(f"condition is {kind!r}; choose one of {', '.join(map(repr, KINDS))}, or give a Condition")


def check_condition(given: Tensor, condition: Condition, device: torch.device, encoding: str) -> None:
    """Raise unless `given` is fit to be `condition`'s rows.

    Values are looked at without waiting for a device: at once on the CPU, by an assertion in the device's stream on
    CUDA and in compiled code (there the error is a `RuntimeError` with the same text).

    Raises:
        TypeError: not a tensor.
        ValueError: dtype, shape, device, or values outside [0, 1] or NaN. Without an encoding (`"none"`) any finite
            value is good.
    """
    if not isinstance(given, Tensor):
        raise TypeError(f"condition is a {type(given).__name__}; expected a floating point tensor")
    if not given.is_floating_point():
        raise ValueError(f"condition is {given.dtype}; expected a floating point tensor")
    row = [condition.size] if condition.segments is None else [condition.segments, condition.size]
    if list(given.shape[-len(row) :]) != row or given.ndim > len(row) + 1:
        batched = ", ".join(map(str, ["B", *row]))
        raise ValueError(f"condition is {list(given.shape)}; this hypernetwork takes {row} or [{batched}]")
    if given.device != device:
        raise ValueError(f"condition is on {given.device} but the hypernetwork on {device}; use condition.to({device})")
    _check_values(given, encoding)


def _check_values(given: Tensor, encoding: str) -> None:
    bounded = encoding != "none"
    good = ((given >= 0) & (given <= 1)).all() if bounded else given.isfinite().all()
    what = "a value outside [0, 1] or NaN" if bounded else "a value that is not finite"
    message = f"condition holds {what}; the encoding {encoding!r} takes {'[0, 1]' if bounded else 'finite numbers'}"
    if torch.compiler.is_compiling() or given.is_cuda:
        torch._assert_async(good, message)
    elif given.device.type == "cpu" and not good:
        raise ValueError(f"{message}: got {given.tolist()}" if given.numel() <= 16 else message)


def _grid(size: int) -> Tensor:
    return torch.linspace(0, 1, 101)[:, None].expand(-1, size)
