"""`hyperfast::gated_experts`: gates and mixed heads of a low-rank layer in one launch, and its backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hyperfast import reference
from hyperfast.backends import Backend, Dispatcher, Implementation
from hyperfast.ops import _native, _triton
from hyperfast.ops._library import accumulator_dtype, differentiate, register


def _cpu_supports(z: Tensor, experts: Tensor) -> str | None:
    reason = _native.missing() or _native.wrong_device(z, "cpu")
    if reason is None and z.dtype not in _native.DTYPES:
        reason = f"z is {z.dtype}"
    if reason is None and (not z.numel() or not experts.numel()):
        reason = "a tensor is empty"
    if reason is None and z.ndim == 2:
        reason = "rows with a gate each are one matrix product, which BLAS does"
    return reason


def _triton_supports(z: Tensor, experts: Tensor, _bias: Tensor | None, gate_weight: Tensor, *_: Any) -> str | None:
    reason: str | None = _triton.missing(z.device)
    return reason or _triton.kernels("gated_experts").supports(z, experts, gate_weight)


def _triton_forward(*arguments: Any) -> Any:
    return _triton.kernels("gated_experts").forward(*arguments)


def _triton_backward(*arguments: Any) -> Any:
    return _triton.kernels("gated_experts").backward(*arguments)


class _Launch:
    """Holds what the launch needs alive, contiguous."""

    def __init__(
        self,
        z: Tensor,
        experts: Tensor,
        bias: Tensor | None,
        gate_weight: Tensor,
        gate_bias: Tensor | None,
        gate_input: Tensor | None,
        output: Tensor | None,
        gates: Tensor,
    ) -> None:
        given = (z, experts, bias, gate_weight, gate_bias, gate_input, output, gates)
        self.tensors = [None if x is None else x.contiguous() for x in given]
        names = ("z", "experts", "bias", "gate_weight", "gate_bias", "gate_input", "output", "gates")
        self.like, self.work = z, z.numel() * experts.shape[1]
        self.params = _native.module().GatedExpertsParams(
            dtype=_native.DTYPES[z.dtype],
            batch=z.shape[0],
            heads=experts.shape[0],
            outputs=experts.shape[1],
            rank=experts.shape[2],
            positions=z.shape[2:].numel(),
            gate_width=gate_weight.shape[1],
            **dict(zip(names, map(_address, self.tensors), strict=True)),
        )

    def run(self) -> None:
        _native.launch("gated_experts", self.params, self.like, self.work)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _native_forward(
    z: Tensor,
    experts: Tensor,
    bias: Tensor | None,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    gate_input: Tensor | None,
) -> tuple[Tensor, Tensor]:
    output = _native.empty((z.shape[0], experts.shape[1], *z.shape[2:]), z)
    gates = z.new_empty((z.shape[0], experts.shape[0]), dtype=accumulator_dtype(z.dtype))
    _Launch(z, experts, bias, gate_weight, gate_bias, gate_input, output, gates).run()
    return output, gates


def _native_backward(
    d_output: Tensor,
    d_gates: Tensor,
    z: Tensor,
    experts: Tensor,
    bias: Tensor | None,
    gate_weight: Tensor,
    gate_input: Tensor | None,
    gates: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    found = _backward_fake(d_output, d_gates, z, experts, bias, gate_weight, gate_input, gates)
    names = ("d_z", "d_experts", "d_bias", "d_gate_weight", "d_gate_bias", "d_gate_input")
    launch = _Launch(z, experts, bias, gate_weight, None, gate_input, None, gates)
    d_output, d_gates = d_output.contiguous(), d_gates.contiguous()
    addresses = {name: tensor.data_ptr() if tensor.numel() else 0 for name, tensor in zip(names, found, strict=True)}
    launch.params.set_backward(d_output=d_output.data_ptr(), d_gates=d_gates.data_ptr(), **addresses)
    launch.run()
    return found


forward_implementations = Dispatcher(
    "gated_experts",
    [
        Implementation(Backend.CPU, _native_forward, lambda z, experts, *_: _cpu_supports(z, experts)),
        Implementation(Backend.TRITON, _triton_forward, _triton_supports),
        Implementation(Backend.REFERENCE, reference.gated_experts),
    ],
)
backward_implementations = Dispatcher(
    "gated_experts_backward",
    [
        Implementation(Backend.CPU, _native_backward, lambda _d, _g, z, experts, *_: _cpu_supports(z, experts)),
        Implementation(Backend.TRITON, _triton_backward, lambda _d, _g, *given: _triton_supports(*given)),
        Implementation(Backend.REFERENCE, reference.gated_experts_backward),
    ],
)


def _fake(
    z: Tensor,
    experts: Tensor,
    bias: Tensor | None,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    gate_input: Tensor | None,
) -> tuple[Tensor, Tensor]:
    heads, outputs, _ = experts.shape
    gates = z.new_empty((z.shape[0], heads), dtype=accumulator_dtype(z.dtype))
    return z.new_empty((z.shape[0], outputs, *z.shape[2:])), gates


def _backward_fake(
    d_output: Tensor,
    d_gates: Tensor,
    z: Tensor,
    experts: Tensor,
    bias: Tensor | None,
    gate_weight: Tensor,
    gate_input: Tensor | None,
    gates: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    none = z.new_empty(0)
    return (
        z.new_empty(z.shape),
        experts.new_empty(experts.shape),
        none if bias is None else bias.new_empty(bias.shape),
        gate_weight.new_empty(gate_weight.shape),
        gate_weight.new_empty(gate_weight.shape[0]),
        z.new_empty(0) if gate_input is None else gate_input.new_empty(gate_input.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z, experts, bias, gate_weight, gate_bias, gate_input = inputs
    ctx.save_for_backward(z, experts, bias, gate_weight, gate_input, output[1])
    ctx.has_gate_bias = gate_bias is not None


def _backward(ctx: Any, d_output: Tensor, d_gates: Tensor) -> tuple[Tensor | None, ...]:
    z, experts, bias, gate_weight, gate_input, gates = ctx.saved_tensors
    found = gated_experts_backward(d_output, d_gates, z, experts, bias, gate_weight, gate_input, gates)
    d_z, d_experts, d_bias, d_gate_weight, d_gate_bias, d_gate_input = found
    return (
        d_z,
        d_experts,
        None if bias is None else d_bias,
        d_gate_weight,
        d_gate_bias if ctx.has_gate_bias else None,
        None if gate_input is None else d_gate_input,
    )


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _second_backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    return differentiate(reference.gated_experts_backward, ctx.saved_tensors, gradients)


gated_experts = register(
    "gated_experts(Tensor z, Tensor experts, Tensor? bias, Tensor gate_weight, Tensor? gate_bias, Tensor? gate_input) "
    "-> (Tensor, Tensor)",
    forward_implementations,
    _fake,
    _backward,
    _save,
)
gated_experts_backward = register(
    "gated_experts_backward(Tensor d_output, Tensor d_gates, Tensor z, Tensor experts, Tensor? bias, "
    "Tensor gate_weight, Tensor? gate_input, Tensor gates) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    backward_implementations,
    _backward_fake,
    _second_backward,
    _save_backward,
)
