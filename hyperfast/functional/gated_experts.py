"""Gated low-rank experts: a mixture of heads behind one shared projection."""

from __future__ import annotations

from torch import Tensor

from hyperfast import reference
from hyperfast.backends import Backend, current_backend
from hyperfast.functional._checks import check_same_device
from hyperfast.ops import gated_experts as _op


def gated_experts(
    z: Tensor,
    experts: Tensor,
    bias: Tensor | None,
    gate_weight: Tensor,
    gate_bias: Tensor | None = None,
    gate_input: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""What a gate makes of H heads behind a shared projection, without the output of any head.

    For every sample, with s the mean of z over the positions, or `gate_input`:

    .. math::
        g = \mathrm{softmax}(W_g s + b_g), \qquad
        y_p = \sum_h g_h (E_h z_p + b_h) = \Big(\sum_h g_h E_h\Big) z_p + \sum_h g_h b_h

    Args:
        z: `[B, r, *spatial]`, the projected input; or `[N, r]`, where every row has a gate of its own.
        experts: E, `[H, m, r]`.
        bias: b, `[H, m]`, or None.
        gate_weight: `[H, r]`, or `[H, D]` with `gate_input`.
        gate_bias: `[H]`, or None.
        gate_input: `[B, D]`, what the gate reads instead of z; None: z itself.

    Returns:
        y `[B, m, *spatial]` or `[N, m]` in the dtype of z, and the gates `[B, H]` in float32 (float64 for float64),
        which have a gradient too: a term that balances the heads may use them.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.

    Notes:
        Mixing the heads costs as much as one of them per sample; their H outputs, which the usual form stacks and sums,
        are never made. With one head the gate is 1 and has no gradient.

    Source: InherNet, arXiv 2602.09509, where the gate is coupled to the compressed feature.
    """
    _check(z, experts, bias, gate_weight, gate_bias, gate_input)
    arguments = (z, experts, bias, gate_weight, gate_bias, gate_input)
    found: tuple[Tensor, Tensor]
    if current_backend() is Backend.REFERENCE:
        found = reference.gated_experts(*arguments)
    else:
        found = _op.gated_experts(*arguments)
    return found


def _check(
    z: Tensor,
    experts: Tensor,
    bias: Tensor | None,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    gate_input: Tensor | None,
) -> None:
    if experts.ndim != 3 or z.ndim < 2 or z.shape[1] != experts.shape[2] or not z.is_floating_point():
        raise ValueError(
            f"z is {z.dtype} {list(z.shape)} and experts {list(experts.shape)}; expected floats [B, r, *spatial] and "
            "[H, m, r]"
        )
    heads, outputs, rank = experts.shape
    width = rank if gate_input is None else gate_input.shape[-1]
    expected = {"bias": (bias, [heads, outputs]), "gate_bias": (gate_bias, [heads])}
    expected |= {"gate_weight": (gate_weight, [heads, width]), "gate_input": (gate_input, [z.shape[0], width])}
    given = {name: tensor for name, (tensor, _) in expected.items() if tensor is not None}
    for name, tensor in given.items():
        if list(tensor.shape) != expected[name][1]:
            raise ValueError(
                f"{name} is {list(tensor.shape)}; expected {expected[name][1]} for {heads} heads of {outputs} outputs "
                f"behind rank {rank}"
            )
    for name, tensor in {"experts": experts, **given}.items():
        if tensor.dtype != z.dtype:
            raise ValueError(f"{name} is {tensor.dtype} but z is {z.dtype}; use one dtype")
    check_same_device(z=z, experts=experts, **given)
