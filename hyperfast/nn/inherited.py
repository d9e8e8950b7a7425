"""Layers that inherit a trained layer's weights: one shared low-rank projection, and gated heads behind it."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hyperfast import functional

GateInput = Literal["compressed", "input"]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class _Inherited(nn.Module):
    """What the convolution and the linear layer have in common.

    Args:
        rank: of the projection.
        outputs: channels or features.
        heads: H.
        bias: whether the heads have biases.
        gate_width: what the gate reads.
        gate_input: see `InheritedConv2d`.
    """

    def __init__(self, rank: int, outputs: int, heads: int, bias: bool, gate_width: int, gate_input: GateInput) -> None:
        super().__init__()
        if rank < 1 or heads < 1:
            raise ValueError(f"rank is {rank} and heads {heads}; both must be at least 1")
        self.rank, self.outputs, self.heads, self.gate_input = rank, outputs, heads, gate_input
        self.experts = nn.Parameter(torch.empty(heads, outputs, rank))
        self.bias = nn.Parameter(torch.zeros(heads, outputs)) if bias else None
        self.gate = nn.Linear(gate_width, heads)
        self.gates: Tensor | None = None
        nn.init.kaiming_uniform_(self.experts, a=math.sqrt(5))

    def _mixed(self, z: Tensor, seen: Tensor | None) -> Tensor:
        output, self.gates = functional.gated_experts(
            z, self.experts.to(z.dtype), _to(self.bias, z), self.gate.weight.to(z.dtype), _to(self.gate.bias, z), seen
        )
        return output

    @torch.no_grad()
    def mean_expert(self, gates: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The expert `[m, r]` and bias `[m]` that constant gates mix; `gates` `[H]`, default 1 / H."""
        share = self.experts.new_full((self.heads,), 1 / self.heads) if gates is None else gates.to(self.experts)
        if share.shape != (self.heads,):
            raise ValueError(f"gates is {list(share.shape)}; expected [{self.heads}], one per head")
        expert = torch.einsum("h,hmr->mr", share, self.experts)
        return expert, None if self.bias is None else share @ self.bias

    def __getstate__(self) -> dict[str, Any]:
        """Without the gates of the last forward, whose graph cannot be copied."""
        return {**self.__dict__, "gates": None}

    def extra_repr(self) -> str:
        return f"rank={self.rank}, outputs={self.outputs}, heads={self.heads}, gate_input={self.gate_input!r}"


class InheritedConv2d(_Inherited):
    r"""A convolution of low rank with H gated heads.

    With z the shared convolution of x with r channels, s its mean over the positions:

    .. math::
        z = D * x, \qquad g = \mathrm{softmax}(W_g s + b_g), \qquad y = \sum_h g_h (E_h z + b_h)

    Args:
        in_channels: of x.
        out_channels: m, of y.
        kernel_size: of D; the heads are 1x1.
        rank: r.
        heads: H.
        stride: of D; also padding, dilation and padding_mode.
        padding: see there.
        dilation: see there.
        padding_mode: see there.
        bias: whether the heads have biases.
        gate_input: `"compressed"`, the mean of z; `"input"`, the mean of x (the paper's text may be read so).

    Attributes:
        gates: `[B, H]` of the last forward, with their graph: for a term that balances the heads
            (`load_balance_loss`).

    Shape:
        `[B, C, H, W]` to `[B, m, H', W']`.

    Notes:
        Gates are one per sample, so that the heads are mixed and not their outputs (`functional.gated_experts`). The
        layer has r C k^2 + H r m + H (r + 1) parameters, and H m for biases.

    Source: InherNet, arXiv 2602.09509 (zyy-2001/InherNet-Demo).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        rank: int,
        heads: int = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        padding_mode: PaddingMode = "zeros",
        bias: bool = False,
        gate_input: GateInput = "compressed",
    ) -> None:
        gate_width = rank if gate_input == "compressed" else in_channels
        super().__init__(rank, out_channels, heads, bias, gate_width, gate_input)
        self.down = nn.Conv2d(
            in_channels, rank, kernel_size, stride, padding, dilation, bias=False, padding_mode=padding_mode
        )

    def forward(self, x: Tensor) -> Tensor:
        """Project, and mix the heads."""
        z = self.down(x)
        return self._mixed(z, x.mean((2, 3)).to(z.dtype) if self.gate_input == "input" else None)

    def fold(self, gates: Tensor | None = None) -> nn.Module:
        """Two plain convolutions that do the same under constant gates.

        Args:
            gates: `[H]`, which sum to 1; default 1 / H, the mean of the heads. One head has the gate 1.
        """
        expert, bias = self.mean_expert(gates)
        up = nn.Conv2d(self.rank, self.outputs, 1, bias=bias is not None)
        return _folded(self.down, up, expert[:, :, None, None], bias)


class InheritedLinear(_Inherited):
    r"""A linear layer of low rank with H gated heads: :math:`y = \sum_h g_h (E_h z + b_h)`, :math:`z = D x`.

    Args:
        in_features: n, of x.
        out_features: m, of y.
        rank: r.
        heads: H.
        bias: whether the heads have biases.
        gate_input: `"compressed"`: each row's gate reads its z; `"input"`: its x.

    Attributes:
        gates: `[N, H]` of the last forward, one per row, with their graph.

    Shape:
        `[..., n]` to `[..., m]`.

    Notes:
        Every row has a gate of its own; all heads are one matrix product of z, scaled by each gate. The layer has
        r n + H r m + H (r + 1) parameters, and H m for biases.

    Source: InherNet, arXiv 2602.09509.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        heads: int = 3,
        bias: bool = True,
        gate_input: GateInput = "compressed",
    ) -> None:
        gate_width = rank if gate_input == "compressed" else in_features
        super().__init__(rank, out_features, heads, bias, gate_width, gate_input)
        self.down = nn.Linear(in_features, rank, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Project, and mix the heads."""
        rows = x.flatten(0, -2) if x.ndim > 1 else x[None]
        z = self.down(rows)
        output = self._mixed(z, rows.to(z.dtype) if self.gate_input == "input" else None)
        return output.view(*x.shape[:-1], self.outputs)

    def fold(self, gates: Tensor | None = None) -> nn.Module:
        """Two plain linear layers that do the same under constant gates; see `InheritedConv2d.fold`."""
        expert, bias = self.mean_expert(gates)
        up = nn.Linear(self.rank, self.outputs, bias=bias is not None)
        return _folded(self.down, up, expert, bias)


def load_balance_loss(model: nn.Module) -> Tensor:
    r"""How unevenly the heads of all inherited layers were used in the last forward: 0 where all alike.

    .. math::
        L = \frac{1}{L} \sum_l \Big( H \sum_h \bar g_{lh}^2 - 1 \Big)

    with :math:`\bar g` the mean of the gates over the batch. InherAct weighs it with 0.01.

    Raises:
        RuntimeError: the model has no inherited layer, or none was called.
    """
    terms = []
    for module in model.modules():
        if isinstance(module, _Inherited) and module.gates is not None:
            terms.append(module.heads * module.gates.mean(0).square().sum() - 1)
    if not terms:
        raise RuntimeError("no gates to balance: the model has no inherited layer, or was not called yet")
    return torch.stack(terms).mean()


def _to(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(like.dtype)


def _folded(down: nn.Module, up: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Module:
    up = up.to(weight)
    with torch.no_grad():
        up.weight.copy_(weight)
        if bias is not None and up.bias is not None:
            up.bias.copy_(bias)
    return nn.Sequential(down, up)
