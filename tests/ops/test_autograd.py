"""Gradients of operations over lists of tensors, by the kernel that all of them share."""

from __future__ import annotations

import pytest
import torch

from hyperfast.ops._library import register


@pytest.fixture(scope="module")
def scale_all():
    """`[f b a for a], sum`, which says which gradients were asked for."""
    asked: list = []

    def run(maps, factor, by):
        return torch.stack([m.sum() for m in maps]).sum() * factor, [m * by * factor for m in maps]

    def backward(ctx, d_sum, d_maps):
        *maps, by = ctx.saved_tensors
        ctx.asked.append(ctx.needs_input_grad)
        given = [torch.zeros_like(m) if d is None else d for m, d in zip(maps, d_maps, strict=True)]
        d_by = torch.stack([(d * m).sum() for d, m in zip(given, maps, strict=True)]).sum() * ctx.factor
        first = torch.zeros(()) if d_sum is None else d_sum
        return [(d * by + first) * ctx.factor for d in given], None, d_by

    def save(ctx, inputs, output):
        maps, ctx.factor, by = inputs
        ctx.asked = asked
        ctx.save_for_backward(*maps, by)
        ctx.set_materialize_grads(False)

    operation = register(
        "scale_all_for_a_test(Tensor[] maps, float factor, Tensor by) -> (Tensor, Tensor[])",
        run,
        lambda maps, factor, by: (maps[0].new_empty(()), [torch.empty_like(m) for m in maps]),
        backward,
        save,
    )
    operation.asked = asked
    return operation


def _maps():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, dtype=torch.float64, generator=generator, requires_grad=True) for n in (2, 3)]


def test_gradients_by_argument(scale_all):
    by = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b, by: [*scale_all([a, b], 2.0, by)[1]], (*_maps(), by))
    assert torch.autograd.gradcheck(lambda a, b: scale_all([a, b], 2.0, by.detach())[0], _maps())


def test_the_backward_knows_what_was_asked_for(scale_all):
    first, second = _maps()
    second.requires_grad_(False)
    total, found = scale_all([first, second], 2.0, torch.ones((), dtype=torch.float64))
    assert total.requires_grad and all(m.requires_grad for m in found)
    total.backward()
    assert scale_all.asked[-1] == [[True, False], None, False]
    assert second.grad is None and torch.equal(first.grad, torch.full_like(first, 2.0))


def test_nothing_is_recorded_without_need(scale_all):
    maps = _maps()
    with torch.no_grad():
        assert not scale_all(maps, 2.0, torch.ones((), dtype=torch.float64))[0].requires_grad
    assert not scale_all([m.detach() for m in maps], 2.0, torch.ones((), dtype=torch.float64))[0].requires_grad
