"""Timing: in turns, over sets of inputs, as quantiles."""

from __future__ import annotations

import gc

import timing
import torch

CPU = torch.device("cpu")


def test_quantiles() -> None:
    assert timing.Quantiles.of([1, 2, 3, 4, 5, 100]) == timing.Quantiles(3.5, 2.0, 5.0, 6)


def test_providers_take_turns_and_sets_rotate() -> None:
    calls: list[str] = []

    def step(name: str):
        return lambda: calls.append(name)

    steps = {"a": [step("a0"), step("a1")], "b": [step("b0")]}
    found = timing.interleaved(steps, CPU, repeats=4, warmup=1)
    assert calls[:3] == ["a0", "a1", "b0"], "every set is warmed up"
    assert calls[3:] == ["a0", "b0", "b0", "a1", "a0", "b0", "b0", "a1"], "nobody is always first"
    assert found["a"].repeats == found["b"].repeats == 4
    assert found["a"].median >= 0


def test_a_time_limit_ends_the_rounds_after_three() -> None:
    found = timing.interleaved({"a": [lambda: None]}, CPU, repeats=1000, warmup=0, seconds=0)
    assert found["a"].repeats == 3


def test_garbage_is_not_collected_while_timing() -> None:
    seen: list[bool] = []
    timing.interleaved({"a": [lambda: seen.append(gc.isenabled())]}, CPU, repeats=1, warmup=1)
    assert seen == [True, False]
    assert gc.isenabled()


def test_a_processor_needs_one_set() -> None:
    assert timing.sets_needed(10, CPU) == 1


def test_profile_table_names_operators() -> None:
    assert "aten::mm" in timing.profile_table(lambda: torch.ones(4, 4) @ torch.ones(4, 4), CPU)
