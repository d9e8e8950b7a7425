"""Turn any module into a hypernetwork over its own weights."""

from __future__ import annotations

import copy
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from hyperfast.nn.conditions import Condition, make_condition
from hyperfast.nn.hypernetwork import Hypernetwork
from hyperfast.nn.initialization import initialize
from hyperfast.surgery import Select, Target, select_parameters

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn


def hypernetize(
    model: nn.Module,
    select: Select = None,
    *,
    hidden: Sequence[int] = (16, 64, 128),
    condition: str | Condition = "constant",
    condition_size: int = 1,
    encoding: str = "cos|sin",
    activation: str = "leaky_relu",
    negative_slope: float = 0.01,
    init: str = "hyperlight",
    theta0: Literal["init", "model"] = "init",
    norm: Literal["keep", "generate"] = "keep",
    variance_scale: float = 2.0,
) -> Hypernetwork:
    r"""A network that is called like `model` and whose weights come from one MIP hypernetwork.

    .. math::
        \theta = \theta_0 + W h(e), \quad e = [\cos(\pi z / 2), \sin(\pi z / 2)]

    with h a small multilayer perceptron (trunk), W one matrix (head) and z the condition. theta holds all selected
    parameters. Works on a deep copy: `model` is left as it is. Random draws come from torch's generator, so
    `torch.manual_seed` fixes them.

    Args:
        model: any module.
        select: which parameters to generate: `None` for every linear and convolutional weight and bias; a module type
            or tuple of types; a glob or list of globs over parameter names; a predicate `(name, module, parameter)`.
            See `hyperfast.surgery.select_parameters`.
        hidden: widths of the trunk. (16, 64, 128) is the example of HyperLight and the choice of the published
            layer-wise distillation of MIP hypernetworks, which takes (16, 16, 16) for large networks: the head has
            P * H parameters.
        condition: where z comes from:

            - `"constant"`: 0.5, for a network without hyperparameters. Closest to HyperLight.
            - `"learned"`: one learned row, sigmoid(v).
            - `"per_layer"`, `"per_target"`: a learned row for every layer or every parameter, one trunk for all.
            - `"external"`: given at every call, as `student(x, condition=z)`.
            - `"stochastic"`: U[0, 1] in training, 0.5 in eval mode.
            - a `hyperfast.nn.Condition`.

            All of them accept a `condition=` at the call.
        condition_size: D, the width of z. A `Condition` has its own.
        encoding: `"cos|sin"` (MIP: the norm of e is sqrt(D) for every z), `"z|1-z"` or `"none"`.
        activation: of the trunk: `"leaky_relu"` (HyperLight), `"relu"`, `"gelu"` or `"tanh"`.
        negative_slope: of the leaky ReLU; 0.01 in HyperLight.
        init: `"hyperlight"`, `"bias_hyperinit"` (starts exactly at the model; Beck et al. 2023), `"hyperfan_in"` or
            `"hyperfan_out"` (Chang et al. 2020). See `hyperfast.nn.initialize`.
        theta0: `"init"`: the scheme's own draw (hyperlight: Kaiming normal with fan_in for weights, 0 for biases);
            `"model"`: the model's present weights, such as pretrained ones (HyperLight's `from_existing`).
        norm: affine parameters of norm layers: `"keep"` leaves them in the model as ordinary parameters,
            `"generate"` generates them as 1 + d and d with zero-initialised head rows (HyperLight cannot).
        variance_scale: c of the hyperfan schemes: 2 for networks of ReLUs, 1 for linear or tanh ones.

    Returns:
        A `Hypernetwork`, in the model's train or eval mode, on its device and in its dtype.

    Raises:
        ValueError: an unknown choice, a selection that matches nothing, a model without parameters, or parameters
            that cannot be generated.

    Source: MIP (arXiv 2304.07645) and HyperLight 0.0.5. Conditions per layer, generated norm parameters and batches
    of conditions that are applied are additions.

    Example:
        >>> student = hyperfast.hypernetize(model)
        >>> logits = student(images)
        >>> plain = student.materialize()
    """
    primary = copy.deepcopy(model)
    targets = select_parameters(primary, select, norm=norm)
    if not isinstance(condition, Condition):
        layers = [sum(t.numel for t in group) for _, group in groupby(targets, key=_layer)]
        condition = make_condition(condition, condition_size, layers, [target.numel for target in targets])
    elif condition.offsets is not None and int(condition.offsets[-1]) != sum(t.numel for t in targets):
        raise ValueError(
            f"the condition has rows for {int(condition.offsets[-1])} weights, but {sum(t.numel for t in targets)} "
            "are generated; its lengths must sum to that"
        )
    hypernetwork = Hypernetwork(
        primary,
        targets,
        condition,
        hidden=hidden,
        encoding=encoding,
        activation=activation,
        negative_slope=negative_slope,
    )
    initialize(hypernetwork, init, theta0=theta0, variance_scale=variance_scale)
    return hypernetwork.train(model.training)


def _layer(target: Target) -> str:
    return target.layer
