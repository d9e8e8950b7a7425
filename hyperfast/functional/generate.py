"""All weights of a network from a condition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hyperfast import reference
from hyperfast.backends import Backend, current_backend
from hyperfast.functional._checks import check_choice, check_same_device
from hyperfast.ops import generate as _op
from hyperfast.reference.generate import ACTIVATIONS, ENCODINGS


def generate(
    condition: Tensor,
    trunk_weights: Sequence[Tensor],
    trunk_biases: Sequence[Tensor],
    head_weight: Tensor,
    theta0: Tensor,
    *,
    offsets: Tensor | None = None,
    encoding: str = "cos|sin",
    activation: str = "leaky_relu",
    negative_slope: float = 0.01,
) -> Tensor:
    r"""All weights of a network from a condition, in one launch.

    .. math::
        e = [\cos(\pi z / 2), \sin(\pi z / 2)], \quad
        h_l = \sigma(W_l h_{l-1} + b_l), \quad
        \theta_p = \theta_{0,p} + W^{head}_p \cdot h_{s(p)}

    Args:
        condition: z in [0, 1]. `[D]` or, for a batch of conditions, `[B, D]`. With `offsets`: one row per segment,
            `[S, D]` or `[B, S, D]`. Values are not checked here (that would wait for the device).
        trunk_weights: hidden layers `[H_l, H_{l-1}]`, the first `[H_1, E]` with E = 2D (`cos|sin`, `z|1-z`) or D.
            May be empty; then the head reads the encoding.
        trunk_biases: their biases `[H_l]`.
        head_weight: `[P, H]`, one row per generated weight. P * H may pass 2^31.
        theta0: additive weights `[P]`.
        offsets: int64 `[S + 1]` rising from 0 to P: weights `offsets[s]:offsets[s + 1]` use condition row s.
            `None`: all weights share one row.
        encoding: `"cos|sin"` (constant norm: the magnitude invariance of MIP), `"z|1-z"` or `"none"`.
        activation: `"leaky_relu"`, `"relu"`, `"gelu"` (exact) or `"tanh"`.
        negative_slope: of the leaky ReLU.

    Returns:
        theta `[P]`, or `[B, P]` for a batch, in the dtype of `head_weight`. Sums are taken in float32 (float64 for
        float64) and autocast changes neither: the weights of a network deserve better than bfloat16.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, named with what would.

    Source: MIP / HyperLight 0.0.5 (arXiv 2304.07645), where theta0 is the bias of the last layer. HyperLight has one
    condition row for all tensors; rows per segment and the application of a batch are additions.
    """
    check_choice("encoding", encoding, ENCODINGS)
    check_choice("activation", activation, ACTIVATIONS)
    if len(trunk_weights) != len(trunk_biases):
        raise ValueError(f"{len(trunk_weights)} trunk_weights but {len(trunk_biases)} trunk_biases")
    rows = _condition_rows(condition, offsets)
    width = rows.shape[-1] * (1 if encoding == "none" else 2)
    for level, (weight, bias) in enumerate(zip(trunk_weights, trunk_biases, strict=True)):
        if weight.ndim != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
            raise ValueError(
                f"trunk layer {level} has weight {list(weight.shape)} and bias {list(bias.shape)}; "
                f"expected [H, {width}] and [H] (condition width {rows.shape[-1]}, encoding {encoding!r})"
            )
        width = weight.shape[0]
    if head_weight.ndim != 2 or head_weight.shape[1] != width:
        raise ValueError(f"head_weight is {list(head_weight.shape)}; expected [P, {width}]")
    if theta0.shape != head_weight.shape[:1]:
        raise ValueError(f"theta0 is {list(theta0.shape)}; expected [{head_weight.shape[0]}], one per head row")
    parameters = {f"trunk_weights[{i}]": w for i, w in enumerate(trunk_weights)}
    parameters |= {f"trunk_biases[{i}]": b for i, b in enumerate(trunk_biases)}
    check_same_device(condition=condition, head_weight=head_weight, theta0=theta0, **parameters)
    for name, tensor in (parameters | {"theta0": theta0}).items():
        if tensor.dtype != head_weight.dtype:
            raise ValueError(f"{name} is {tensor.dtype} but head_weight is {head_weight.dtype}; use one dtype")

    arguments = (
        rows.to(head_weight.dtype),
        list(trunk_weights),
        list(trunk_biases),
        head_weight,
        theta0,
        offsets,
        encoding,
        activation,
        negative_slope,
    )
    # The reference is not opaque, so that a compiler may fuse it.
    run = reference.generate if current_backend() is Backend.REFERENCE else _op.generate
    with torch.autocast(condition.device.type, enabled=False):
        theta: Tensor = run(*arguments)
    batched = condition.ndim == (2 if offsets is None else 3)
    return theta if batched else theta.squeeze(0)  # a view both ways; indexing would copy the gradient


def _condition_rows(condition: Tensor, offsets: Tensor | None) -> Tensor:
    """`condition` as `[B, S, D]`."""
    if not condition.is_floating_point():
        raise ValueError(f"condition is {condition.dtype}; expected a floating point tensor")
    if offsets is None:
        if condition.ndim not in (1, 2):
            raise ValueError(f"condition is {list(condition.shape)}; expected [D] or [B, D]")
        return condition[None, None] if condition.ndim == 1 else condition[:, None]
    if offsets.ndim != 1 or offsets.dtype != torch.int64 or offsets.device != condition.device:
        raise ValueError(
            f"offsets is {offsets.dtype} {list(offsets.shape)} on {offsets.device}; "
            f"expected int64 [S + 1] on {condition.device}"
        )
    segments = offsets.shape[0] - 1
    if condition.ndim not in (2, 3) or condition.shape[-2] != segments:
        raise ValueError(
            f"condition is {list(condition.shape)}; expected [{segments}, D] or [B, {segments}, D], "
            "one row per segment of offsets"
        )
    return condition[None] if condition.ndim == 2 else condition
