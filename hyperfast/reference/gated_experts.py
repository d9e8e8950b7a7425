"""Gated low-rank experts (InherNet, arXiv 2602.09509): a mixture of heads behind one shared projection."""

from __future__ import annotations

from torch import Tensor

from hyperfast.reference.reduction import accumulator


def gated_experts(
    z: Tensor,
    experts: Tensor,
    bias: Tensor | None,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    gate_input: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output `[B, m, *spatial]` and gates `[B, H]` of z `[B, r, *spatial]` and experts `[H, m, r]`.

    The gate of a sample is the softmax, at least in float32, of a linear function of `gate_input`, or else of z's mean
    over the positions. It mixes the experts, not their outputs: with one gate per sample the two are the same. Where a
    sample has one position alone there is as much to mix as to multiply: there the gate scales z once per head, and all
    heads are one product.
    """
    logits = _gate_input(z, gate_input) @ gate_weight.to(accumulator([z])).T
    if gate_bias is not None:
        logits = logits + gate_bias.to(logits.dtype)
    gates = logits.softmax(1)
    mixing = gates.to(z.dtype)
    if z.ndim == 2:
        scaled = (mixing[:, :, None] * z[:, None, :]).flatten(1)
        output = scaled @ experts.permute(0, 2, 1).flatten(0, 1)
        return (output if bias is None else output + mixing @ bias), gates
    mixed = (mixing @ experts.flatten(1)).view(-1, *experts.shape[1:])
    output = mixed @ z.flatten(2)
    if bias is not None:
        output = output + (mixing @ bias)[:, :, None]
    return output.view(len(z), experts.shape[1], *z.shape[2:]), gates


def gated_experts_backward(
    d_output: Tensor,
    d_gates: Tensor,
    z: Tensor,
    experts: Tensor,
    bias: Tensor | None,
    gate_weight: Tensor,
    gate_input: Tensor | None,
    gates: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    r"""Gradients by z, experts, bias, gate weight, gate bias and gate input; empty for what there is not.

    With G the gradient by the output, E~ and b~ the mixed expert and bias of a sample, P positions, s the gate's input:
    :math:`d\tilde E_b = G_b z_b^T`, :math:`d\tilde b_b = \sum_p G_{bp}`,
    :math:`dE_h = \sum_b g_{bh} d\tilde E_b`, :math:`dg_{bh} = \langle d\tilde E_b, E_h \rangle + \langle d\tilde b_b,
    b_h \rangle`, :math:`da = g \odot (dg - \langle g, dg \rangle)`, :math:`dW_g = \sum_b da_b s_b^T`,
    :math:`dz_b = \tilde E_b^T G_b + W_g^T da_b / P`.
    """
    wide = accumulator([z])
    mixing = gates.to(z.dtype)
    maps, grad = (x.unsqueeze(2) if x.ndim == 2 else x.flatten(2) for x in (z, d_output))
    flat = experts.flatten(1)
    mixed = (mixing @ flat).view(-1, *experts.shape[1:])
    d_mixed = (grad @ maps.transpose(1, 2)).flatten(1)
    d_experts = (mixing.T @ d_mixed).view_as(experts)
    d_gate = d_gates + d_mixed.to(wide) @ flat.to(wide).T
    d_bias = z.new_empty(0)
    if bias is not None:
        d_mixed_bias = grad.sum(2)
        d_bias = mixing.T @ d_mixed_bias
        d_gate = d_gate + d_mixed_bias.to(wide) @ bias.to(wide).T
    d_logits = gates * (d_gate - (gates * d_gate).sum(1, keepdim=True))
    d_gate_weight = (d_logits.T @ _gate_input(z, gate_input)).to(gate_weight.dtype)
    d_gate_bias = d_logits.sum(0).to(gate_weight.dtype)
    d_input = d_logits @ gate_weight.to(wide)
    d_z = mixed.transpose(1, 2) @ grad
    if gate_input is None:
        d_z = d_z + (d_input / maps.shape[2]).to(z.dtype)[:, :, None]
    d_gate_input = z.new_empty(0) if gate_input is None else d_input.to(gate_input.dtype)
    return d_z.view(z.shape), d_experts, d_bias, d_gate_weight, d_gate_bias, d_gate_input


def _gate_input(z: Tensor, gate_input: Tensor | None) -> Tensor:
    """What the gate reads `[B, D]`, wide: the mean of z over its positions where nothing else is given."""
    wide = accumulator([z])
    if gate_input is not None:
        return gate_input.to(wide)
    return z.to(wide) if z.ndim == 2 else z.flatten(2).to(wide).mean(2)
