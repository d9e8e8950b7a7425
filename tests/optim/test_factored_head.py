"""A head updated from the factors of its gradient is the head that torch's optimiser would have made."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hyperfast
from hyperfast.optim import cannot_factor, clip_grad_norm_, factor_head, total_grad_norm

SGD = (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "dampening": 0.2})
NESTEROV = (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "fused": True})
PLAIN = (torch.optim.SGD, {"lr": 0.05})
MAXIMIZE = (torch.optim.SGD, {"lr": 1e-3, "maximize": True})
ADAM = (torch.optim.Adam, {"lr": 1e-3, "weight_decay": 0.1})
ADAMW = (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1, "fused": True})
OPTIMISERS = [SGD, NESTEROV, PLAIN, MAXIMIZE, ADAM, ADAMW]
IDS = ["sgd", "nesterov", "plain", "maximize", "adam", "adamw"]


def network(**options):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4))
    return hyperfast.hypernetize(layers, hidden=(5, 7), **options).double()


def pair(make, options, **network_options):
    """Two equal hypernetworks with an optimiser each, the second one factored."""
    dense = network(**network_options)
    factored = copy.deepcopy(dense)
    optimisers = [make(model.parameters(), **options) for model in (dense, factored)]
    factor_head(factored, optimisers[1])
    return (dense, optimisers[0]), (factored, optimisers[1])


def backward(model, seed, batch=3):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, 6, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (batch,), generator=generator)
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    return loss.detach()


def steps(model, optimizer, count=4, first=0):
    for seed in range(first, first + count):
        optimizer.zero_grad()
        backward(model, seed)
        optimizer.step()


def assert_same(dense, factored, tolerance=1e-12):
    torch.testing.assert_close(
        dict(factored.named_parameters()), dict(dense.named_parameters()), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize(("make", "options"), OPTIMISERS, ids=IDS)
@pytest.mark.parametrize("condition", ["constant", "learned", "per_layer", "per_target"])
def test_the_same_steps(make, options, condition):
    dense, factored = pair(make, options, condition=condition)
    steps(*dense)
    steps(*factored)
    assert factored[0].head.weight.grad is None and not factored[0].head.weight.requires_grad
    assert_same(dense[0], factored[0])


@pytest.mark.parametrize(("make", "options"), [SGD, ADAM, ADAMW], ids=["sgd", "adam", "adamw"])
def test_state_goes_both_ways(make, options):
    """A run that stored the gradient goes on without, and the other way round."""
    dense, factored = pair(make, options)
    for source, target in ((dense, factored), (factored, dense)):
        steps(*source)
        target[0].load_state_dict(source[0].state_dict())
        target[1].load_state_dict(copy.deepcopy(source[1].state_dict()))
        steps(*source, first=4)
        steps(*target, first=4)
        assert_same(source[0], target[0])


def test_accumulated_batches():
    dense, factored = pair(*SGD)
    for model, optimizer in (dense, factored):
        for seed in range(3):
            backward(model, seed)
        optimizer.step()
    assert_same(dense[0], factored[0])


@pytest.mark.parametrize("condition", ["constant", "per_layer"])
@pytest.mark.parametrize("max_norm", [1e-3, 1e3])
def test_norm_and_clipping_count_the_head(condition, max_norm):
    dense, factored = pair(*SGD, condition=condition)
    norms = []
    for model, optimizer in (dense, factored):
        backward(model, 0)
        norms.append([clip_grad_norm_(model, max_norm), total_grad_norm(model)])
        optimizer.step()
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-12, atol=0)
    assert norms[0][1] <= max_norm
    assert_same(dense[0], factored[0])


def test_learning_rate_schedules_and_groups():
    dense = network()
    factored = copy.deepcopy(dense)
    pairs = []
    for model in (dense, factored):
        optimizer = torch.optim.AdamW(model.parameter_groups(lr=1e-2, optimizer="adam", weight_decay=0.1))
        pairs.append((model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)))
    factor_head(factored, pairs[1][1])
    for model, optimizer, schedule in pairs:
        for seed in range(3):
            steps(model, optimizer, 1, seed)
            schedule.step()
    assert_same(dense, factored)


def test_a_gradient_scaler():
    """Unscaled by the scaler, or by a fused optimiser; a step that overflowed is left out."""
    dense, factored = pair(*NESTEROV)
    for model, optimizer in (dense, factored):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for seed, overflow in enumerate((False, True, False)):
            optimizer.zero_grad()
            x = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            scaler.scale(model(x).square().sum() * (float("inf") if overflow else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
    assert dense[0].head.weight.isfinite().all()
    assert_same(dense[0], factored[0], 1e-10)


def test_compiled_and_unused():
    torch.compiler.reset()
    dense, factored = pair(*SGD)
    factored[1].step()  # nothing has a gradient yet: nothing happens
    assert_same(dense[0], factored[0])
    compiled = torch.compile(factored[0], fullgraph=True, backend="aot_eager")
    steps(*dense)
    steps(compiled, factored[1])
    assert_same(dense[0], factored[0], 1e-10)


def test_copies_and_pickles_stay_factored():
    _, (model, _) = pair(*SGD)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.head_gradient_is_factored and not other.head.weight.requires_grad
        factor_head(other, torch.optim.SGD(other.parameters(), lr=0.1))


def test_a_given_condition_is_refused_in_training_only():
    _, (model, _) = pair(*SGD)
    x, gamma = torch.randn(2, 3, 6, 6, dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"takes its own 'constant' condition.*without hyperfast.optim.factor_head"):
        model(x, condition=gamma)
    with torch.no_grad():
        model(x, condition=gamma)


def test_a_closure_is_refused():
    _, (_, optimizer) = pair(*SGD)
    with pytest.raises(ValueError, match="before the closure would run; call step()"):
        optimizer.step(lambda: 0.0)


class Other(torch.optim.SGD):
    pass


@pytest.mark.parametrize(
    ("condition", "build", "message"),
    [
        ("stochastic", lambda m: torch.optim.SGD(m.parameters(), lr=1), "the condition is 'stochastic'; only where it"),
        ("external", lambda m: torch.optim.SGD(m.parameters(), lr=1), "the condition is 'external'"),
        ("constant", lambda m: Other(m.parameters(), lr=1), "the optimizer is Other; SGD, Adam and AdamW"),
        ("constant", lambda m: torch.optim.Adam(m.parameters(), amsgrad=True), "the optimizer has amsgrad"),
        ("constant", lambda m: torch.optim.SGD([m.theta0], lr=1), "no parameter group with head.weight"),
        ("constant", lambda m: torch.optim.SGD([m.head.weight], lr=1), "the optimizer does not have theta0"),
    ],
)
def test_what_cannot_be_factored(condition, build, message):
    model = network(condition=condition)
    optimizer = build(model)
    with pytest.raises(ValueError, match=f"cannot be updated from the factors of its gradient: .*{message}"):
        factor_head(model, optimizer)
    assert cannot_factor(model, optimizer) is not None
    assert model.head.weight.requires_grad and not model.head_gradient_is_factored


def test_a_frozen_theta0_cannot_be_factored():
    model = network()
    model.theta0.requires_grad_(False)
    with pytest.raises(ValueError, match="theta0 is frozen"):
        factor_head(model, torch.optim.SGD(model.parameters(), lr=1))
