"""McNemar's exact test."""

from __future__ import annotations

import math

import pytest
import torch

from hyperfast.analysis import mcnemar


def _answers(both: int, only_first: int, only_second: int, none: int) -> tuple[torch.Tensor, torch.Tensor]:
    first = [True] * (both + only_first) + [False] * (only_second + none)
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * none
    return torch.tensor(first), torch.tensor(second)


@pytest.mark.parametrize(
    ("b", "c", "p"),
    [
        (0, 0, 1.0),
        (3, 3, 1.0),
        (0, 5, 2 / 32),
        (5, 0, 2 / 32),
        (2, 8, 2 * (1 + 10 + 45) / 1024),
        (1, 9, 2 * 11 / 1024),
    ],
)
def test_by_hand(b: int, c: int, p: float) -> None:
    assert mcnemar(*_answers(20, b, c, 4)) == (b, c, p)


def test_thousands_of_images() -> None:
    b, c = 2600, 2400

    def log_term(i: int) -> float:
        n = b + c
        return math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2)

    expected = 2 * math.fsum(math.exp(log_term(i)) for i in range(c + 1))
    assert mcnemar(*_answers(0, b, c, 0)).p_value == pytest.approx(expected, rel=1e-9)
    assert 0 <= mcnemar(*_answers(0, 5000, 1, 0)).p_value < 1e-300


def test_messages() -> None:
    right = torch.tensor([True, False])
    with pytest.raises(ValueError, match=r"correct_second is torch.float32 \[2\]; expected torch.bool \[N\]"):
        mcnemar(right, torch.zeros(2))
    with pytest.raises(ValueError, match="there are 2 and 1 answers; ask about the same images"):
        mcnemar(right, right[:1])
