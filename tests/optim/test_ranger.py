"""The optimiser Ranger: NeRN's own numbers, and everything that torch expects of an optimiser."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hyperfast.backends import use_backend
from hyperfast.ops import _native
from hyperfast.optim import Ranger

SIZES = (216, 432, 48)


def golden() -> dict[str, torch.Tensor]:
    """Group B of values computed with NeRN's own code; see tests/golden/nern.README.md."""
    with np.load(Path(__file__).parents[1] / "golden" / "nern.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files if name[0] == "B" or name == "A_freqs"}


def positions() -> torch.Tensor:
    """Coordinates (layer, filter, channel) of all kernels of the toy network, layer by layer."""
    shapes = [(8, 3), (6, 8), (8, 6)]
    return torch.tensor([(layer, f, c) for layer, (F, C) in enumerate(shapes) for f in range(F) for c in range(C)])


def predictor(values: dict[str, torch.Tensor]) -> nn.Sequential:
    layers = [values[f"B_init.layers.{i}.weight"] for i in range(4)] + [values["B_init.final_linear_layer.weight"]]
    modules: list[nn.Module] = []
    for weight in layers:
        modules += [nn.Linear(weight.shape[1], weight.shape[0]), nn.ReLU()]
    model = nn.Sequential(*modules[:-1])
    model.load_state_dict({ours: values[f"B_init.{theirs}"] for ours, theirs in names().items()})
    return model


def names() -> dict[str, str]:
    """Parameters of `predictor` and what NeRN calls them."""
    linear = [*(f"layers.{i}" for i in range(4)), "final_linear_layer"]
    return {f"{2 * i}.{kind}": f"{name}.{kind}" for i, name in enumerate(linear) for kind in ("weight", "bias")}


def reconstruction_loss(model: nn.Module, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """Root of the mean squared error; of the last layer's kernels the centre counts alone."""
    angles = (positions()[:, :, None] * values["A_freqs"]) * torch.pi
    embedding = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
    first, second, third = model(embedding).split([24, 48, 48])
    squares = [
        (first - values["B_target0"].reshape(24, 9)).square().sum(),
        (second - values["B_target1"].reshape(48, 9)).square().sum(),
        (third[:, 4] - values["B_target2"].flatten()).square().sum(),
    ]
    return (torch.stack(squares).sum() / sum(SIZES)).sqrt()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, scheduler: object = None) -> None:
    """A few steps on a loss that needs no data."""
    for _ in range(steps):
        optimizer.zero_grad()
        inputs = torch.linspace(-1, 1, 15).view(5, 3).to(next(model.parameters()))
        model(inputs).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()  # type: ignore[attr-defined]


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, 4)).to(dtype)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    if request.param == "cpu" and (reason := _native.missing()):
        pytest.skip(reason)
    with use_backend(request.param):
        yield request.param


# Values


def test_golden(backend):
    """NeRN's own parameters after 1, 6 and 12 steps, and the loss before each."""
    values = golden()
    model = predictor(values)
    optimizer = Ranger(model.parameters())
    losses = []
    for step in range(1, 13):
        optimizer.zero_grad()
        loss = reconstruction_loss(model, values)
        losses.append(loss.detach())
        loss.backward()
        if step == 1:
            for ours, theirs in names().items():
                gradient = model.get_parameter(ours).grad
                torch.testing.assert_close(gradient, values[f"B_grad_step1.{theirs}"], rtol=0, atol=1e-6)
        optimizer.step()
        if step in (1, 6, 12):
            for ours, theirs in names().items():
                expected = values[f"B_after{step}.{theirs}"]
                torch.testing.assert_close(model.get_parameter(ours).detach(), expected, rtol=0, atol=1e-6)
    expected_losses = values["B_loss_before_each_step"].to(torch.float32)
    torch.testing.assert_close(torch.stack(losses), expected_losses, rtol=1e-6, atol=0)


def test_without_centralisation_the_numbers_are_others():
    values = golden()
    model = predictor(values)
    optimizer = Ranger(model.parameters(), centralize=False)
    reconstruction_loss(model, values).backward()
    optimizer.step()
    difference = model[0].weight.detach() - values["B_after1.layers.0.weight"]
    assert difference.abs().max() > 1e-5


def test_the_scale_of_the_loss_sets_the_step():
    """The docstring's warning: with tiny gradients eps rules, and ten times the loss goes almost ten times as far."""
    moved = []
    for scale in (1.0, 10.0):
        p = nn.Parameter(torch.zeros(100))
        optimizer = Ranger([p], weight_decay=0.0)
        for _ in range(11):
            p.grad = torch.full((100,), scale * 1e-6)
            optimizer.step()
        moved.append(float(p.detach().abs().mean()))
    assert 8 < moved[1] / moved[0] < 10


# What torch expects of an optimiser


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("capturable", [False, True])
def test_resumes_bit_for_bit(backend, dtype, capturable):
    whole = network(dtype)
    optimizer = Ranger(whole.parameters(), capturable=capturable)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    train(whole, optimizer, 16, scheduler)

    stopped = network(dtype)
    first = Ranger(stopped.parameters(), capturable=capturable)
    first_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(first, 20)
    train(stopped, first, 8, first_scheduler)
    file = io.BytesIO()
    torch.save([stopped.state_dict(), first.state_dict(), first_scheduler.state_dict()], file)
    resumed = network(dtype)
    second = Ranger(resumed.parameters(), capturable=capturable)
    second_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(second, 20)
    file.seek(0)
    for target, saved in zip((resumed, second, second_scheduler), torch.load(file), strict=True):
        target.load_state_dict(saved)
    train(resumed, second, 8, second_scheduler)
    assert same(resumed, whole)


def test_a_loaded_state_is_a_copy():
    a, b = network(), network()
    first, second = Ranger(a.parameters()), Ranger(b.parameters())
    train(a, first, 7)
    b.load_state_dict(a.state_dict())
    second.load_state_dict(first.state_dict())
    train(a, first, 3)
    train(b, second, 3)
    assert same(a, b)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_deepcopy_and_pickle(duplicate):
    model = network()
    optimizer = Ranger(model.parameters())
    train(model, optimizer, 7)
    other, other_optimizer = duplicate((model, optimizer))
    train(model, optimizer, 7)
    assert not same(model, other)
    train(other, other_optimizer, 7)
    assert same(model, other)


def test_capturable_changes_no_result():
    """The learning rate is a tensor, which schedulers write to in place."""
    a, b = network(), network()
    plain, capturable = Ranger(a.parameters()), Ranger(b.parameters(), capturable=True)
    rate = capturable.param_groups[0]["lr"]
    for model, optimizer in ((a, plain), (b, capturable)):
        train(model, optimizer, 14, torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5))
    assert same(a, b)
    assert capturable.param_groups[0]["lr"] is rate
    assert float(rate) == plain.param_groups[0]["lr"]


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("compiler", ["aot_eager", "eager"])
def test_compiled_step(backend, compiler, capturable):
    torch.compiler.reset()
    a, b = network(), network()
    ordinary, compiled = Ranger(a.parameters()), Ranger(b.parameters(), capturable=capturable)
    step = torch.compile(compiled.step, backend=compiler, fullgraph=True)
    train(a, ordinary, 8)
    for _ in range(8):
        compiled.zero_grad()
        b(torch.linspace(-1, 1, 15).view(5, 3)).square().mean().backward()
        step()
    assert same(a, b)


def test_groups_have_their_own_options():
    p, q = (nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizer = Ranger([{"params": [p], "lr": 0.0, "alpha": 1.0}])
    optimizer.add_param_group({"params": [q], "weight_decay": 0.5, "lr": 0.1})
    for _ in range(7):
        p.grad, q.grad = torch.zeros(4), torch.zeros(4)
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(4))
    after_six = 1 + 0.5 * (0.95**6 - 1)
    torch.testing.assert_close(q.detach(), torch.full((4,), 0.95 * after_six))


def test_parameters_without_gradient_are_left_out():
    p, q = (nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizer = Ranger([p, q])
    p.grad = torch.ones(4)
    optimizer.step()
    assert torch.equal(q.detach(), torch.ones(4))
    assert optimizer.state[p]["step"] == 1
    assert not optimizer.state[q]
    Ranger([nn.Parameter(torch.ones(1))]).step()


def test_one_group_of_several_dtypes():
    kinds = (torch.float32, torch.float64, torch.bfloat16)
    together = [nn.Parameter(torch.full((4, 3), 0.7, dtype=kind)) for kind in kinds]
    alone = copy.deepcopy(together)
    optimizers = [Ranger(together), *(Ranger([p]) for p in alone)]
    for step in range(8):
        for p in (*together, *alone):
            p.grad = torch.linspace(-1, 1 + step, 12, dtype=torch.float64).view(4, 3).to(p.dtype)
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    assert optimizers[0].state[together[2]]["exp_avg_sq"].dtype == torch.float32


def test_memory_layout_is_kept(backend):
    def run(lay):
        p = nn.Parameter(lay(torch.arange(120.0).view(2, 3, 4, 5)))
        optimizer = Ranger([p])
        for step in range(8):
            p.grad = torch.sin(torch.arange(120.0) + step).view(2, 3, 4, 5)
            optimizer.step()
        return p.detach(), [optimizer.state[p][name].stride() for name in ("exp_avg", "exp_avg_sq", "slow")]

    plain, _ = run(lambda x: x)
    laid, strides = run(lambda x: x.contiguous(memory_format=torch.channels_last))
    assert laid.is_contiguous(memory_format=torch.channels_last)
    assert set(strides) == {laid.stride()}
    torch.testing.assert_close(laid, plain, rtol=1e-5, atol=1e-6)


def test_closure():
    p = nn.Parameter(torch.ones(3))
    optimizer = Ranger([p])

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3
    assert (p < 1).all()


def test_a_learning_rate_of_zero_is_allowed_and_moves_nothing():
    model = network()
    before = weights(model)
    train(model, Ranger(model.parameters(), lr=0.0), 7)
    assert all(torch.equal(p.detach(), old) for p, old in zip(model.parameters(), before, strict=True))


def test_steps_warn_of_nothing():
    model = network()
    optimizer = Ranger(model.parameters(), capturable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 2)


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0; expected a number of at least 0"),
        ({"lr": torch.tensor(-1.0)}, "lr is -1.0"),
        ({"betas": (0.5, 1.5)}, r"betas is \(0.5, 1.5\)"),
        ({"k": 0}, "k is 0; expected at least 1 step"),
        ({"alpha": 2.0}, "alpha is 2.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Ranger([nn.Parameter(torch.ones(2))], **options)


def test_a_bad_group_is_not_added():
    optimizer = Ranger([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="eps is -1"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "eps": -1})
    assert len(optimizer.param_groups) == 1


def test_sparse_gradients_are_an_error():
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"torch.sparse_coo gradient of a parameter \[5, 3\].*sparse=False"):
        Ranger(table.parameters()).step()


def test_a_state_of_another_network_is_an_error():
    a, b = nn.Linear(3, 4), nn.Linear(3, 5)
    first, second = Ranger(a.parameters()), Ranger(b.parameters())
    train(a, first, 1)
    second.load_state_dict(first.state_dict())
    b(torch.ones(1, 3)).sum().backward()
    with pytest.raises(ValueError, match=r"parameter 0 is torch.float32 \[5, 3\]"):
        second.step()
