"""A network's kernels from their coordinates: positional embedding, then an MLP (NeRN, arXiv 2212.13554)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

FUSIONS = ("concat", "sum")
PREDICT_ACTIVATIONS = ("relu", "leaky_relu", "hardswish", "gelu", "relu6", "elu")
PRECISIONS = ("fp32", "tf32", "bf16")

LEAKY_SLOPE = 0.01


def positional_embedding(count: int, base: float, levels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Table `[count, 2 * levels]` of the integers p = 0 .. count - 1: sin and cos of pi base^i p, interleaved.

    The angle is that of NeRN to the last bit, fp32(fp32(p fp32(fp32(base)^i)) fp32(pi)), whatever `dtype` is. Its sine
    and cosine are rounded from float64, since angles reach thousands of radians.
    """
    frequencies = (torch.tensor(base, dtype=torch.float32).double() ** torch.arange(levels)).float()
    angle = torch.arange(count, dtype=torch.float32)[:, None] * frequencies * torch.tensor(math.pi)
    return _interleaved(angle).to(dtype)


def fourier_features(coordinates: Tensor, matrix: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Table `[N, 2 * M]` of `coordinates` `[N, D]`: sin and cos of 2 pi B p, interleaved, with `matrix` B `[M, D]`.

    The angle is float32 as in NeRN, whatever `dtype` is.
    """
    return _interleaved(2 * math.pi * (coordinates.float() @ matrix.float().t())).to(dtype)


def _interleaved(angle: Tensor) -> Tensor:
    wide = angle.double()
    return torch.stack((wide.sin(), wide.cos()), dim=-1).flatten(-2).float()


def predict_activate(x: Tensor, activation: str) -> Tensor:
    """The predictor's activation by name."""
    if activation == "leaky_relu":
        return F.leaky_relu(x, LEAKY_SLOPE)
    run: Callable[[Tensor], Tensor] = getattr(F, activation)
    return run(x)


def predict_slope(x: Tensor, activation: str) -> Tensor:
    """Derivative of `predict_activate` at the pre-activation x; at a kink the one that PyTorch takes."""
    if activation == "relu":
        return (x > 0).to(x.dtype)
    if activation == "leaky_relu":
        return torch.where(x > 0, 1.0, LEAKY_SLOPE).to(x.dtype)
    if activation == "relu6":
        return ((x > 0) & (x < 6)).to(x.dtype)
    if activation == "elu":
        return torch.where(x > 0, 1.0, x.clamp_max(0).exp())
    if activation == "hardswish":
        return torch.where(x < -3, 0.0, torch.where(x < 3, x / 3 + 0.5, 1.0))
    normal = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * normal


def _rounded(x: Tensor, precision: str) -> Tensor:
    """What a hidden matrix product reads of `x`. Its sums stay float32; float64 is left alone."""
    return x.to(torch.bfloat16).to(x.dtype) if precision == "bf16" and x.dtype == torch.float32 else x


def _first_weights(embeddings: Sequence[Tensor], weight: Tensor, fusion: str) -> Sequence[Tensor]:
    """The columns of the first layer that read each embedding."""
    return weight.split([e.shape[1] for e in embeddings], 1) if fusion == "concat" else [weight] * len(embeddings)


def predict_tables(embeddings: Sequence[Tensor], weight: Tensor, fusion: str) -> list[Tensor]:
    """The first layer factorised: one table `[n_j, H]` per coordinate, whose rows add up to its pre-activation."""
    parts = _first_weights(embeddings, weight, fusion)
    return [e @ part.t() for e, part in zip(embeddings, parts, strict=True)]


def _selected(of_rows: Tensor, rows: Tensor | None) -> Tensor:
    return of_rows if rows is None else of_rows[rows]


def _pre_activations(
    embeddings: Sequence[Tensor],
    index: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    fusion: str,
    activation: str,
    precision: str,
) -> list[Tensor]:
    """Of all layers; those of the last one are the predictions."""
    z = biases[0]
    for j, table in enumerate(predict_tables(embeddings, weights[0], fusion)):
        z = z + table[index[:, j]]
    found = [z]
    for weight, bias in zip(weights[1:-1], biases[1:-1], strict=True):
        x = predict_activate(found[-1], activation)
        found.append(F.linear(_rounded(x, precision), _rounded(weight, precision), bias))
    found.append(F.linear(predict_activate(found[-1], activation), weights[-1], biases[-1]))
    return found


def predict(
    embeddings: Sequence[Tensor],
    indices: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    rows: Tensor | None,
    fusion: str,
    activation: str,
    precision: str,
) -> Tensor:
    """Kernels `[R, K]` of `rows`: z_1 = sum_j T_j[indices[:, j]] + b_1, then hidden layers, then the last."""
    index = _selected(indices, rows)
    return _pre_activations(embeddings, index, weights, biases, fusion, activation, precision)[-1]


def predict_backward(
    grad: Tensor,
    embeddings: Sequence[Tensor],
    indices: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    rows: Tensor | None,
    fusion: str,
    activation: str,
    precision: str,
) -> Tensor:
    """Gradient of all parameters, flat `[W_1, b_1, W_2, b_2, ...]`, from that of the predictions `[R, K]`.

    A row that `rows` names twice counts twice. The first layer's goes through its tables: dT_j sums the rows that
    read it, and dW_1j = dT_j^T embeddings_j.
    """
    index = _selected(indices, rows)
    pre_activations = _pre_activations(embeddings, index, weights, biases, fusion, activation, precision)
    parts: list[Tensor] = []
    dz = grad
    for layer in range(len(weights) - 1, 0, -1):
        width = precision if layer < len(weights) - 1 else "fp32"
        z, read = pre_activations[layer - 1], _rounded(dz, width)
        x = _rounded(predict_activate(z, activation), width)
        parts = [(read.t() @ x).flatten(), dz.sum(0), *parts]
        dz = (read @ _rounded(weights[layer], width)) * predict_slope(z, activation)
    d_first = []
    for j, embedding in enumerate(embeddings):
        d_table = dz.new_zeros(embedding.shape[0], dz.shape[1]).index_add(0, index[:, j], dz)
        d_first.append(d_table.t() @ embedding)
    d_weight = torch.cat(d_first, 1) if fusion == "concat" else torch.stack(d_first).sum(0)
    return torch.cat([d_weight.flatten(), dz.sum(0), *parts])


def squared_error(
    embeddings: Sequence[Tensor],
    indices: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    targets: Tensor,
    element_weights: Tensor | None,
    rows: Tensor | None,
    fusion: str,
    activation: str,
    precision: str,
) -> Tensor:
    """sum w (prediction - target)^2 over the elements of `rows`."""
    predictions = predict(embeddings, indices, weights, biases, rows, fusion, activation, precision)
    squared = (predictions - _selected(targets, rows)).square()
    return (squared if element_weights is None else squared * _selected(element_weights, rows)).sum()


def squared_error_with_gradient(
    embeddings: Sequence[Tensor],
    indices: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    targets: Tensor,
    element_weights: Tensor | None,
    rows: Tensor | None,
    fusion: str,
    activation: str,
    precision: str,
    gradients: bool,
) -> tuple[Tensor, Tensor]:
    """The squared error and its flat parameter gradient as `predict_backward` has it; empty without `gradients`."""
    arguments = (embeddings, indices, weights, biases, rows, fusion, activation, precision)
    difference = predict(*arguments) - _selected(targets, rows)
    weighted = difference if element_weights is None else difference * _selected(element_weights, rows)
    loss = (weighted * difference).sum()
    return loss, predict_backward(2 * weighted, *arguments) if gradients else loss.new_empty(0)
