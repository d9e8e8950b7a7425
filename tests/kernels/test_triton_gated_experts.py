"""The Triton kernels of `gated_experts` in the interpreter, against the reference in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers import assert_as_accurate

import hyperfast
from hyperfast import functional, reference

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor

pytestmark = pytest.mark.interpreter

Given = list["Tensor | None"]
NAMES = ("z", "experts", "bias", "gate weight", "gate bias", "gate input")
# Sizes that fill no tile, more than one tile of outputs, positions and ranks, more samples than pieces of the batch.
CASES: dict[str, dict[str, Any]] = {
    "a layer": {"z": (4, 16, 8, 8), "heads": 3, "outputs": 64, "bias": False},
    "sizes that fill no tile": {"z": (5, 6, 3, 5), "heads": 3, "outputs": 7},
    "several tiles": {"z": (3, 40, 9, 8), "heads": 2, "outputs": 70},
    "one head": {"z": (2, 3, 4), "heads": 1, "outputs": 5},
    "five heads": {"z": (3, 4, 6), "heads": 5, "outputs": 20},
    "sixteen heads, one sample": {"z": (1, 17, 5), "heads": 16, "outputs": 33, "bias": False},
    "a gate input of its own": {"z": (4, 5, 3, 3), "heads": 3, "outputs": 6, "own": 19},
    "many positions": {"z": (2, 2, 20, 30), "heads": 2, "outputs": 3},
}


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    pytest.importorskip("triton")
    from hyperfast.kernels.triton import gated_experts

    return gated_experts


def inputs(
    z: tuple[int, ...], heads: int, outputs: int, bias: bool = True, own: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Given:  # fmt: skip
    torch.manual_seed(0)
    rank = z[1]
    width = rank if own is None else own
    given = [
        torch.randn(z),
        torch.randn(heads, outputs, rank) / rank**0.5,
        torch.randn(heads, outputs) if bias else None,
        torch.randn(heads, width),
        torch.randn(heads) if bias else None,
        None if own is None else torch.randn(z[0], own),
    ]
    return [None if x is None else x.to(dtype) for x in given]


def doubled(given: list[Any]) -> list[Any]:
    return [None if x is None else x.double() for x in given]


def check(kernels: ModuleType, given: Given) -> None:
    z, experts, bias, gate_weight, _, gate_input = given
    assert kernels.supports(z, experts, gate_weight) is None
    found, eager = kernels.forward(*given), reference.gated_experts(*given)  # type: ignore[arg-type]
    exact = reference.gated_experts(*doubled(given))
    for a, b, c, what in zip(found, eager, exact, ("output", "gates"), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert_as_accurate(a, b, c, what=what)
    # The gates as they are: their own error is that of the forward pass.
    gradients = [torch.randn_like(x) for x in eager]
    arguments = [*gradients, z, experts, bias, gate_weight, gate_input, eager[1]]
    backwards = (kernels.backward(*arguments), reference.gated_experts_backward(*arguments))  # type: ignore[arg-type]
    true = reference.gated_experts_backward(*doubled(arguments))
    for a, b, c, what in zip(*backwards, true, NAMES, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if len(experts) == 1 and what.startswith("gate"):  # type: ignore[arg-type]
            assert a.abs().amax() < 1e-5 if a.numel() else not b.numel()  # one gate is 1 whatever its logit
        elif b.numel():
            assert_as_accurate(a, b, c, what=what)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_cases(kernels: ModuleType, case: dict[str, Any]) -> None:
    check(kernels, inputs(**case))


def test_half_precision(kernels: ModuleType) -> None:
    check(kernels, inputs((3, 18, 5, 4), heads=3, outputs=20, dtype=torch.float16))


def test_layouts(kernels: ModuleType) -> None:
    given = inputs((3, 4, 5, 6), heads=2, outputs=6)
    permuted = [None if x is None else x.transpose(0, -1).contiguous().transpose(0, -1) for x in given]
    check(kernels, permuted)


def test_pieces_of_the_batch_do_not_change_the_result(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for processors in (1, 3, 100):
        monkeypatch.setattr(kernels, "multiprocessors", lambda _, count=processors: count)
        check(kernels, inputs((11, 4, 6), heads=3, outputs=5))


def test_two_runs_agree_bit_for_bit(kernels: ModuleType) -> None:
    given = inputs(**CASES["several tiles"])
    (output, gates), again = kernels.forward(*given), kernels.forward(*given)
    assert torch.equal(output, again[0]) and torch.equal(gates, again[1])
    arguments = [torch.randn_like(output), torch.randn_like(gates), *given[:4], given[5], gates]
    first, second = kernels.backward(*arguments), kernels.backward(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_launches(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import GridExecutor

    launches = []
    call = GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        launches.append(self.fn.__name__.removeprefix("gated_experts_").removesuffix("_kernel"))
        call(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    given = inputs(**CASES["one head"])
    output, gates = kernels.forward(*given)
    kernels.backward(output, gates, *given[:4], given[5], gates)
    assert launches == ["gate", "output", "products", "logits", "input", "sums"]


def test_the_operation_runs_them(kernels: ModuleType) -> None:
    given = inputs((3, 4, 5, 2), heads=3, outputs=6)
    leaves = [None if x is None else x.clone().requires_grad_() for x in given]
    some = [x for x in leaves if x is not None]
    results = []
    for backend in ("triton", "reference"):
        with hyperfast.use_backend(backend):
            output, gates = functional.gated_experts(*leaves)  # type: ignore[arg-type]
            loss = output.square().mean() + gates.square().sum()
            results.append([output.detach(), *torch.autograd.grad(loss, some)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ({"z": (3, 4), "heads": 2, "outputs": 5}, "rows with a gate each are one matrix product, which BLAS does"),
        ({"z": (3, 4, 2), "heads": 17, "outputs": 5}, "17 heads; at most 16"),
        ({"z": (0, 4, 2), "heads": 2, "outputs": 5}, "a tensor is empty"),
        ({"z": (3, 4, 2), "heads": 2, "outputs": 5, "dtype": torch.float64}, "float64 is not float32, float16"),
        ({"z": (3, 4, 2), "heads": 2, "outputs": 5, "dtype": torch.bfloat16}, "interpreter is wrong for bfloat16"),
    ],
)
def test_what_they_cannot_take(kernels: ModuleType, case: dict[str, Any], message: str) -> None:
    given = inputs(**case)
    assert message in str(kernels.supports(given[0], given[1], given[3]))


def test_sizes_beyond_32_bits(kernels: ModuleType) -> None:
    one = torch.zeros(1)
    z, experts, gate = one.expand(2, 3, 2**31), one.expand(2, 4, 3), one.expand(2, 3)
    assert kernels.supports(z, experts, gate) == "the experts or a sample have more than 2^31 elements"
    z, experts = one.expand(2**30, 3, 200), one.expand(2, 4, 3)
    assert kernels.supports(z, experts, gate) == "more than 2^31 programs"
