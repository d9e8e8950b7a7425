"""The contract of `hyperfast::sgd_rank_one` and `adam_rank_one`, on every backend."""

import pytest
import torch
from helpers import assert_as_accurate, on_threads

from hyperfast import functional
from hyperfast.backends import use_backend
from hyperfast.ops.rank_one_update import adam_rank_one, sgd_implementations, sgd_rank_one

DISPATCHER = sgd_implementations
# Widths that fill no vector, one, several and a rest; more rows than one chunk of the CPU holds.
SIZES = [(7, 3), (5, 16), (11, 45), (4500, 64), (1, 1)]
SGD = {
    "plain": {"lr": 0.1},
    "decay": {"lr": 0.1, "weight_decay": 0.01},
    "momentum": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    "dampening": {"lr": 0.1, "momentum": 0.9, "dampening": 0.3},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
}
ADAM = {
    "adam": {"lr": 1e-2, "weight_decay": 0.1, "decoupled": False},
    "adamw": {"lr": 1e-2, "weight_decay": 0.1, "decoupled": True},
    "other betas": {"lr": 1e-2, "betas": (0.5, 0.99), "eps": 1e-3},
}
RULES = [("sgd", name) for name in SGD] + [("adam", name) for name in ADAM]


def problem(rows=11, hidden=45, segments=None, dtype=torch.float64, steps=4):
    """A weight, gradients' factors for some steps, and offsets (with an empty segment) for several of them."""
    weight = torch.randn(rows, hidden).to(dtype)
    offsets = None
    if segments:
        offsets = torch.tensor([0, *sorted([0, *torch.randint(rows, (segments - 2,)).tolist()]), rows])
    shape = (hidden,) if offsets is None else (segments, hidden)
    factors = [(torch.randn(rows).to(dtype), torch.randn(shape).to(dtype)) for _ in range(steps)]
    return weight, factors, offsets


def gradient(left, right, offsets):
    if offsets is None:
        return torch.outer(left, right)
    parts = [torch.outer(left[a:b], r) for a, b, r in zip(offsets[:-1], offsets[1:], right, strict=True)]
    return torch.cat(parts)


def plain(kind, name, weight, factors, offsets):
    """torch.optim with the gradient as a matrix."""
    options = dict((SGD if kind == "sgd" else ADAM)[name])
    if kind == "adam":
        make = torch.optim.AdamW if options.pop("decoupled", True) else torch.optim.Adam
        options.setdefault("weight_decay", 0.0)
    else:
        make = torch.optim.SGD
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = make([parameter], **options)
    for left, right in factors:
        parameter.grad = gradient(left, right, offsets)
        optimizer.step()
    state = optimizer.state[parameter]
    kept = [state[key] for key in ("momentum_buffer", "exp_avg", "exp_avg_sq") if state.get(key) is not None]
    return [parameter.detach(), *kept]


def fused(kind, name, weight, factors, offsets):
    """The weight and the state after all steps."""
    weight = weight.clone()
    if kind == "adam":
        state = [torch.zeros_like(weight), torch.zeros_like(weight)]
        for step, (left, right) in enumerate(factors, start=1):
            functional.adam_rank_one(
                weight, left, right, exp_avg=state[0], exp_avg_sq=state[1], step=step, offsets=offsets, **ADAM[name]
            )
        return [weight, *state]
    options = SGD[name]
    state = [torch.zeros_like(weight)] if options.get("momentum") else []
    for step, (left, right) in enumerate(factors):
        first = {"dampening": 0.0} if step == 0 else {}  # torch has none in its first step
        buffer = state[0] if state else None
        functional.sgd_rank_one(
            weight, left, right, momentum_buffer=buffer, offsets=offsets, **{**options, **first}
        )
    return [weight, *state]


@pytest.mark.parametrize("segments", [None, 4])
@pytest.mark.parametrize(("kind", "name"), RULES)
def test_is_torchs_optimiser(backend, kind, name, segments):
    arguments = problem(segments=segments)
    found, expected = fused(kind, name, *arguments), plain(kind, name, *arguments)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("rows", "hidden"), SIZES)
@pytest.mark.parametrize(("kind", "name"), [("sgd", "nesterov"), ("adam", "adamw")])
def test_accuracy(backend, kind, name, rows, hidden):
    weight, factors, _ = problem(rows, hidden, dtype=torch.float32)
    doubles = weight.double(), [(left.double(), right.double()) for left, right in factors], None
    found, eager = fused(kind, name, weight, factors, None), plain(kind, name, weight, factors, None)
    for a, b, c in zip(found, eager, plain(kind, name, *doubles), strict=True):
        assert_as_accurate(a, b, c)


@pytest.mark.parametrize(("kind", "name"), [("sgd", "momentum"), ("adam", "adam")])
def test_repeatable_and_the_same_on_any_number_of_threads(backend, kind, name):
    arguments = problem(4500, 64, segments=3, dtype=torch.float32)
    results = []
    for threads in (3, 1, 3):
        with on_threads(threads):
            results.append(fused(kind, name, *arguments))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize(("kind", "name"), [("sgd", "momentum"), ("adam", "adamw")])
def test_other_memory(kind, name):
    """A transposed weight takes the reference; factors may have any strides."""
    weight, factors, _ = problem()
    strided = [(left.repeat_interleave(2)[::2], right.repeat_interleave(2)[::2]) for left, right in factors]
    found = fused(kind, name, weight.mT.contiguous().mT, strided, None)
    torch.testing.assert_close(found, plain(kind, name, weight, factors, None), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize(("rows", "hidden"), [(0, 3), (3, 0)])
def test_empty(name, rows, hidden):
    with use_backend(name):
        functional.sgd_rank_one(torch.empty(rows, hidden), torch.ones(rows), torch.empty(hidden), lr=0.1)


def test_a_backward_pass_that_needs_the_old_weight_fails(backend):
    weight, [(left, right), *_], _ = problem()
    weight.requires_grad_()
    loss = weight.square().sum()
    functional.sgd_rank_one(weight.detach(), left, right, lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("segments", [None, 3])
def test_opcheck(backend, segments):
    weight, [(left, right), *_], offsets = problem(segments=segments, dtype=torch.float32)
    right = right if segments else right[None]
    buffers = [torch.randn_like(weight)]
    torch.library.opcheck(sgd_rank_one, (weight, buffers, left, right, offsets, 0.1, 0.9, 0.0, 0.01, True))
    moments = torch.randn_like(weight), torch.rand_like(weight)
    torch.library.opcheck(
        adam_rank_one, (weight, *moments, left, right, offsets, 0.1, 0.9, 0.99, 1e-8, 0.01, True, 3)
    )


def test_compiles_to_one_graph(backend):
    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def step(weight, buffer, left, right):
        functional.sgd_rank_one(weight, left * 2, right, lr=0.1, momentum_buffer=buffer, momentum=0.9)
        return weight.sum()

    for rows in (5, 9):
        weight, [(left, right), *_], _ = problem(rows)
        expected = plain("sgd", "momentum", weight, [], None)[0]
        buffer = torch.zeros_like(weight)
        step(weight, buffer, left, right)
        torch.testing.assert_close(weight, expected - 0.1 * torch.outer(2 * left, right))
        torch.testing.assert_close(buffer, torch.outer(2 * left, right))


def test_meta():
    with torch.device("meta"), use_backend("reference"):
        functional.sgd_rank_one(torch.empty(5, 3), torch.empty(5), torch.empty(3), lr=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(3)}, r"weight is \[3\]; expected \[P, H\]"),
        ({"left": torch.ones(4)}, r"left is \[4\]; expected \[5\], one per row of weight"),
        ({"right": torch.ones(4)}, r"right is \[4\]; expected \[3\]"),
        ({"offsets": torch.tensor([0, 2, 5])}, r"right is \[3\]; expected \[2, 3\]"),
        ({"left": torch.ones(5, dtype=torch.float64)}, "left is torch.float64 but weight is torch.float32; use one"),
        ({"momentum_buffer": torch.ones(3, 5)}, r"state 0 is \[3, 5\]; expected \[5, 3\], as weight"),
        ({"right": torch.ones(3, device="meta")}, "right on meta"),
    ],
)
def test_bad_arguments(change, message):
    given = {"weight": torch.ones(5, 3), "left": torch.ones(5), "right": torch.ones(3)} | change
    with pytest.raises(ValueError, match=message):
        functional.sgd_rank_one(**given, lr=0.1)


def test_a_step_before_the_first():
    weight = torch.ones(2, 2)
    with pytest.raises(ValueError, match="step is 0; the first one is 1"):
        functional.adam_rank_one(
            weight, torch.ones(2), torch.ones(2), exp_avg=weight.clone(), exp_avg_sq=weight.clone(), step=0
        )
