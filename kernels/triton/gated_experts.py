"""Triton kernels of `gated_experts`: gates, then heads mixed and multiplied, two launches; the backward is four.

A gate belongs to a sample, so a program mixes the tile of the experts that it multiplies by, in registers: neither the
output of a head nor the mixed matrix of a sample is ever written. Backward, a program keeps one tile of the experts and
goes through a piece of the batch: the tile of G_b z_b^T is contracted with the heads and scaled into their gradients
while it is in registers. What several programs add to is written once by each, and added in a fixed order by a later
launch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hyperfast.kernels.config import (
    INT32_MAX,
    TRITON_TYPES,
    Configuration,
    cdiv,
    device_guard,
    kernel_signature,
    multiprocessors,
    next_power_of_2,
    refuse_device,
    refuse_dtype,
)
from hyperfast.kernels.triton.gated_experts_kernels import (
    gated_experts_gate_kernel,
    gated_experts_input_kernel,
    gated_experts_logits_kernel,
    gated_experts_output_kernel,
    gated_experts_products_kernel,
    gated_experts_sums_kernel,
)
from hyperfast.kernels.triton.table import alignment

__all__ = ["backward", "configurations", "forward", "supports"]

MAX_HEADS = 16
TILE = 64
"""Rows and columns of a tile of the output; positions of a tile of z's gradient."""
STEP = 32
"""What is summed over in one step: positions, outputs, or ranks where there are so many."""
NARROW = 16
"""Ranks of a tile, up to a rank of 16; else `STEP`."""
HELD = 4096
"""Elements of the experts that a program of the backward holds, padded heads included."""
FEATURES = 16
"""What the gate reads, in one step of a program."""
POSITIONS = 256
"""Positions of z of which the mean is taken in one step."""
BLOCK, SAMPLES, COLUMNS = 1024, 32, 32
"""Elements of the experts' gradient, and samples and features of the gate's, that a program sums up."""
PRECISION = "tf32x3"
SUM_OPTIONS = {"num_warps": 4, "num_stages": 1}
HELD_OPTIONS = {"num_warps": 8, "num_stages": 2}
"""Of the kernel that holds a tile of all heads, in the registers of as many threads."""
COPIED_HEADS = 4
"""Heads whose tiles are copied ahead of a product; more would take more shared memory than every GPU has."""


def supports(z: Tensor, experts: Tensor, gate_weight: Tensor) -> str | None:
    """Why these kernels cannot run, or `None` where they can."""
    if reason := refuse_device(z.device) or refuse_dtype(z.dtype):
        return reason
    if not z.numel() or not experts.numel():
        return "a tensor is empty"
    if z.ndim == 2:
        return "rows with a gate each are one matrix product, which BLAS does"
    if len(experts) > MAX_HEADS:
        return f"{len(experts)} heads; at most {MAX_HEADS}"
    heads, outputs, rank = experts.shape
    if max(heads * outputs * (rank + 1), max(outputs, rank) * z.shape[2:].numel(), gate_weight.numel()) > INT32_MAX:
        return "the experts or a sample have more than 2^31 elements"
    if len(z) * cdiv(max(outputs, rank), NARROW) * cdiv(z.shape[2:].numel(), TILE) > INT32_MAX:
        return "more than 2^31 programs"
    return None


def _options(heads: int) -> dict[str, int]:
    return {"num_warps": 4, "num_stages": 2 if heads <= COPIED_HEADS else 1}


def _output_options(heads: int, rank: int, dtype: torch.dtype) -> dict[str, int]:
    """As many warps as load a tile of z by 16 bytes a thread, up to 8: in fewer, the heads take too many registers."""
    return {**_options(heads), "num_warps": min(8, _ranks(rank) * TILE * dtype.itemsize // (16 * 32))}


def _ranks(rank: int) -> int:
    return NARROW if rank <= NARROW else STEP


def _held_rows(heads: int, ranks: int) -> int:
    """Rows of the experts of which a program of the backward holds all heads."""
    return max(NARROW, min(TILE, HELD // (next_power_of_2(heads) * ranks)))


def forward(
    z: Tensor,
    experts: Tensor,
    bias: Tensor | None,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    gate_input: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and gates, as `reference.gated_experts`; in two launches.

    Args:
        z: `[B, r, *spatial]`; all tensors are copied where they are not contiguous.
        experts: `[H, m, r]`.
        bias: `[H, m]`, or None.
        gate_weight: `[H, D]`.
        gate_bias: `[H]`, or None.
        gate_input: `[B, D]`, or None: the mean of z.
    """
    z, experts, gate_weight = z.contiguous(), experts.contiguous(), gate_weight.contiguous()
    bias, gate_bias, gate_input = (None if x is None else x.contiguous() for x in (bias, gate_bias, gate_input))
    heads, outputs, rank = experts.shape
    batch, positions, width = len(z), z.shape[2:].numel(), gate_weight.shape[1]
    output = z.new_empty((batch, outputs, *z.shape[2:]))
    gates = z.new_empty((batch, heads), dtype=torch.float32)
    align, rank_align = alignment([positions]), alignment([rank])
    with device_guard(z):
        gated_experts_gate_kernel[(batch,)](
            gates, z, gate_input, gate_weight, gate_bias, positions, width, heads, next_power_of_2(heads), align,
            FEATURES, POSITIONS, **SUM_OPTIONS,
        )  # fmt: skip
        gated_experts_output_kernel[(batch * cdiv(outputs, TILE) * cdiv(positions, TILE),)](
            output, z, experts, bias, gates, positions, outputs, rank, heads, align, rank_align, PRECISION, TILE,
            _ranks(rank), **_output_options(heads, rank, z.dtype),
        )  # fmt: skip
    return output, gates


def backward(
    d_output: Tensor,
    d_gates: Tensor,
    z: Tensor,
    experts: Tensor,
    bias: Tensor | None,
    gate_weight: Tensor,
    gate_input: Tensor | None,
    gates: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients as `reference.gated_experts_backward`, in four launches; no order of a sum depends on the device's."""
    d_output, d_gates, z, experts = (x.contiguous() for x in (d_output, d_gates, z, experts))
    gate_weight, gates = gate_weight.contiguous(), gates.contiguous()
    bias, gate_input = (None if x is None else x.contiguous() for x in (bias, gate_input))
    heads, outputs, rank = experts.shape
    batch, positions, width = len(z), z.shape[2:].numel(), gate_weight.shape[1]
    padded, ranks, align, rank_align = next_power_of_2(heads), _ranks(rank), alignment([positions]), alignment([rank])
    rows = _held_rows(heads, ranks)
    tiles = cdiv(outputs, rows) * cdiv(rank, ranks)
    # As many pieces as keep the device busy: each writes a gradient of all experts of its own.
    chunk = cdiv(batch, min(batch, cdiv(4 * multiprocessors(z.device), tiles)))
    pieces = cdiv(batch, chunk)
    size = experts.numel() + (0 if bias is None else bias.numel())
    partials = gates.new_empty((pieces, size))
    d_gate_partials = gates.new_empty((batch, tiles, heads))
    d_logits, seen = torch.empty_like(gates), gates.new_empty((batch, width))
    d_z, d_experts = torch.empty_like(z), torch.empty_like(experts)
    d_gate_weight, d_gate_bias = torch.empty_like(gate_weight), gate_weight.new_empty(heads)
    d_bias, d_gate_input = (None if x is None else torch.empty_like(x) for x in (bias, gate_input))
    with device_guard(z):
        gated_experts_products_kernel[(pieces * tiles,)](
            partials, d_gate_partials, d_output, z, experts, bias, gates, batch, positions, outputs, rank, chunk, heads,
            padded, align, rank_align, PRECISION, rows, ranks, STEP, **HELD_OPTIONS,
        )  # fmt: skip
        gated_experts_logits_kernel[(batch,)](
            d_logits, seen, d_gate_input, d_gates, d_gate_partials, z, gate_input, gate_weight, gates, positions, width,
            tiles, heads, padded, align, FEATURES, POSITIONS, **SUM_OPTIONS,
        )  # fmt: skip
        gated_experts_input_kernel[(batch * cdiv(rank, ranks) * cdiv(positions, TILE),)](
            d_z, d_output, experts, gates, d_logits if gate_input is None else None, gate_weight, positions, outputs,
            rank, heads, align, rank_align, PRECISION, ranks, STEP, TILE, **_options(heads),
        )  # fmt: skip
        gated_experts_sums_kernel[(cdiv(size, BLOCK) + heads * cdiv(width, COLUMNS),)](
            d_experts, d_bias, d_gate_weight, d_gate_bias, partials, d_logits, seen, batch, outputs, rank, width,
            pieces, heads, rank_align, BLOCK, SAMPLES, COLUMNS, **SUM_OPTIONS,
        )  # fmt: skip
    none = z.new_empty(0)
    return (
        d_z,
        d_experts,
        none if d_bias is None else d_bias,
        d_gate_weight,
        d_gate_bias,
        none if d_gate_input is None else d_gate_input,
    )


# ---------------------------------------------------------------------------------------------------------------------
# What is shipped, for the ahead-of-time gate

# (heads, rank, alignment of positions and rank, biases, a gate input of its own)
_SHIPPED = (
    (3, 16, 16, False, False),
    (1, 16, 16, False, False),
    (2, 64, 16, True, False),
    (3, 64, 16, False, False),
    (4, 5, 1, True, True),
    (8, 32, 16, True, True),
    (16, 32, 16, False, False),
)


def configurations(dtype: torch.dtype) -> Iterator[Configuration]:
    """The compiled forms of all kernels for z and experts of `dtype`."""
    element, wide = f"*{TRITON_TYPES[dtype]}", ("partials", "d_gate_partials", "d_gates", "gates", "d_logits", "seen")
    for heads, rank, align, has_bias, own in _SHIPPED:
        ranks = _ranks(rank)
        absent = [
            *(() if has_bias else ("bias", "gate_bias", "d_bias")),
            *(() if own else ("gate_input", "d_gate_input")),
        ]
        values: dict[str, Any] = {"H": heads, "HEADS": next_power_of_2(heads), "ALIGN": align, "RANK_ALIGN": align}
        values |= {"PRECISION": PRECISION, "TILE": TILE, "RANKS": ranks, "ROWS": _held_rows(heads, ranks), "STEP": STEP}
        values |= {"FEATURES": FEATURES, "POSITIONS": POSITIONS, "BLOCK": BLOCK, "SAMPLES": SAMPLES, "COLUMNS": COLUMNS}
        for kernel in (
            gated_experts_gate_kernel,
            gated_experts_output_kernel,
            gated_experts_products_kernel,
            gated_experts_logits_kernel,
            gated_experts_input_kernel,
            gated_experts_sums_kernel,
        ):
            names = kernel.arg_names
            constants: dict[str, Any] = {name: value for name, value in values.items() if name in names}
            constants |= {name: None for name in absent if name in names}
            if kernel is gated_experts_input_kernel and own:
                constants["d_logits"] = None
            types: dict[str, Any] = {name: "*fp32" if name in wide else element for name in names}
            types |= dict.fromkeys(("B", "P", "M", "R", "D", "chunk", "tiles", "pieces"), "i32")
            gate_alone = kernel in (gated_experts_gate_kernel, gated_experts_logits_kernel) and own
            what = "matrices" if kernel is gated_experts_sums_kernel or gate_alone else "maps"
            label = f"{what} heads={heads} rank={rank} align={align} biases={has_bias} own={own} {TRITON_TYPES[dtype]}"
            options = _options(heads) if "PRECISION" in names else SUM_OPTIONS
            options = HELD_OPTIONS if kernel is gated_experts_products_kernel else options
            options = _output_options(heads, rank, dtype) if kernel is gated_experts_output_kernel else options
            yield Configuration(label, kernel, kernel_signature(kernel, types, constants), constants, options)
