"""A network's kernels from their coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hyperfast import reference
from hyperfast.backends import Backend, current_backend
from hyperfast.functional._checks import check_choice, check_same_device
from hyperfast.ops import predict as _op
from hyperfast.reference.predict import (
    FUSIONS,
    PRECISIONS,
    PREDICT_ACTIVATIONS,
    fourier_features,
    positional_embedding,
)

__all__ = ["fourier_features", "positional_embedding", "predict", "squared_error"]


def predict(
    embeddings: Sequence[Tensor],
    indices: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    rows: Tensor | None = None,
    fusion: str = "concat",
    activation: str = "relu",
    precision: str = "fp32",
) -> Tensor:
    r"""Kernels of a network from their coordinates, one row each, in one launch.

    With :math:`T_j = E_j W_{1j}^T`, the first layer factorised into one small table per coordinate:

    .. math::
        z_1 = b_1 + \sum_j T_j[i_j], \quad z_l = W_l \sigma(z_{l-1}) + b_l, \quad \hat w = z_L

    Args:
        embeddings: J constant tables `[n_j, E_j]`, as of `positional_embedding`. No gradient flows to them.
        indices: int32 or int64 `[N, J]`: row r reads `embeddings[j][indices[r, j]]`. One table with a row per kernel
            (J = 1) is the form of embeddings that do not factorise, as `fourier_features`.
        weights: two layers or more, the first `[H, sum_j E_j]` (`concat`) or `[H, E]` (`sum`), then `[H, H]`, the
            last `[K, H]`. float32 or float64, as the biases and embeddings.
        biases: theirs, `[H]` and for the last layer `[K]`.
        rows: int64 `[R]`, the rows of `indices` to predict, in any order and with repetitions; each occurrence has
            its own gradient. `None`: all N.
        fusion: `"concat"` of the embeddings, or their `"sum"` (then all E_j are equal).
        activation: `"relu"`, `"leaky_relu"` (slope 0.01), `"hardswish"`, `"gelu"` (exact), `"relu6"` or `"elu"`.
        precision: what the hidden products multiply: `"fp32"`; `"tf32"`, on a GPU; `"bf16"`, operands rounded to
            bfloat16. First layer, last layer and all sums are float32. float64 parameters are never rounded.

    Returns:
        `[R, K]` in the dtype of the parameters; autocast does not change it.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, named with what would.
        IndexError: on the CPU, an index or row outside its table, found as it is read. On a GPU that would mean to
            wait for the device: such an index is undefined there.

    Notes:
        Neither the embedding of every row nor an activation of the whole batch is ever in memory; the backward
        recomputes what it needs.

    Source: NeRN, arXiv 2212.13554 (maorash/NeRN), which builds the `[N, sum_j E_j]` embedding.
    """
    arguments = _checked(embeddings, indices, weights, biases, rows, fusion, activation, precision)
    # The reference is not opaque, so that a compiler may fuse it.
    run = reference.predict if current_backend() is Backend.REFERENCE else _op.predict
    with torch.autocast(indices.device.type, enabled=False):
        predictions: Tensor = run(*arguments)
    return predictions


def squared_error(
    embeddings: Sequence[Tensor],
    indices: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    targets: Tensor,
    *,
    element_weights: Tensor | None = None,
    rows: Tensor | None = None,
    fusion: str = "concat",
    activation: str = "relu",
    precision: str = "fp32",
) -> Tensor:
    r"""Weighted squared error of `predict` against `targets`, without ever storing the predictions.

    .. math::
        \sum_{r, k} w_{rk} (\hat w_{rk} - t_{rk})^2

    Where gradients are wanted they are computed in the same pass, while a tile of rows is in the cache; the backward
    only scales them.

    Args:
        embeddings, indices, weights, biases, rows, fusion, activation, precision: as of `predict`.
        targets: `[N, K]` in the dtype of the parameters; `rows` select from them too.
        element_weights: `[N, K]`; 0 leaves an element out, as those that are cropped from a kernel. `None`: all 1.

    Returns:
        A scalar in the dtype of the parameters. NeRN's loss over P elements is `(it / P).sqrt()`.

    Raises:
        ValueError: as `predict`, and targets or element_weights that do not fit.
        IndexError: as `predict`.

    Notes:
        Gradients flow to weights and biases only, second derivatives too.

    Source: NeRN, arXiv 2212.13554; its reconstruction loss.
    """
    embeddings, indices, weights, biases, *rest = _checked(
        embeddings, indices, weights, biases, rows, fusion, activation, precision
    )
    shape = (indices.shape[0], weights[-1].shape[0])
    for name, tensor in (("targets", targets), ("element_weights", element_weights)):
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype != weights[0].dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}; expected {weights[0].dtype} {list(shape)}, "
                "one row per row of indices"
            )
        check_same_device(indices=indices, **{name: tensor})
    element_weights = None if element_weights is None else element_weights.detach()
    arguments = (embeddings, indices, weights, biases, targets.detach(), element_weights, *rest)
    loss: Tensor
    with torch.autocast(indices.device.type, enabled=False):
        if current_backend() is Backend.REFERENCE:
            loss = reference.squared_error(*arguments)
        else:
            gradients = torch.is_grad_enabled() and any(p.requires_grad for p in (*weights, *biases))
            loss = _op.predict_squared_error(*arguments, gradients)[0]
    return loss


def _checked(
    embeddings: Sequence[Tensor],
    indices: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    rows: Tensor | None,
    fusion: str,
    activation: str,
    precision: str,
) -> tuple[Any, ...]:
    """The arguments as the operation takes them."""
    check_choice("fusion", fusion, FUSIONS)
    check_choice("activation", activation, PREDICT_ACTIVATIONS)
    check_choice("precision", precision, PRECISIONS)
    _check_indices(embeddings, indices, rows)
    _check_layers(embeddings, weights, biases, fusion)
    dtype = weights[0].dtype
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"weights are {dtype}; keep them float32 (or float64), and choose precision='bf16' for speed")
    named = {f"embeddings[{j}]": e for j, e in enumerate(embeddings)}
    named |= {f"weights[{i}]": w for i, w in enumerate(weights)} | {f"biases[{i}]": b for i, b in enumerate(biases)}
    for name, tensor in named.items():
        if tensor.dtype != dtype:
            raise ValueError(f"{name} is {tensor.dtype} but weights[0] is {dtype}; use one dtype")
    selection = {} if rows is None else {"rows": rows}
    check_same_device(indices=indices, **selection, **named)
    constant = [e.detach() for e in embeddings]
    return constant, indices, list(weights), list(biases), rows, fusion, activation, precision


def _check_indices(embeddings: Sequence[Tensor], indices: Tensor, rows: Tensor | None) -> None:
    if not embeddings:
        raise ValueError("no embeddings were given; a predictor reads at least one table")
    for j, table in enumerate(embeddings):
        if table.ndim != 2 or 0 in table.shape:
            raise ValueError(f"embeddings[{j}] is {list(table.shape)}; expected [n, E] with at least one element")
    if indices.ndim != 2 or indices.shape[1] != len(embeddings) or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"indices is {indices.dtype} {list(indices.shape)}; expected int32 or int64 [N, {len(embeddings)}], "
            "one column per embedding"
        )
    if indices.shape[0] == 0:
        raise ValueError("indices has no rows; there is nothing to predict")
    if rows is not None and (rows.ndim != 1 or rows.dtype != torch.int64):
        raise ValueError(f"rows is {rows.dtype} {list(rows.shape)}; expected int64 [R]")


def _check_layers(
    embeddings: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor], fusion: str
) -> None:
    if len(weights) != len(biases):
        raise ValueError(f"{len(weights)} weights but {len(biases)} biases")
    if len(weights) < 2:
        raise ValueError(f"{len(weights)} layers; a predictor has at least two")
    sizes = [table.shape[1] for table in embeddings]
    if fusion == "sum" and len(set(sizes)) > 1:
        raise ValueError(f"embeddings have {sizes} columns; fusion 'sum' adds them, which takes equal ones")
    hidden = weights[0].shape[0] if weights[0].ndim == 2 else 0
    width = sum(sizes) if fusion == "concat" else sizes[0]
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        outputs = "K" if i == len(weights) - 1 else hidden or "H"
        fits = weight.ndim == 2 and weight.shape[1] == width and bias.shape == weight.shape[:1]
        if not fits or outputs not in ("K", "H", weight.shape[0]) or weight.shape[0] == 0:
            raise ValueError(
                f"layer {i} has weight {list(weight.shape)} and bias {list(bias.shape)}; "
                f"expected [{outputs}, {width}] and [{outputs}], with at least one output"
            )
        width = hidden
