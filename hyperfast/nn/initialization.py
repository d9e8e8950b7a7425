"""How trunk, head and theta0 of a hypernetwork start."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from hyperfast.nn.hypernetwork import Hypernetwork
    from hyperfast.surgery import Target

SCHEMES = ("hyperlight", "bias_hyperinit", "hyperfan_in", "hyperfan_out")
THETA0 = ("init", "model")


@torch.no_grad()
def initialize(
    hypernetwork: Hypernetwork, scheme: str = "hyperlight", *, theta0: str = "init", variance_scale: float = 2.0
) -> None:
    r"""Draw trunk, head and theta0 anew.

    With n_k the size of target k, m_in and m_out the fans of its layer, H the head's width, v_e the mean square of
    the encoded condition, and Kaiming's gain for the trunk's activation:

    ================  =====================  ============================================  ======================
    scheme            trunk weights          head rows of a weight; of a bias              theta0 (`"init"`)
    ================  =====================  ============================================  ======================
    hyperlight        normal, fan_out        N(0, 2 / n_k); 0                              N(0, 2 / m_in); bias 0
    bias_hyperinit    normal, fan_out        0; 0                                          the model's values
    hyperfan_in       uniform, fan_in        U, var c / (c_b m_in H v_e); c / (2 H v_e)    0
    hyperfan_out      uniform, fan_in        U, var c / (m_out H v_e);                     0
                                             max(0, c (1 - m_in / m_out) / (H v_e))
    ================  =====================  ============================================  ======================

    c_b = 2 where the layer's bias is generated too, else 1. Trunk biases are 0. Under every scheme an affine
    parameter of a norm layer starts as 1 + 0 or 0 + 0, and parameters that are neither (class tokens, scales of
    residual branches, the parts of a parametrisation) keep the model's value with zero head rows.

    Args:
        hypernetwork: is overwritten.
        scheme: see the table.
        theta0: `"init"`: the scheme's own; `"model"`: the values that the model's parameters have now in `theta0`,
            which are those of the model it was made from unless it has been trained since (a pretrained network).
        variance_scale: c of Hyperfan: 2 for networks of ReLUs (Kaiming), 1 for linear or tanh ones (Xavier).

    Raises:
        ValueError: an unknown scheme or theta0.

    Source: HyperLight 0.0.5 as it is published on PyPI: head rows of biases are 0 there (the repository at commit
    a3e2108 draws them like weights, which is noise of standard deviation sqrt(2 / n_k) on small vectors). HyperLight
    has no rule for norm layers. Bias-HyperInit: Beck et al. 2023. Hyperfan: Chang et al. 2020, formulas as in
    hypnettorch, with fans that count groups and strides.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"init is {scheme!r}; choose one of {', '.join(map(repr, SCHEMES))}")
    if theta0 not in THETA0:
        raise ValueError(f"theta0 is {theta0!r}; choose one of {', '.join(map(repr, THETA0))}")
    power = _embedding_power(hypernetwork)  # also checks encoding and activation
    _initialize_trunk(hypernetwork, scheme)
    sizes = [target.numel for target in hypernetwork.targets]
    rows = torch.split(hypernetwork.head.weight, sizes)
    independent = torch.split(hypernetwork.theta0, sizes)
    for target, head, additive in zip(hypernetwork.targets, rows, independent, strict=True):
        _initialize_head(head, target, scheme, power, variance_scale)
        if theta0 == "init":
            _initialize_theta0(additive, target, scheme)


def _initialize_trunk(hypernetwork: Hypernetwork, scheme: str) -> None:
    name, slope = hypernetwork.activation, hypernetwork.negative_slope
    for layer in hypernetwork.trunk:
        assert isinstance(layer, nn.Linear)
        nonlinearity = "relu" if name == "gelu" else name
        if scheme.startswith("hyperfan"):
            nn.init.kaiming_uniform_(layer.weight, a=slope, nonlinearity=nonlinearity)  # type: ignore[arg-type]
        else:
            # HyperLight leaves the slope out: a = 0 for the leaky ReLU.
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity=nonlinearity)  # type: ignore[arg-type]
        nn.init.zeros_(layer.bias)


def _embedding_power(hypernetwork: Hypernetwork) -> float:
    """Mean square of the encoded condition; 1/2 for cos|sin whatever the condition."""
    return float(hypernetwork.encode(hypernetwork.condition.typical()).square().mean())


def _is_matrix(target: Target) -> bool:
    """Weights that multiply and sum, the ones that fan rules are made for."""
    return target.role == "weight" and len(target.shape) >= 2 and target.name.split(".")[-1].endswith("weight")


def _initialize_head(rows: Tensor, target: Target, scheme: str, power: float, scale: float) -> None:
    variance = 0.0
    matrix = _is_matrix(target)
    if scheme == "hyperlight" and matrix:
        variance = 2 / max(target.numel, 1)
    elif scheme.startswith("hyperfan") and (matrix or target.role == "bias"):
        variance = scale * _hyperfan(target, scheme) / (rows.shape[1] * power)
    if variance == 0:
        rows.zero_()
    elif scheme == "hyperlight":
        rows.normal_(0, math.sqrt(variance))
    else:
        bound = math.sqrt(3 * variance)
        rows.uniform_(-bound, bound)


def _hyperfan(target: Target, scheme: str) -> float:
    """Variance of the head rows of one target, times H v_e / c."""
    if scheme == "hyperfan_in":
        return 1 / 2 if target.role == "bias" else 1 / (target.fan_in * (2 if target.has_bias else 1))
    return max(0.0, 1 - target.fan_in / target.fan_out) if target.role == "bias" else 1 / target.fan_out


def _initialize_theta0(values: Tensor, target: Target, scheme: str) -> None:
    if scheme == "bias_hyperinit":
        return
    if target.role == "norm_weight":
        values.fill_(1)
    elif target.role in ("bias", "norm_bias"):
        values.zero_()
    elif _is_matrix(target) and scheme == "hyperlight":
        values.normal_(0, math.sqrt(2 / target.fan_in))
    elif _is_matrix(target):
        values.zero_()
