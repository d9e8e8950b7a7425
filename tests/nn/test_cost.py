"""The cost report counts every part and leaves the hypernetwork as it was."""

import torch
from torch import nn

from hyperfast.nn import hypernetize

from .networks import images, small_net


def test_counts_and_bytes():
    student = hypernetize(small_net(), condition="learned", condition_size=2)
    student.primary[1].bias.requires_grad_(False)
    rows = {row.part: row for row in student.cost_report().rows}
    trunk = 4 * 16 + 16 + 16 * 64 + 64 + 64 * 128 + 128
    expected = {"condition": 2, "trunk": trunk, "head": 137 * 128, "theta0": 137, "primary (kept)": 8}
    assert {part: rows[part].parameters for part in expected} == expected
    assert rows["total"].parameters == sum(expected.values()) == sum(p.numel() for p in student.parameters())
    assert rows["generated weights"].parameters == 137
    assert rows["head"].bytes == rows["head"].gradient_bytes == rows["head"].momentum_bytes == 137 * 128 * 4
    assert rows["head"].adam_bytes == 2 * 137 * 128 * 4
    assert (rows["primary (kept)"].bytes, rows["primary (kept)"].adam_bytes) == (32, 32)  # the bias is frozen


def test_times_and_no_trace_of_them():
    x = images()
    for condition in ("constant", "external", "stochastic", "per_layer"):
        student = hypernetize(nn.Sequential(small_net(), nn.Dropout(0.5)), condition=condition, condition_size=2)
        random = torch.get_rng_state()
        before = {name: value.clone() for name, value in student.state_dict().items()}
        report = student.cost_report(x, repeats=2)
        assert list(report.milliseconds) == ["generate", "primary forward", "whole step"]
        assert all(value > 0 for value in report.milliseconds.values())
        assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
        assert torch.equal(random, torch.get_rng_state())
        assert all(parameter.grad is None for parameter in student.parameters())


def test_prints_an_aligned_table():
    text = str(hypernetize(small_net()).cost_report(images(), repeats=1))
    table, times = text.split("\n\n")
    assert len({len(line) for line in table.splitlines()}) == 1
    assert "137" in table and "68.5 KiB" in table
    assert times.count(" ms") == 3
    assert "\n\n" not in str(hypernetize(small_net()).cost_report())
