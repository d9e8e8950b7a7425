"""The losses over pairs of maps on a GPU: against float64 on the CPU, launches, packed teachers, repeatability."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hyperfast
from hyperfast import functional

LOSSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "activation_boundary": (functional.activation_boundary, {"margin": 1.5}),
    "channel_wise_distillation": (functional.channel_wise_distillation, {}),
    "fitnets": (functional.fitnets, {}),
    "fitnets-teacher": (functional.fitnets, {"normalize": "teacher"}),
    "unit_distance": (functional.unit_distance, {}),
    "unit_distance-nern": (functional.unit_distance, {"p": 2, "eps": 1e-3, "added": True, "reduction": "batch"}),
}
SHAPES = [(4, 16, 32, 32), (3, 5, 7, 9), (3, 130, 2, 1), (2, 3, 33), (5, 1030, 2, 2), (2, 40, 65, 65)]


def _run(name: str, students: list[Tensor], teachers: list[Tensor]) -> list[Tensor]:
    """Losses, mismatches where there are some, and gradients."""
    function, options = LOSSES[name]
    found = function(students, teachers, **options)
    losses, *more = found if isinstance(found, tuple) else (found,)
    return [losses.detach(), *more, *torch.autograd.grad(losses.sum(), students)]


def _drawn(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return [(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)) for shape in SHAPES]


def _placed(
    maps: list[Tensor], device: str, dtype: torch.dtype, memory_format: torch.memory_format = torch.contiguous_format
) -> list[Tensor]:
    placed = [x.to(device, dtype) for x in maps]
    return [x.contiguous(memory_format=memory_format) if x.ndim == 4 else x for x in placed]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_paired_loss_agrees_with_float64(name: str, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    students, teachers = map(list, zip(*_drawn(dtype), strict=True))
    results = []
    for backend, device, kind in (("reference", "cpu", torch.float64), ("cuda", "cuda", dtype)):
        leaves = [s.detach().requires_grad_() for s in _placed(students, device, kind, memory_format)]
        with hyperfast.use_backend(backend):
            results.append(_run(name, leaves, _placed(teachers, device, kind, memory_format)))
    bound = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
    for expected, actual in zip(*results, strict=True):
        least = 2e-5 if actual.dtype == torch.float32 and actual.ndim == 1 else bound
        error = (actual.cpu().double() - expected).norm() / expected.norm()
        assert error < least


def test_packed_teachers() -> None:
    students, teachers = map(list, zip(*_drawn(torch.float32), strict=True))
    leaves = [s.requires_grad_() for s in _placed(students, "cuda", torch.float32)]
    teachers = _placed(teachers, "cuda", torch.float32)
    with hyperfast.use_backend("cuda"):
        expected = _run("activation_boundary", leaves, teachers)
        found = _run("activation_boundary", leaves, functional.pack_signs(teachers))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", LOSSES)
def test_paired_loss_repeats_bit_for_bit(name: str) -> None:
    students, teachers = map(list, zip(*_drawn(torch.float32), strict=True))
    leaves, teachers = (_placed(maps, "cuda", torch.float32) for maps in (students, teachers))
    leaves = [s.requires_grad_() for s in leaves]
    assert all(map(torch.equal, _run(name, leaves, teachers), _run(name, leaves, teachers)))


@pytest.mark.parametrize("name", LOSSES)
def test_paired_loss_is_one_launch_each_way(name: str) -> None:
    """Two in the forward pass where the teacher's variance comes first."""
    students, teachers = map(list, zip(*_drawn(torch.float32), strict=True))
    leaves, teachers = (_placed(maps, "cuda", torch.float32) for maps in (students, teachers))
    leaves = [s.requires_grad_() for s in leaves]
    _run(name, leaves, teachers)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        _run(name, leaves, teachers)
        torch.cuda.synchronize()
    ours = [event for event in profile.events() if "paired_kernel" in event.name]
    assert len(ours) == (3 if name == "fitnets-teacher" else 2), [event.name for event in ours]
