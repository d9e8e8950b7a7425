"""Optimiser steps on a matrix whose gradient is an outer product."""

from __future__ import annotations

from torch import Tensor

from hyperfast.functional._checks import check_same_device
from hyperfast.ops import rank_one_update as _op


def sgd_rank_one(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    lr: float,
    momentum_buffer: Tensor | None = None,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    offsets: Tensor | None = None,
) -> None:
    r"""A step of SGD in place, with the gradient :math:`G_{p,:} = l_p \, r_{s(p),:}`, which is never stored.

    .. math::
        d = G + \lambda W, \quad m \leftarrow \mu m + (1 - \tau) d, \quad
        W \leftarrow W - \eta m \quad (\text{Nesterov: } d + \mu m; \text{ without momentum: } d)

    Args:
        weight: W `[P, H]`, float32 or float64; changed.
        left: l `[P]`.
        right: r `[H]`, or `[S, H]` with `offsets`.
        lr: :math:`\eta`.
        momentum_buffer: m `[P, H]`; changed. None: without momentum.
        momentum: :math:`\mu`.
        dampening: :math:`\tau`. (`torch.optim.SGD` has none in the first step.)
        weight_decay: :math:`\lambda`.
        nesterov: see above.
        offsets: int64 `[S + 1]` from 0 to P: rows `offsets[s]:offsets[s + 1]` have row s of `right`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.

    Source: `torch.optim.SGD`, to the rounding of the outer product.
    """
    state = [] if momentum_buffer is None else [momentum_buffer]
    right = _check(weight, state, left, right, offsets)
    _op.sgd_rank_one(weight, state, left, right, offsets, lr, momentum, dampening, weight_decay, nesterov)


def adam_rank_one(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    offsets: Tensor | None = None,
) -> None:
    r"""A step of Adam in place, with the gradient :math:`G_{p,:} = l_p \, r_{s(p),:}`, which is never stored.

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) G, \quad v \leftarrow \beta_2 v + (1 - \beta_2) G^2, \quad
        W \leftarrow W - \frac{\eta}{1 - \beta_1^t} \frac{m}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    Args:
        weight: W `[P, H]`, float32 or float64; changed.
        left: l `[P]`.
        right: r `[H]`, or `[S, H]` with `offsets`.
        exp_avg: m `[P, H]`; changed.
        exp_avg_sq: v `[P, H]`; changed.
        step: t, from 1 on.
        lr: :math:`\eta`.
        betas: :math:`\beta_1, \beta_2`.
        eps: :math:`\epsilon`.
        weight_decay: :math:`\lambda`.
        decoupled: AdamW's decay :math:`W \leftarrow (1 - \eta \lambda) W` before the step; else Adam's, added to G.
        offsets: int64 `[S + 1]` from 0 to P: rows `offsets[s]:offsets[s + 1]` have row s of `right`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a step below 1.

    Source: `torch.optim.Adam` and `AdamW`, to the rounding of the outer product.
    """
    if step < 1:
        raise ValueError(f"step is {step}; the first one is 1")
    right = _check(weight, [exp_avg, exp_avg_sq], left, right, offsets)
    _op.adam_rank_one(
        weight, exp_avg, exp_avg_sq, left, right, offsets, lr, *betas, eps, weight_decay, decoupled, step
    )


def _check(weight: Tensor, state: list[Tensor], left: Tensor, right: Tensor, offsets: Tensor | None) -> Tensor:
    """`right` as `[S, H]`."""
    if weight.ndim != 2:
        raise ValueError(f"weight is {list(weight.shape)}; expected [P, H]")
    rows, hidden = weight.shape
    if left.shape != (rows,):
        raise ValueError(f"left is {list(left.shape)}; expected [{rows}], one per row of weight")
    expected = [hidden] if offsets is None else [len(offsets) - 1, hidden]
    if list(right.shape) != expected:
        raise ValueError(f"right is {list(right.shape)}; expected {expected}")
    tensors = {"weight": weight, "left": left, "right": right}
    tensors |= {f"state {index}": tensor for index, tensor in enumerate(state)}
    for name, tensor in tensors.items():
        if tensor.dtype != weight.dtype:
            raise ValueError(f"{name} is {tensor.dtype} but weight is {weight.dtype}; use one dtype")
        if name.startswith("state") and tensor.shape != weight.shape:
            raise ValueError(f"{name} is {list(tensor.shape)}; expected {list(weight.shape)}, as weight")
    check_same_device(**tensors, **({} if offsets is None else {"offsets": offsets}))
    return right[None] if offsets is None else right
