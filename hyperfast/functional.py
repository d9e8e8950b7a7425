"""The public operations over tensors: argument checks, then one fused launch.

Layers (`hyperfast.nn`) and losses (`hyperfast.losses`) are thin holders of parameters over these functions.
Checks look at shapes, dtypes and devices only; none of them waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperfast import reference
from hyperfast.backends import Backend, current_backend
from hyperfast.ops import attention_transfer as _attention_transfer
from hyperfast.ops import generate as _generate
from hyperfast.reference.attention_transfer import MODES
from hyperfast.reference.generate import ACTIVATIONS, ENCODINGS

__all__ = ["attention_transfer", "generate"]


def _check_choice(name: str, given: str, choices: Sequence[str]) -> None:
    if given not in choices:
        raise ValueError(f"{name} is {given!r}; choose one of {', '.join(map(repr, choices))}")


def _check_same_device(**tensors: Tensor) -> None:
    devices = {name: tensor.device for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        listing = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"all tensors must be on one device; got {listing}. Move them with .to(device).")


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
    _check_choice("encoding", encoding, ENCODINGS)
    _check_choice("activation", activation, ACTIVATIONS)
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
    _check_same_device(condition=condition, head_weight=head_weight, theta0=theta0, **parameters)
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
    run = reference.generate if current_backend() is Backend.REFERENCE else _generate.generate
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


def attention_transfer(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    p: int = 2,
    mode: str = "code",
    eps: float | None = None,
) -> Tensor:
    r"""Attention transfer of all taps in one launch: one loss per tap.

    With :math:`Q = \sum_c |F_c|^p` over N positions and :math:`u = Q_s / \|Q_s\|_2`, :math:`v = Q_t / \|Q_t\|_2`:

    .. math::
        L_{code} = \frac{1}{BN} \sum_b \|u_b - v_b\|_2^2, \qquad
        L_{paper} = \frac{1}{B} \sum_b \|u_b - v_b\|_2

    Args:
        student: feature maps `[B, C, *spatial]`, float16, bfloat16, float32 or float64. Gradients flow here only.
        teacher: as many maps; C may differ, a different spatial size is average-pooled down to the smaller one.
        p: power of |F|: 1, 2 or 3.
        mode: `"code"`, the formula of the authors' code and of RepDistiller; `"paper"`, the formula printed in the
            paper, without its factor beta / 2; `"zoo"`, Knowledge-Distillation-Zoo's, which divides by norm + eps.
            For a positive map the three differ in square against norm and in eps, not in the attention map.
        eps: lower bound of the norm (`zoo`: added to it); default 1e-12, `zoo` 1e-6.

    Returns:
        float32 `[L]` (float64 for float64 maps), unweighted. Statistics are float32 whatever the maps are: in
        float16 eps is 0 and squares overflow above 255.

    Raises:
        ValueError: unequal numbers of maps, batch sizes or devices; a map without spatial positions.

    Notes:
        Invariant to the scale of either map. Zero, with zero gradient, on maps of one position (1x1) and where the
        student's map is zero. The gradient keeps one number per position, never a tensor as large as a map.

    Source: Zagoruyko and Komodakis, arXiv 1612.03928; paper and code differ (szagoruyko/attention-transfer #34).
    """
    _check_choice("mode", mode, MODES)
    p = int(p)  # a compiler may see an unknown number
    if p not in (1, 2, 3):
        raise ValueError(f"p is {p!r}; choose 1, 2 or 3")
    if len(student) != len(teacher):
        raise ValueError(f"{len(student)} student maps but {len(teacher)} teacher maps; they are compared in pairs")
    if not student:
        raise ValueError("no feature maps were given; tap at least one")
    pairs = [_matched_maps(index, s, t) for index, (s, t) in enumerate(zip(student, teacher, strict=True))]
    if eps is None:
        eps = 1e-6 if mode == "zoo" else 1e-12
    students, teachers = [s for s, _ in pairs], [t for _, t in pairs]
    if current_backend() is Backend.REFERENCE:
        dtype = torch.float64 if any(s.dtype == torch.float64 for s in students) else torch.float32
        wide = ([s.to(dtype) for s in students], [t.to(dtype) for t in teachers])
        return reference.attention_transfer(*wide, p, mode, eps)
    losses: Tensor = _attention_transfer.attention_transfer(students, teachers, p, mode, eps)[0]
    return losses


def _matched_maps(index: int, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """One pair of maps with equal spatial sizes; the larger is average-pooled, as RepDistiller does."""
    teacher = teacher.detach()
    for name, features in (("student", student), ("teacher", teacher)):
        if features.ndim < 3 or not features.is_floating_point():
            raise ValueError(
                f"{name} map {index} is {features.dtype} {list(features.shape)}; expected floats [B, C, *spatial]"
            )
    _check_same_device(**{f"student map {index}": student, f"teacher map {index}": teacher})
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"tap {index}: student batch {student.shape[0]}, teacher batch {teacher.shape[0]}; "
            "run both networks on the same images"
        )
    if student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    if student.ndim != teacher.ndim or student.ndim > 5:
        raise ValueError(
            f"tap {index}: maps {list(student.shape)} and {list(teacher.shape)} cannot be matched by pooling"
        )
    size = [min(a, b) for a, b in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    return _pooled(student, size), _pooled(teacher, size)


def _pooled(features: Tensor, size: list[int]) -> Tensor:
    if list(features.shape[2:]) == size:
        return features
    pool: Any = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[len(size) - 1]
    pooled: Tensor = pool(features, size)
    return pooled
