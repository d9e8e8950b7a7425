"""The autograd of operations whose arguments and results are tensors, lists of tensors, and other things.

It does what `torch.library.register_autograd` does. That takes apart nested structures of any kind and puts them
together again, which takes longer than a loss over small maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def differentiable(
    operation: Any, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> Callable[..., Any]:
    """The kernel of `operation` for the Autograd key; it takes the keys first.

    Args:
        operation: an overload whose arguments are positional and have no defaults.
        backward: (ctx, *gradients by result) -> gradients by argument, a list for a list; that of an only argument may
            stand alone. `ctx.needs_input_grad` is by argument too.
        setup_context: (ctx, inputs, output), called after the forward pass.
    """

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keys: Any, inputs: Sequence[Any], counts: list[int | None], *_: Tensor) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = operation.redispatch(keys, *inputs)
            setup_context(ctx, inputs, output)
            ctx.inputs, ctx.outputs = _counts(inputs), _counts(_as_tuple(output))
            counts += ctx.outputs
            return tuple(_tensors(_as_tuple(output)))

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            needed = ctx.needs_input_grad
            ctx.needs_input_grad = _nested(needed[3:], ctx.inputs)
            try:
                found = _as_tuple(backward(ctx, *_nested(gradients, ctx.outputs)))
            finally:
                ctx.needs_input_grad = needed
            return None, None, None, *_flat(found, ctx.inputs)

    Differentiable.__name__ = f"{operation._opname}_with_gradient"
    apply: Any = Differentiable.apply

    def kernel(keys: Any, *inputs: Any) -> Any:
        keys = keys & torch._C._after_autograd_keyset
        tensors = list(_tensors(inputs))
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
            with torch._C._AutoDispatchBelowAutograd():
                return operation.redispatch(keys, *inputs)
        counts: list[int | None] = []
        found = _nested(apply(keys, inputs, counts, *tensors), counts)
        return tuple(found) if len(found) > 1 else found[0]

    return kernel


def _as_tuple(values: Any) -> tuple[Any, ...]:
    return values if isinstance(values, tuple) else (values,)


def _counts(values: Sequence[Any]) -> list[int | None]:
    """Of each value: how many tensors it lists; -1 for a tensor itself, None for anything else."""
    return [
        -1 if isinstance(value, Tensor) else len(value) if isinstance(value, list) and _lists_tensors(value) else None
        for value in values
    ]


def _lists_tensors(values: Sequence[Any]) -> bool:
    return all(isinstance(value, Tensor) for value in values)


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list) and _lists_tensors(value):
            yield from value


def _nested(flat: Sequence[Any], counts: Sequence[int | None]) -> list[Any]:
    """What belongs to tensors in the order of `_tensors`, by value again; None for a value without tensors."""
    found: list[Any] = []
    at = 0
    for count in counts:
        if count is None:
            found.append(None)
        elif count < 0:
            found.append(flat[at])
            at += 1
        else:
            found.append(list(flat[at : at + count]))
            at += count
    return found


def _flat(values: Sequence[Any], counts: Sequence[int | None]) -> Iterator[Any]:
    """The inverse of `_nested`."""
    for value, count in zip(values, counts, strict=True):
        if count is not None and count < 0:
            yield value
        elif count is not None:
            yield from value if value is not None else [None] * count
