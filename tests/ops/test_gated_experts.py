"""The mixture of experts behind one projection: its formula, its gradients, and what an operation promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hyperfast
from hyperfast import reference
from hyperfast.functional import gated_experts

F64 = torch.float64


def inputs(
    z: tuple[int, ...] = (3, 4, 5, 2), heads: int = 3, outputs: int = 6, bias: bool = True, own: int | None = None
) -> list[Tensor | None]:
    """z, experts, bias, gate weight, gate bias, gate input."""
    torch.manual_seed(0)
    width = z[1] if own is None else own
    return [
        torch.randn(z, dtype=F64),
        torch.randn(heads, outputs, z[1], dtype=F64),
        torch.randn(heads, outputs, dtype=F64) if bias else None,
        torch.randn(heads, width, dtype=F64),
        torch.randn(heads, dtype=F64) if bias else None,
        None if own is None else torch.randn(z[0], own, dtype=F64),
    ]


CASES = {
    "maps": inputs(),
    "without biases": inputs(bias=False),
    "one head": inputs(heads=1),
    "one sample": inputs((1, 3, 7), heads=2, outputs=5),
    "rows": inputs((7, 4), heads=4),
    "rows without biases": inputs((7, 4), bias=False),
    "gate of its own": inputs(own=5),
    "rows with a gate of their own": inputs((7, 4), own=2),
}
cases = pytest.mark.parametrize("given", CASES.values(), ids=CASES)


def literal(
    z: Tensor, experts: Tensor, bias: Tensor | None, gate_weight: Tensor, gate_bias: Tensor | None, own: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One output per head, stacked and summed, as the paper has it."""
    maps = z.flatten(2) if z.ndim > 2 else z[:, :, None]
    logits = (maps.mean(2) if own is None else own) @ gate_weight.T
    gates = (logits if gate_bias is None else logits + gate_bias).softmax(1)
    outputs = [torch.einsum("mr,brp->bmp", expert, maps) for expert in experts]
    if bias is not None:
        outputs = [output + b[:, None] for output, b in zip(outputs, bias, strict=True)]
    mixed = sum(gates[:, h, None, None] * output for h, output in enumerate(outputs))
    assert isinstance(mixed, Tensor)
    return mixed.view(len(z), -1, *z.shape[2:]), gates


@cases
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_it_is_the_sum_of_gated_heads(given: list[Tensor | None], backend: str) -> None:
    leaves = [None if x is None else x.clone().requires_grad_() for x in given]
    with hyperfast.use_backend(backend):
        found = gated_experts(*leaves)  # type: ignore[arg-type]
    expected = literal(*leaves)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    weights = [torch.randn_like(x) for x in expected]
    some = [x for x in leaves if x is not None]
    gradients = [
        torch.autograd.grad(sum((w * x).sum() for w, x in zip(weights, pair, strict=True)), some)  # type: ignore[arg-type]
        for pair in (found, expected)
    ]
    for index, (own, true) in enumerate(zip(*gradients, strict=True)):
        torch.testing.assert_close(own, true, rtol=1e-10, atol=1e-10, msg=f"gradient {index}")


@cases
def test_gradcheck_to_the_second_derivative(given: list[Tensor | None]) -> None:
    leaves = [None if x is None else x.clone().requires_grad_() for x in given]
    assert torch.autograd.gradcheck(gated_experts, leaves)
    assert torch.autograd.gradgradcheck(gated_experts, leaves)


@cases
def test_opcheck(given: list[Tensor | None]) -> None:
    permuted = [None if x is None else x.transpose(0, -1).contiguous().transpose(0, -1) for x in given]
    for arguments in (given, permuted):
        leaves = [None if x is None else x.clone().requires_grad_() for x in arguments]
        torch.library.opcheck(torch.ops.hyperfast.gated_experts.default, leaves)


def test_compiles_for_any_batch() -> None:
    compiled = torch.compile(gated_experts, fullgraph=True, dynamic=True)
    for batch in (3, 5):
        given = [None if x is None else x.float() for x in inputs((batch, 4, 3, 3))]
        leaves = [None if x is None else x.requires_grad_() for x in given]
        found = compiled(*leaves)
        torch.testing.assert_close(found, gated_experts(*leaves))  # type: ignore[arg-type]
        found[0].sum().backward()


def test_autocast_leaves_float32_alone() -> None:
    given = [None if x is None else x.float() for x in inputs()]
    with torch.autocast("cpu", torch.bfloat16):
        output, gates = gated_experts(*given)  # type: ignore[arg-type]
    assert output.dtype == gates.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_wide_gates(dtype: torch.dtype) -> None:
    given = [None if x is None else x.to(dtype) for x in inputs()]
    output, gates = gated_experts(*given)  # type: ignore[arg-type]
    assert output.dtype == dtype and gates.dtype == torch.float32
    torch.testing.assert_close(gates.sum(1), torch.ones(3), rtol=1e-6, atol=0)


def test_meta_and_empty_batches() -> None:
    on_meta = [None if x is None else x.to("meta") for x in inputs()]
    output, gates = gated_experts(*on_meta)  # type: ignore[arg-type]
    assert output.shape == (3, 6, 5, 2) and gates.shape == (3, 3)
    output, gates = gated_experts(*inputs((0, 4, 5)))  # type: ignore[arg-type]
    assert output.shape == (0, 6, 5) and gates.shape == (0, 3)


def test_two_runs_agree_bit_for_bit() -> None:
    given = [None if x is None else x.float() for x in inputs((16, 8, 9, 9))]
    first, second = (gated_experts(*given) for _ in range(2))  # type: ignore[arg-type]
    assert all(map(torch.equal, first, second))


def test_one_head_has_a_gate_without_gradient() -> None:
    given = [None if x is None else x.requires_grad_() for x in inputs(heads=1)]
    output, gates = gated_experts(*given)  # type: ignore[arg-type]
    assert (gates == 1).all()
    output.square().sum().backward()
    assert given[3] is not None and not given[3].grad.any() and not given[4].grad.any()  # type: ignore[union-attr]


def test_identical_heads_give_the_gate_no_gradient() -> None:
    """Statement 6 of the specification: a router over equal heads learns nothing; the heads learn by their gates."""
    z, experts, bias, gate_weight, gate_bias, _ = inputs()
    assert experts is not None and bias is not None and gate_weight is not None
    equal, same = experts[:1].expand_as(experts).clone().requires_grad_(), bias[:1].expand_as(bias).clone()
    gate_weight.requires_grad_()
    output, _gates = gated_experts(z, equal, same, gate_weight, gate_bias)  # type: ignore[arg-type]
    output.square().sum().backward()
    assert gate_weight.grad is not None and gate_weight.grad.abs().max() < 1e-12
    assert equal.grad is not None and not torch.allclose(equal.grad[0], equal.grad[1])


def test_zero_sum_deviations_leave_the_output_and_wake_the_gate() -> None:
    """Statement 7, under a uniform gate."""
    z, experts, _, gate_weight, _, _ = inputs(bias=False)
    assert experts is not None and gate_weight is not None
    equal = experts[:1].expand_as(experts)
    noise = torch.randn_like(experts)
    apart = equal + noise - noise.mean(0)
    uniform = torch.zeros_like(gate_weight).requires_grad_()
    outputs = [gated_experts(z, heads, None, uniform)[0] for heads in (equal, apart)]  # type: ignore[arg-type]
    torch.testing.assert_close(outputs[0], outputs[1])
    outputs[1].square().sum().backward()
    assert uniform.grad is not None and uniform.grad.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: torch.randn(3, 5, 2)}, r"z is torch.float32 \[3, 5, 2\] and experts \[3, 6, 4\]; expected floats \[B, r"),
        ({0: torch.zeros(3, 4, dtype=torch.int64)}, r"z is torch.int64 \[3, 4\]"),
        ({2: torch.randn(3, 5)}, r"bias is \[3, 5\]; expected \[3, 6\] for 3 heads of 6 outputs behind rank 4"),
        ({3: torch.randn(2, 4)}, r"gate_weight is \[2, 4\]; expected \[3, 4\]"),
        ({4: torch.randn(1)}, r"gate_bias is \[1\]; expected \[3\]"),
        ({5: torch.randn(2, 4)}, r"gate_input is \[2, 4\]; expected \[3, 4\]"),
        ({1: torch.randn(3, 6, 4).double()}, "experts is torch.float64 but z is torch.float32; use one dtype"),
        ({1: torch.randn(3, 6, 4, device="meta")}, "all tensors must be on one device"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[int, Tensor], message: str) -> None:
    given = [None if x is None else x.float() for x in inputs((3, 4, 5))]
    for position, tensor in changes.items():
        given[position] = tensor
    with pytest.raises(ValueError, match=message):
        gated_experts(*given)  # type: ignore[arg-type]


def test_reference_backward_has_empty_tensors_for_what_there_is_not() -> None:
    z, experts, _, gate_weight, _, _ = inputs(bias=False)
    assert z is not None and experts is not None and gate_weight is not None
    output, gates = reference.gated_experts(z, experts, None, gate_weight, None)
    found = reference.gated_experts_backward(
        torch.randn_like(output), torch.zeros_like(gates), z, experts, None, gate_weight, None, gates
    )
    assert [x.numel() for x in found[2:]] == [0, gate_weight.numel(), 3, 0]
