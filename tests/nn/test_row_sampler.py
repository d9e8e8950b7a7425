"""Distributions by chi-square at fixed seeds, coverage of epochs and layers, resuming bit for bit, bad input."""

import math
from itertools import combinations

import pytest
import torch

from hyperfast.nn import RowSampler

NORMS = torch.tensor([0.0, 1.0, 1e-3, 5.0, 0.0, 2.0, 0.5, 3.0, 0.0])
ROWS = 1000


def sampler(method, norms=None, batch=300, **options):
    norms = torch.rand(ROWS) if norms is None else norms
    return RowSampler(norms, batch, method=method, generator=torch.Generator().manual_seed(7), **options)


def chi_square(counts, expected):
    return ((counts - expected).square() / expected).sum().item()


def plausible(statistic, freedom):
    """Between the quantiles 0.0005 and 0.9995 of chi-square (Wilson and Hilferty)."""
    low, high = (freedom * (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3 for z in (-3.29, 3.29))
    return low < statistic < high


def frequencies(draw, rows, steps):
    return sum(torch.bincount(draw(), minlength=rows) for _ in range(steps)).double()


def inclusion_statistic(counts, steps, batch):
    """Chi-square with N - 1 degrees of freedom, where each step takes `batch` of the N rows without replacement."""
    rows, share = len(counts), batch / len(counts)
    spread = steps * share * (1 - share)
    return (rows - 1) / rows * ((counts - steps * share).square() / spread).sum().item()


@pytest.mark.parametrize("batch", [1, 300, 999])
def test_uniform_takes_every_row_equally_often_and_none_twice(batch):
    draws = sampler("uniform", batch=batch)
    assert all(len(draws().unique()) == batch for _ in range(20))
    counts = frequencies(draws, ROWS, 2000)
    assert plausible(inclusion_statistic(counts, 2000, batch), ROWS - 1)


def test_uniform_takes_every_set_equally_often():
    draws = sampler("uniform", torch.ones(6), batch=3)
    sets = {rows: i for i, rows in enumerate(combinations(range(6), 3))}
    found = torch.tensor([sets[tuple(sorted(draws().tolist()))] for _ in range(10_000)])
    counts = torch.bincount(found, minlength=len(sets)).double()
    assert plausible(chi_square(counts, 10_000 / len(sets)), len(sets) - 1)


def test_the_statistic_sees_a_bias_of_five_percent():
    """What the two tests above could not tell apart from uniform is small."""
    weights = torch.ones(ROWS).double()
    weights[: ROWS // 2] = 1.05
    counts = sum(torch.bincount(torch.multinomial(weights, 300), minlength=ROWS) for _ in range(2000))
    assert not plausible(inclusion_statistic(counts.double(), 2000, 300), ROWS - 1)


def test_uniform_over_all_rows_is_a_permutation():
    assert sampler("uniform", batch=ROWS)().sort().values.tolist() == list(range(ROWS))


def test_magnitude_draws_in_proportion_to_the_norms():
    draws = sampler("random_weighted", NORMS, batch=9, uniform=0.0)
    counts = frequencies(draws, len(NORMS), 20_000)
    positive = NORMS > 0
    assert not counts[~positive].any()
    expected = counts.sum() * NORMS.double() / NORMS.double().sum()
    assert plausible(chi_square(counts[positive], expected[positive]), positive.sum().item() - 1)


def test_magnitude_over_many_rows():
    norms = torch.rand(ROWS) ** 4 + 1e-2
    counts = frequencies(sampler("random_weighted", norms, uniform=0.0), ROWS, 2000)
    expected = counts.sum() * norms.double() / norms.double().sum()
    assert plausible(chi_square(counts, expected), ROWS - 1)


def test_magnitude_draws_with_replacement():
    """The number of different rows is what independent draws give, on average."""
    norms = torch.rand(ROWS)
    draws = sampler("random_weighted", norms, uniform=0.0)
    different = torch.tensor([len(draws().unique()) for _ in range(400)]).double()
    share = norms.double() / norms.double().sum()
    expected = (1 - (1 - share) ** 300).sum()
    assert abs(different.mean() - expected) < 4 * different.std() / 20
    assert expected < 270


@pytest.mark.parametrize("place", [0.0, 1 - 2**-53])
def test_the_ends_of_the_range_are_rows_with_a_norm(place, monkeypatch):
    draws = sampler("random_weighted", NORMS, batch=1, uniform=0.0)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([place], dtype=torch.float64))
    assert draws.draw("magnitude").tolist() == [1 if place == 0 else 7]


def test_kinds_are_mixed_as_asked():
    draws = sampler("random_weighted", uniform=0.7)
    kinds = [draws.choose() for _ in range(5000)]
    assert set(kinds) == {"uniform", "magnitude"}
    assert abs(kinds.count("uniform") - 3500) < 3.3 * math.sqrt(5000 * 0.7 * 0.3)


def test_nern_mixes_four_uniform_batches_with_one_by_magnitude():
    draws = sampler("random_weighted", torch.tensor([0.0] * 500 + [1.0] * 500))
    without_norm = torch.tensor([(draws() < 500).any() for _ in range(2000)])
    assert abs(without_norm.sum() - 1600) < 3.3 * math.sqrt(2000 * 0.8 * 0.2)


@pytest.mark.parametrize(("uniform", "kind"), [(0, "magnitude"), (1, "uniform")])
def test_one_kind_alone(uniform, kind):
    draws = sampler("random_weighted", uniform=uniform)
    assert {draws.choose() for _ in range(100)} == {kind}


def test_rows_can_be_drawn_by_kind():
    draws = sampler("random_weighted", NORMS, batch=9)
    assert draws.draw("uniform").sort().values.tolist() == list(range(9))
    assert not (NORMS[draws.draw("magnitude")] == 0).any()


def test_an_epoch_has_every_row_once_and_the_next_one_another_order():
    draws = sampler("epoch")
    epochs = [torch.cat([draws() for _ in range(4)]) for _ in range(3)]
    for epoch in epochs:
        assert epoch.sort().values.tolist() == list(range(ROWS))
    assert not (epochs[0] == epochs[1]).all() and not (epochs[1] == epochs[2]).all()
    assert [len(draws()) for _ in range(8)] == [300, 300, 300, 100] * 2


def test_layers_in_turn():
    draws = sampler("layer", NORMS, layers=[4, 3, 2])
    expected = [[0, 1, 2, 3], [4, 5, 6], [7, 8]]
    assert [draws().tolist() for _ in range(6)] == expected * 2


def test_layers_at_random():
    draws = sampler("random_layer", NORMS, layers=[4, 3, 2])
    firsts = torch.tensor([draws().tolist()[0] for _ in range(3000)])
    counts = torch.bincount(firsts, minlength=9).double()
    assert counts.nonzero().flatten().tolist() == [0, 4, 7]
    assert plausible(chi_square(counts[[0, 4, 7]], 1000), 2)


def test_all_rows_are_none():
    assert sampler("all")() is None


@pytest.mark.parametrize("method", ["random_weighted", "all", "layer", "random_layer", "uniform", "epoch"])
@pytest.mark.parametrize("steps", range(6))
def test_resumes_bit_for_bit(method, steps, tmp_path):
    layers = [100, 300, 600]
    draws, other = (RowSampler(torch.ones(ROWS), 300, method=method, layers=layers) for _ in range(2))
    for _ in range(steps):
        draws()
    other()
    torch.save(draws.state_dict(), tmp_path / "state")
    expected = [draws() for _ in range(9)]
    other.load_state_dict(torch.load(tmp_path / "state"))
    again = RowSampler(torch.ones(ROWS), 300, method=method, layers=layers)
    again.load_state_dict(other.state_dict())
    for resumed in (other, again):
        for rows in expected:
            found = resumed()
            assert found is rows is None or torch.equal(found, rows)


def test_the_state_is_not_changed_by_later_draws():
    draws = sampler("epoch")
    draws()
    state = draws.state_dict()
    before = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in state.items()}
    for _ in range(5):
        draws()
    assert all((value == before[name]) is True or torch.equal(value, before[name]) for name, value in state.items())


def test_a_generator_or_the_global_seed_decides():
    first, second = (sampler("random_weighted", torch.ones(ROWS)) for _ in range(2))
    assert all(torch.equal(first(), second()) for _ in range(10))
    torch.manual_seed(3)
    first = RowSampler(torch.ones(ROWS), 300)
    torch.manual_seed(3)
    second, third = RowSampler(torch.ones(ROWS), 300), RowSampler(torch.ones(ROWS), 300)
    rows = first()
    assert torch.equal(rows, second()) and not torch.equal(rows, third())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "random"}, "method is 'random'; choose one of 'random_weighted', 'all', 'layer'"),
        ({"norms": torch.ones(3, 2)}, r"norms is torch.float32 \[3, 2\]; expected floats \[N\], one per kernel"),
        ({"norms": torch.ones(3, dtype=torch.int64)}, r"norms is torch.int64 \[3\]; expected floats \[N\]"),
        ({"norms": torch.ones(0)}, r"norms is torch.float32 \[0\]; expected floats \[N\]"),
        ({"norms": torch.tensor([1.0, math.nan])}, r"norms\[1\] is nan; expected finite numbers that are not negative"),
        ({"norms": torch.tensor([-1.0, 2.0])}, r"norms\[0\] is -1.0; expected finite numbers that are not negative"),
        ({"norms": torch.zeros(2)}, "norms are all 0, so that no row can be drawn by magnitude; use method='uniform'"),
        ({"uniform": 1.5}, "uniform is 1.5; expected a probability, 0 to 1"),
        ({"uniform": math.nan}, "uniform is nan; expected a probability, 0 to 1"),
        ({"batch": 0}, "batch is 0, but there are 2 rows; give 1 to 2, or use method='all'"),
        ({"batch": 3, "method": "epoch"}, "batch is 3, but there are 2 rows; give 1 to 2, or use method='all'"),
        ({"method": "layer"}, "layers is None; give the positive numbers of rows of every layer, 2 in all"),
        ({"method": "random_layer", "layers": [1, 2]}, r"layers is \[1, 2\]; give the positive numbers .*, 2 in all"),
        ({"method": "layer", "layers": [2, 0]}, r"layers is \[2, 0\]; give the positive numbers"),
    ],
)
def test_what_cannot_be_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        RowSampler(**{"norms": torch.ones(2), "batch": 1} | options)


def test_kinds_of_another_method():
    with pytest.raises(ValueError, match="kind is 'magnitude'; method 'uniform' draws 'uniform'"):
        sampler("uniform").draw("magnitude")
    with pytest.raises(ValueError, match="kind is 'epoch'; method 'random_weighted' draws 'uniform' or 'magnitude'"):
        sampler("random_weighted").draw("epoch")


@pytest.mark.parametrize(
    ("name", "own", "other"),
    [("method", "epoch", "uniform"), ("rows", 1000, 500), ("batch", 300, 200), ("device", "cpu", "cuda")],
)
def test_a_state_of_another_sampler(name, own, other):
    draws = sampler("epoch")
    with pytest.raises(ValueError, match=f"the state is of a sampler with {name} {other!r}; this one has {own!r}"):
        draws.load_state_dict(draws.state_dict() | {name: other})
