"""A hypernetwork's head, updated from the factors of its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from hyperfast import functional
from hyperfast.nn import Hypernetwork

_UNSUPPORTED = ("amsgrad", "capturable", "differentiable")


def factor_head(hypernetwork: Hypernetwork, optimizer: Optimizer) -> None:
    r"""Let `optimizer` update the head of `hypernetwork` without the head's gradient ever being stored.

    The head's gradient is the outer product of theta's gradient g and the features h that the head reads, and g is
    the gradient of theta0:

    .. math::
        \theta = W h + \theta_0 \quad\Rightarrow\quad
        \frac{\partial L}{\partial W} = g\, h^T, \quad g = \frac{\partial L}{\partial \theta_0}

    After this call the backward pass only reads the head, and `optimizer.step()` updates W from `theta0.grad` and h in
    one pass over W and the optimiser's state. A tensor as large as the head is neither stored, written nor read, and
    distributed training reduces theta0's gradient instead of it.

    The head no longer wants a gradient of its own (`head.weight.grad` stays None). Everything that scales the
    gradients scales the head's too, through theta0's: gradient scalers, clipping, averaging over processes,
    accumulation over batches. To count the head in the norm, clip with `hyperfast.optim.clip_grad_norm_`. The state of
    the optimiser is the one it would have had, so that checkpoints go both ways; learning rates may change at any
    time.

    Args:
        hypernetwork: with a condition of its own, the same for all batches between two steps: constant, learned or
            per layer. theta0 must be trained. Wrap it in DistributedDataParallel afterwards.
        optimizer: `torch.optim.SGD`, `Adam` or `AdamW`, which has the head and theta0 among its parameters. Without
            amsgrad, capturable or differentiable, and stepped without a closure.

    Raises:
        ValueError: where this cannot be done, and why.

    Example:
        >>> optimizer = torch.optim.AdamW(student.parameter_groups(lr=1e-3, optimizer="adam"))
        >>> hyperfast.optim.factor_head(student, optimizer)
    """
    if reason := cannot_factor(hypernetwork, optimizer):
        raise ValueError(f"the head cannot be updated from the factors of its gradient: {reason}")
    hypernetwork.factor_head_gradient()
    optimizer.register_step_pre_hook(_Update(hypernetwork))


def cannot_factor(hypernetwork: Hypernetwork, optimizer: Optimizer) -> str | None:
    """Why `factor_head` would raise, or None."""
    weight = hypernetwork.head.weight
    groups = [group for group in optimizer.param_groups if any(p is weight for p in group["params"])]
    if type(optimizer) not in (SGD, Adam, AdamW):
        return f"the optimizer is {type(optimizer).__name__}; SGD, Adam and AdamW of torch.optim are known"
    if not groups:
        return "the optimizer has no parameter group with head.weight"
    if not any(p is hypernetwork.theta0 for group in optimizer.param_groups for p in group["params"]):
        return "the optimizer does not have theta0, whose gradient it is made from"
    if set_options := [name for name in _UNSUPPORTED if groups[0].get(name)]:
        return f"the optimizer has {', '.join(set_options)}"
    if not hypernetwork.theta0.requires_grad:
        return "theta0 is frozen, and its gradient is what it is made from"
    return hypernetwork.cannot_factor_head_gradient()


@torch.no_grad()
def head_gradient_norm(hypernetwork: Hypernetwork) -> Tensor:
    r"""L2 norm of a factored head gradient: :math:`\sqrt{\sum_s \|g_s\|^2 \|h_s\|^2}`, a scalar; 0 without one."""
    grad = hypernetwork.theta0.grad
    if grad is None:
        return hypernetwork.theta0.new_zeros(())
    offsets, squares = hypernetwork.condition.offsets, grad.square()
    if offsets is None:
        return (squares.sum() * _features(hypernetwork).square().sum()).sqrt()
    segment = torch.bucketize(torch.arange(len(squares), device=grad.device), offsets[1:], right=True)
    per_segment = squares.new_zeros(len(offsets) - 1).index_add(0, segment, squares)
    return (per_segment * _features(hypernetwork).square().sum(1)).sum().sqrt()


@torch.no_grad()
def total_grad_norm(module: nn.Module) -> Tensor:
    """L2 norm of all gradients of `module`, factored head gradients included; a scalar on their device."""
    norms = [nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])]
    for part in module.modules():
        if isinstance(part, Hypernetwork) and part.head_gradient_is_factored:
            norms.append(head_gradient_norm(part))
    return torch.stack([norm.to(norms[0].device) for norm in norms]).norm() if len(norms) > 1 else norms[0]


@torch.no_grad()
def clip_grad_norm_(module: nn.Module, max_norm: float) -> Tensor:
    """As `torch.nn.utils.clip_grad_norm_` over the parameters of `module`, with factored head gradients in the norm.

    Returns:
        The norm from before, a scalar.
    """
    total = total_grad_norm(module)
    nn.utils.clip_grads_with_norm_(list(module.parameters()), max_norm, total)
    return total


class _Update:
    """The hook that runs before an optimiser's own step: the trunk is still the one of the forward pass."""

    def __init__(self, hypernetwork: Hypernetwork) -> None:
        self.hypernetwork = hypernetwork

    @torch.no_grad()
    def __call__(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # args begin with the optimiser itself.
        if kwargs.get("closure") is not None or any(argument is not None for argument in args[1:]):
            raise ValueError("a head whose gradient is factored is updated before the closure would run; call step()")
        network, weight = self.hypernetwork, self.hypernetwork.head.weight
        left = network.theta0.grad
        # What a GradScaler hands to fused optimisers instead of doing it itself.
        scale, overflow = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        if left is None or (overflow is not None and overflow.item()):
            return
        group = next(group for group in optimizer.param_groups if any(p is weight for p in group["params"]))
        if scale is not None:
            left = left / scale
        if group["maximize"]:
            left = -left
        step = _step_adam if isinstance(optimizer, Adam) else _step_sgd
        step(weight, left, _features(network), network.condition.offsets, group, optimizer.state[weight])


def _features(hypernetwork: Hypernetwork) -> Tensor:
    """h of the hypernetwork's own condition: `[H]`, or `[S, H]` with a row per segment."""
    rows = hypernetwork.features(hypernetwork.condition.typical())
    return rows[0] if hypernetwork.condition.offsets is None else rows


def _step_sgd(
    weight: Tensor, left: Tensor, right: Tensor, offsets: Tensor | None, group: dict[str, Any], state: dict[str, Any]
) -> None:
    first = group["momentum"] != 0 and state.get("momentum_buffer") is None
    if first:
        state["momentum_buffer"] = torch.zeros_like(weight)
    functional.sgd_rank_one(
        weight,
        left,
        right,
        lr=float(group["lr"]),
        momentum_buffer=state["momentum_buffer"] if group["momentum"] != 0 else None,
        momentum=group["momentum"],
        dampening=0.0 if first else group["dampening"],
        weight_decay=group["weight_decay"],
        nesterov=group["nesterov"],
        offsets=offsets,
    )


def _step_adam(
    weight: Tensor, left: Tensor, right: Tensor, offsets: Tensor | None, group: dict[str, Any], state: dict[str, Any]
) -> None:
    if not state:
        state["step"] = torch.tensor(0.0)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
    state["step"] = state["step"].cpu() + 1  # a fused optimiser's checkpoint has it on the device
    functional.adam_rank_one(
        weight,
        left,
        right,
        exp_avg=state["exp_avg"],
        exp_avg_sq=state["exp_avg_sq"],
        step=int(state["step"]),
        lr=float(group["lr"]),
        betas=group["betas"],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        decoupled=group["decoupled_weight_decay"],
        offsets=offsets,
    )
