"""A network whose weights come from a hypernetwork, called like the network itself."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hyperfast import functional
from hyperfast.nn.apply import apply_groups
from hyperfast.nn.conditions import Condition, check_condition

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hyperfast.nn.cost import CostReport
    from hyperfast.surgery import Target


class StepFactors(NamedTuple):
    """By how much a step on theta0 and head together moves theta further than the learning rate says.

    Attributes:
        sgd: 1 + ||h||_2^2.
        adam: 1 + ||h||_1, of Adam's first step.
    """

    sgd: float
    adam: float


class Hypernetwork(nn.Module):
    """A model (`primary`) whose selected parameters are generated from a condition at every forward.

    `hyperfast.hypernetize` builds and initialises one. As constructed here it computes what the model computed
    (theta0 holds the model's values, the head is zero) and takes `primary` over: its generated parameters become
    empty slots, absent from `parameters()` and `state_dict()`.

    Args:
        primary: the model; changed in place.
        targets: what to generate, from `hyperfast.surgery.select_parameters(primary, ...)`.
        condition: where the condition comes from.
        hidden: widths of the trunk's hidden layers. May be empty.
        encoding: as in `hyperfast.functional.generate`.
        activation: as in `hyperfast.functional.generate`.
        negative_slope: as in `hyperfast.functional.generate`.

    Attributes:
        primary: the model with empty slots.
        condition: the `Condition`.
        trunk: `nn.ModuleList` of `nn.Linear`.
        head: `nn.Linear` without bias; `weight` is `[P, H]`.
        theta0: additive weights `[P]` (HyperLight's bias of the last layer).
        targets: the generated parameters in the order of theta.
        head_gradient_is_factored: whether an optimiser updates the head from the factors of its gradient
            (`hyperfast.optim.factor_head`); the head then wants no gradient of its own.
    """

    def __init__(
        self,
        primary: nn.Module,
        targets: Sequence[Target],
        condition: Condition,
        *,
        hidden: Sequence[int] = (16, 64, 128),
        encoding: str = "cos|sin",
        activation: str = "leaky_relu",
        negative_slope: float = 0.01,
    ) -> None:
        super().__init__()
        if any(width < 1 for width in hidden):
            raise ValueError(f"hidden is {tuple(hidden)}; every width must be at least 1")
        self.encoding, self.activation, self.negative_slope = encoding, activation, negative_slope
        self.targets = tuple(targets)
        self.head_gradient_is_factored = False
        self._sizes = [target.numel for target in self.targets]
        values = _take_over(primary, self.targets)
        device, dtype = values.device, values.dtype
        self.condition = condition.to(device, dtype)
        self.trunk = nn.ModuleList()
        width = condition.size * (1 if encoding == "none" else 2)
        for size in hidden:
            self.trunk.append(nn.Linear(width, size, device=device, dtype=dtype))
            width = size
        # On the meta device first: Linear's own draw takes seconds for a large matrix.
        self.head = nn.Linear(width, len(values), bias=False, device="meta", dtype=dtype).to_empty(device=device)
        nn.init.zeros_(self.head.weight)
        self.theta0 = nn.Parameter(values)
        self.primary = primary
        self._slots = [_distinct_slots(primary, target) for target in self.targets]

    def forward(self, *args: Any, condition: Tensor | None = None, **kwargs: Any) -> Any:
        """The model's output under generated weights.

        Args:
            *args: what the model takes. (A `condition` of the model's own must be passed by position.)
            **kwargs: what the model takes by name.
            condition: z in [0, 1]; `[D]`, or `[S, D]` for a condition per layer. `None`: the hypernetwork's own. With
                a leading dimension B the conditions are *applied*: the N samples (dimension 0 of the first tensor
                argument) are cut into B equal consecutive groups, each run under its own weights, and the outputs
                come back as one batch of N. Positional tensors with N rows are cut; other arguments go to every
                group whole. One vectorised run where possible; batch norm in training mode, and forward hooks such
                as taps, need the groups to run one after another.

        Raises:
            ValueError: a condition that does not fit, or N not a multiple of B.
        """
        theta = self._theta(condition)
        if theta.ndim == 2 and theta.shape[0] == 1:
            theta = theta[0]
        weights = self._weights(theta)
        if theta.ndim == 1:
            return functional_call(self.primary, weights, args, kwargs, tie_weights=False)
        return apply_groups(self.primary, weights, theta.shape[0], args, kwargs)

    def generate(self, condition: Tensor | None = None) -> dict[str, Tensor]:
        """The generated parameters by canonical name, with a leading B for a batch of conditions.

        They are views of one flat tensor. Conditions are as in `forward`.
        """
        theta = self._theta(condition)
        return {target.name: part for target, part in zip(self.targets, self._views(theta), strict=True)}

    @torch.no_grad()
    def materialize(self, condition: Tensor | None = None) -> nn.Module:
        """A copy of the model with the weights of one condition baked in, free of the hypernetwork.

        An ordinary module: `torch.export`, ONNX, quantisation and checkpoints work on it. Shared parameters stay
        shared, train or eval mode is kept. A stochastic condition gives its eval row.

        Raises:
            ValueError: a batch of several conditions: materialise them one at a time.
        """
        own = copy.deepcopy(self.condition).eval()() if condition is None else condition
        theta = self._theta(own)
        if theta.ndim == 2:
            if theta.shape[0] != 1:
                raise ValueError(
                    f"materialize bakes one condition, but {theta.shape[0]} are given; call it once for each of them"
                )
            theta = theta[0]
        model = copy.deepcopy(self.primary)
        for target, values in zip(self.targets, self._views(theta), strict=True):
            parameter = nn.Parameter(values.clone())
            for name in target.names:
                path, _, leaf = name.rpartition(".")
                model.get_submodule(path)._parameters[leaf] = parameter
        return model

    def encode(self, condition: Tensor) -> Tensor:
        """Encoded rows `[N, E]` of a condition `[N, D]`."""
        return self._rows_through(condition, layers=0)

    def features(self, condition: Tensor) -> Tensor:
        """h `[N, H]`, what the head reads, for a condition `[N, D]`."""
        return self._rows_through(condition, layers=len(self.trunk))

    @torch.no_grad()
    def step_factors(self) -> StepFactors:
        r"""How much larger than the learning rate a step on theta is, at the current features h.

        A step of SGD on theta0 and head with learning rate eta moves theta by :math:`-\eta (1 + \|h\|_2^2) g`; the
        first step of Adam moves it by :math:`-\eta (1 + \|h\|_1)\,\mathrm{sign}(g)`. Means over the condition's
        typical rows. What the trunk adds on top is left out. Waits for the device.
        """
        h = self.features(self.condition.typical()).double()
        return StepFactors(1 + float(h.square().sum(1).mean()), 1 + float(h.abs().sum(1).mean()))

    def parameter_groups(self, lr: float, *, optimizer: str = "sgd", weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Groups for a torch optimiser under which `lr` means for theta what it means for an ordinary network.

        theta0 and head move theta together, so both have `lr / step_factors()`: with SGD their joint step on theta is
        then `-lr * grad`, as if theta were the parameter. Trunk and condition (their step on theta has no such
        closed form) and the parameters that stay in the model have `lr`. The factors are those of now; they change
        slowly as the trunk learns.

        Args:
            lr: learning rate that suits the ordinary network.
            optimizer: `"sgd"` (any momentum) or `"adam"` (also AdamW and other optimisers that step by sign).
            weight_decay: of every group.

        Returns:
            Dicts with `name` (`"theta0"`, `"head"`, `"trunk"`, `"primary"`), `params`, `lr` and `weight_decay`; groups
            without parameters are left out.
        """
        factors = self.step_factors()._asdict()
        if optimizer not in factors:
            raise ValueError(f"optimizer is {optimizer!r}; choose 'sgd' or 'adam'")
        slow = lr / factors[optimizer]
        groups = {
            "theta0": ([self.theta0], slow),
            "head": ([self.head.weight], slow),
            "trunk": ([*self.trunk.parameters(), *self.condition.parameters()], lr),
            "primary": (list(self.primary.parameters()), lr),
        }
        return [
            {"name": name, "params": parameters, "lr": rate, "weight_decay": weight_decay}
            for name, (parameters, rate) in groups.items()
            if parameters
        ]

    def cannot_factor_head_gradient(self) -> str | None:
        """Why the head's gradient is not the outer product of theta0's gradient and the features, or None."""
        if not self.condition.steady:
            return (
                f"the condition is {self.condition.kind!r}; only where it is 'constant', 'learned', 'per_layer' or "
                "'per_target' does the head read the same features in every forward between two steps"
            )
        return None

    def factor_head_gradient(self) -> None:
        """Compute no gradient of the head: `hyperfast.optim.factor_head` calls this and says what takes its place."""
        self.head.weight.requires_grad_(False)
        self.head.weight.grad = None
        self.head_gradient_is_factored = True

    def cost_report(self, *example_inputs: Any, repeats: int = 5) -> CostReport:
        """Parameters and bytes of every part; with example inputs of the model also times. See `CostReport`."""
        from hyperfast.nn.cost import cost_report

        return cost_report(self, example_inputs, repeats)

    def __repr__(self) -> str:
        rows, width = self.head.weight.shape
        return (
            f"Hypernetwork({type(self.primary).__name__}, {len(self.targets)} generated tensors, P={rows:,}, "
            f"hidden={[layer.out_features for layer in self.trunk]}, H={width}, "
            f"condition={self.condition.kind}({self.condition.extra_repr()}), encoding={self.encoding!r})"
        )

    def _theta(self, condition: Tensor | None) -> Tensor:
        if condition is not None:
            if self.head_gradient_is_factored and torch.is_grad_enabled():
                raise ValueError(
                    "the head of this hypernetwork is updated from the factors of its gradient, which takes its own "
                    f"{self.condition.kind!r} condition; train under others without hyperfast.optim.factor_head, or "
                    "call it inside torch.no_grad()"
                )
            check_condition(condition, self.condition, self.theta0.device, self.encoding)
        return self._run(
            self.condition(condition),
            len(self.trunk),
            self.head.weight,
            self.theta0,
            self.condition.offsets,
        )

    def _rows_through(self, condition: Tensor, layers: int) -> Tensor:
        """Rows after the first trunk layers: an identity for a head shows what the head reads."""
        trunk: Any = self.trunk
        width = trunk[layers - 1].out_features if layers else condition.shape[1] * (1 + (self.encoding != "none"))
        identity = torch.eye(width, dtype=self.theta0.dtype, device=self.theta0.device)
        return self._run(condition.to(self.theta0), layers, identity, torch.zeros_like(identity[0]), None)

    def _run(self, rows: Tensor, layers: int, head: Tensor, theta0: Tensor, offsets: Tensor | None) -> Tensor:
        trunk: Any = self.trunk[:layers]
        return functional.generate(
            rows,
            [layer.weight for layer in trunk],
            [layer.bias for layer in trunk],
            head,
            theta0,
            offsets=offsets,
            encoding=self.encoding,
            activation=self.activation,
            negative_slope=self.negative_slope,
        )

    def _views(self, theta: Tensor) -> list[Tensor]:
        # One split: its backward is one concatenation, where a narrow per tensor would add up P-vectors of zeros.
        parts = torch.split(theta, self._sizes, dim=-1)
        return [part.view(*theta.shape[:-1], *t.shape) for part, t in zip(parts, self.targets, strict=True)]

    def _weights(self, theta: Tensor) -> dict[str, Tensor]:
        """All slots to fill, by name."""
        return {name: part for names, part in zip(self._slots, self._views(theta), strict=True) for name in names}


def _take_over(primary: nn.Module, targets: Sequence[Target]) -> Tensor:
    """Empty the slots of all targets; their values as one flat tensor."""
    parameters = [primary.get_parameter(target.name) for target in targets]
    kinds = {(parameter.dtype, parameter.device) for parameter in parameters}
    if len(kinds) > 1:
        listing = ", ".join(f"{dtype} on {device}" for dtype, device in sorted(kinds, key=str))
        raise ValueError(
            f"the selected parameters are of several kinds ({listing}); one hypernetwork generates one dtype on one "
            "device: convert the model first, or select less"
        )
    values = torch.cat([parameter.detach().flatten() for parameter in parameters])
    for target in targets:
        for name in target.names:
            path, _, leaf = name.rpartition(".")
            primary.get_submodule(path)._parameters[leaf] = None
    return values


def _distinct_slots(primary: nn.Module, target: Target) -> list[str]:
    """The target's names without those that reach a slot a second time, through a module that is itself shared.

    Filling a slot twice would make `functional_call` restore it to the first filling instead of to empty.
    """
    slots: dict[tuple[int, str], str] = {}
    for name in target.names:
        path, _, leaf = name.rpartition(".")
        slots.setdefault((id(primary.get_submodule(path)), leaf), name)
    return list(slots.values())
