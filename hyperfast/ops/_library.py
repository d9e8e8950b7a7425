"""The `hyperfast::` operator library and what every operation does the same way."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hyperfast.ops._autograd import differentiable

library = torch.library.Library("hyperfast", "DEF")


def register(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any],
    setup_context: Callable[..., None],
) -> Any:
    """Define the opaque operation `schema` for all devices and return its overload.

    Opaque rather than a Triton operator: it passes opcheck, `torch.compile`, meta and the Triton interpreter alike,
    and the choice of a kernel at run time makes no guards.
    """
    name = schema.split("(", 1)[0]
    library.define(schema)
    library.impl(name, without_autocast(run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"hyperfast::{name}", fake, lib=library)
    operation = getattr(torch.ops.hyperfast, name).default
    library.impl(name, differentiable(operation, backward, setup_context), "Autograd", with_keyset=True)
    return operation


def register_mutating(schema: str, run: Callable[..., None]) -> Any:
    """As `register`, for an operation that changes the arguments marked in its schema and returns nothing.

    No gradient flows through it. The changed tensors count a new version each, so that a backward pass which needs
    the old values fails instead of using the new ones.
    """
    name = schema.split("(", 1)[0]
    library.define(schema)
    operation = getattr(torch.ops.hyperfast, name).default
    arguments = operation._schema.arguments
    changed = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]

    def run_and_count(*arguments: Any) -> None:
        run(*arguments)
        for position in changed:
            torch.autograd.graph.increment_version(arguments[position])

    library.impl(name, without_autocast(run_and_count), "CompositeExplicitAutograd")
    torch.library.register_fake(f"hyperfast::{name}", lambda *_: None, lib=library)
    return operation


def without_autocast(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` in the dtypes of its arguments: sums over all weights of a network do not become bfloat16 unasked."""

    @functools.wraps(run)
    def guarded(*arguments: Any) -> Any:
        devices = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
        if not devices:
            return run(*arguments)
        with contextlib.ExitStack() as stack:
            for device in devices:
                stack.enter_context(torch.autocast(device, enabled=False))
            return run(*arguments)

    return guarded


def differentiate(
    function: Callable[..., Any], inputs: Sequence[Any], gradients: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Gradients of `function(*inputs)` with respect to each tensor among `inputs`, by autograd through `function`.

    Second derivatives are rare enough that they run on the reference: a backward operation names its own reference
    here and is differentiable once more.
    """
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() if _differentiable(x) else x for x in inputs]
        outputs = function(*leaves)
        outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        used = [
            (output, gradient)
            for output, gradient in zip(outputs, gradients, strict=True)
            if gradient is not None and output.requires_grad
        ]
        wanted = [x for x in leaves if _differentiable(x)]
        found = iter(
            torch.autograd.grad([o for o, _ in used], wanted, [g for _, g in used], allow_unused=True)
            if used
            else [None] * len(wanted)
        )
    return tuple(next(found) if _differentiable(x) else None for x in inputs)


def _differentiable(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are taken in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def accumulator(tensors: Sequence[Tensor]) -> torch.dtype:
    """float64 as soon as one tensor is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
