from __future__ import annotations

import math

import pytest
import torch

from hyperfast.recipes.schedules import TapWeights, cosine_with_warmup, steps_with_warmup


def test_cosine_starts_at_one_and_ends_near_zero() -> None:
    factors = [cosine_with_warmup(step, 100) for step in range(100)]
    assert factors[0] == 1
    assert factors[50] == pytest.approx(0.5)
    assert 0 < factors[-1] < 1e-3
    assert factors == sorted(factors, reverse=True)
    assert cosine_with_warmup(100, 100, final=0.1) == pytest.approx(0.1)


def test_warmup_rises_linearly_to_the_cosine() -> None:
    factors = [cosine_with_warmup(step, 20, warmup=4) for step in range(20)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[12] == pytest.approx((1 + math.cos(math.pi / 2)) / 2)
    assert [cosine_with_warmup(step, 3, warmup=3) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_steps_divide_by_ten() -> None:
    factors = [steps_with_warmup(step, 240, 3, (150 / 240, 0.75, 0.875)) for step in range(240)]
    assert factors[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert set(factors[3:150]) == {1.0}
    assert factors[150] == factors[179] == pytest.approx(0.1)
    assert factors[180] == factors[209] == pytest.approx(0.01)
    assert factors[210] == factors[239] == pytest.approx(0.001)


def test_uniform_tap_weights() -> None:
    assert TapWeights()(4, 0.7).tolist() == [0.25] * 4


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_travelling_tap_weights_follow_the_formula(progress: float) -> None:
    weights = TapWeights("travelling", sigma=0.8, minimum=0.2)(5, progress)
    raw = [0.2 + 0.8 * math.exp(-((tap - 4 * progress) ** 2) / (2 * 0.8**2)) for tap in range(5)]
    assert weights.tolist() == pytest.approx([value / sum(raw) for value in raw], rel=1e-5)
    assert weights.sum().item() == pytest.approx(1, rel=1e-6)


def test_the_gaussian_travels_from_the_first_tap_to_the_last() -> None:
    schedule = TapWeights("travelling")
    assert [int(schedule(5, t).argmax()) for t in (0.0, 0.25, 0.5, 0.75, 1.0)] == [0, 1, 2, 3, 4]
    assert torch.allclose(schedule(5, 0.0), schedule(5, 1.0).flip(0))
    assert schedule(1, 0.5).tolist() == [1.0]


def test_settings_that_cannot_be_are_named() -> None:
    with pytest.raises(ValueError, match="choose 'uniform' or 'travelling'"):
        TapWeights("dynamic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"sigma is 0\.0"):
        TapWeights("travelling", sigma=0.0)
    with pytest.raises(ValueError, match=r"minimum is 1\.5"):
        TapWeights("travelling", minimum=1.5)
