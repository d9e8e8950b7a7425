"""All weights of a network from conditions: encoding, trunk, head and additive weights (MIP, arXiv 2304.07645)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ENCODINGS = ("cos|sin", "z|1-z", "none")
ACTIVATIONS = ("leaky_relu", "relu", "gelu", "tanh")


def encode(condition: Tensor, encoding: str) -> Tensor:
    """The input encoding: `cos|sin` is `[cos(pi z / 2), sin(pi z / 2)]`, whose norm is `sqrt(D)` for every z."""
    if encoding == "cos|sin":
        angle = condition * (math.pi / 2)
        return torch.cat((angle.cos(), angle.sin()), dim=-1)
    if encoding == "z|1-z":
        return torch.cat((condition, 1 - condition), dim=-1)
    if encoding == "none":
        return condition
    raise ValueError(f"unknown encoding {encoding!r}; choose one of {ENCODINGS}")


def activate(x: Tensor, activation: str, negative_slope: float) -> Tensor:
    """The trunk's activation by name."""
    if activation == "leaky_relu":
        return F.leaky_relu(x, negative_slope)
    if activation == "relu":
        return F.relu(x)
    if activation == "gelu":
        return F.gelu(x)
    if activation == "tanh":
        return torch.tanh(x)
    raise ValueError(f"unknown activation {activation!r}; choose one of {ACTIVATIONS}")


def activation_slope(x: Tensor, activation: str, negative_slope: float) -> Tensor:
    """Derivative of `activate` at the pre-activation x."""
    if activation == "leaky_relu":
        return torch.where(x > 0, x.new_ones(()), x.new_full((), negative_slope))
    if activation == "relu":
        return (x > 0).to(x.dtype)
    if activation == "gelu":
        normal = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * normal
    return 1 - torch.tanh(x).square()


def trunk(
    condition: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    encoding: str,
    activation: str,
    negative_slope: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs of every layer, the last one being the features h the head reads, and the hidden pre-activations."""
    inputs, pre_activations = [encode(condition, encoding)], []
    for weight, bias in zip(weights, biases, strict=True):
        pre_activations.append(F.linear(inputs[-1], weight, bias))
        inputs.append(activate(pre_activations[-1], activation, negative_slope))
    return inputs, pre_activations


def _segment_of_rows(offsets: Tensor, rows: int) -> Tensor:
    return torch.searchsorted(offsets, torch.arange(rows, device=offsets.device), right=True) - 1


def generate(
    condition: Tensor,
    trunk_weights: Sequence[Tensor],
    trunk_biases: Sequence[Tensor],
    head: Tensor,
    theta0: Tensor,
    offsets: Tensor | None,
    encoding: str,
    activation: str,
    negative_slope: float,
) -> Tensor:
    """Weights `[B, P]` from `condition` `[B, S, D]`: theta[b, p] = theta0[p] + head[p] . h[b, s(p)]."""
    inputs, _ = trunk(condition, trunk_weights, trunk_biases, encoding, activation, negative_slope)
    h = inputs[-1]
    if offsets is None:
        return F.linear(h[:, 0], head, theta0)
    return theta0 + (head * h[:, _segment_of_rows(offsets, head.shape[0])]).sum(-1)


def generate_backward(
    grad: Tensor,
    condition: Tensor,
    trunk_weights: Sequence[Tensor],
    trunk_biases: Sequence[Tensor],
    head: Tensor,
    offsets: Tensor | None,
    encoding: str,
    activation: str,
    negative_slope: float,
    head_gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the condition, of the trunk as one flat tensor `[W_1, b_1, W_2, b_2, ...]`, and of the head.

    Without `head_gradient` the last one is empty.

    The trunk is recomputed: it is a few thousand multiplications, its activations are not worth keeping.
    """
    inputs, pre_activations = trunk(condition, trunk_weights, trunk_biases, encoding, activation, negative_slope)
    h = inputs[-1]
    if offsets is None:
        d_head = grad.t() @ h[:, 0] if head_gradient else head.new_zeros(0)
        gradient = (grad @ head)[:, None]
    else:
        segment = _segment_of_rows(offsets, head.shape[0])
        d_head = (grad[..., None] * h[:, segment]).sum(0) if head_gradient else head.new_zeros(0)
        gradient = torch.zeros_like(h).index_add(1, segment, grad[..., None] * head)
    parts: list[Tensor] = []
    for weight, x, z in zip(reversed(trunk_weights), reversed(inputs[:-1]), reversed(pre_activations), strict=True):
        gradient = gradient * activation_slope(z, activation, negative_slope)
        rows = gradient.flatten(0, 1)
        parts = [(rows.t() @ x.flatten(0, 1)).flatten(), rows.sum(0), *parts]
        gradient = gradient @ weight
    trunk_gradient = torch.cat(parts) if parts else head.new_zeros(0)
    return encode_backward(gradient, condition, encoding), trunk_gradient, d_head


def encode_backward(gradient: Tensor, condition: Tensor, encoding: str) -> Tensor:
    """Gradient of the condition from that of its encoding."""
    if encoding == "none":
        return gradient
    first, second = gradient.chunk(2, dim=-1)
    if encoding == "z|1-z":
        return first - second
    angle = condition * (math.pi / 2)
    return (second * angle.cos() - first * angle.sin()) * (math.pi / 2)
