"""Ranger on a GPU: against float64 on the CPU, one launch, CUDA graphs with a schedule, repeatability."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import hyperfast
from hyperfast.optim import Ranger

SHAPES = [(), (7,), (5001,), (1,), (9, 140), (140, 240), (3, 301), (2, 5000), (4, 3, 3, 3), (0, 3)]


def _trained(device: str, dtype: torch.dtype, backend: str, steps: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    narrow = torch.float32 if dtype == torch.float64 else dtype  # what a float64 run begins with can be had in float32
    parameters = [nn.Parameter(torch.randn(s, generator=generator).to(narrow).to(device, dtype)) for s in SHAPES]
    optimizer = Ranger(parameters)
    with hyperfast.use_backend(backend):
        for _ in range(steps):
            for p in parameters:
                p.grad = (1e-3 * torch.randn(p.shape, generator=generator)).to(narrow).to(device, dtype)
            optimizer.step()
    return [p.detach().cpu().double() for p in parameters]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranger_update_agrees_with_float64(dtype: torch.dtype) -> None:
    expected = _trained("cpu", torch.float64, "reference")
    found = _trained("cuda", dtype, "cuda")
    bound = 1e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ranger_update_in_half_precision_agrees_with_the_reference(dtype: torch.dtype) -> None:
    expected, found = _trained("cpu", dtype, "reference"), _trained("cuda", dtype, "cuda")
    unit = torch.finfo(dtype).eps  # a rounding may fall the other way
    torch.testing.assert_close(found, expected, rtol=2 * unit, atol=1e-5)


def test_ranger_update_repeats_bit_for_bit() -> None:
    first, second = (_trained("cuda", torch.float32, "cuda") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_ranger_update_is_one_launch() -> None:
    parameters = [nn.Parameter(torch.randn(s, device="cuda")) for s in SHAPES]
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer = Ranger(parameters, capturable=True)
    optimizer.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    events = [e.name for e in profile.events() if e.device_type.name == "CUDA" and not e.name.startswith("Mem")]
    assert len(events) == 1, events


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 9)).cuda()


def test_ranger_update_in_a_cuda_graph_follows_the_schedule() -> None:
    x = torch.randn(16, 6, device="cuda")
    eager, captured = _model(), _model()

    def step(model: nn.Module, optimizer: Ranger) -> None:
        optimizer.zero_grad(set_to_none=False)
        model(x).square().mean().backward()
        optimizer.step()

    plain, capturable = Ranger(eager.parameters()), Ranger(captured.parameters(), capturable=True)
    schedules = [torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5) for optimizer in (plain, capturable)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(captured, capturable)
    torch.cuda.current_stream().wait_stream(stream)
    schedules[1].step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(captured, capturable)
    for _ in range(13):
        graph.replay()
        schedules[1].step()
    for _ in range(14):
        step(eager, plain)
        schedules[0].step()
    for a, b in zip(captured.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_capture_of_ranger_update_without_capturable_is_an_error() -> None:
    model = _model()
    optimizer = Ranger(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(RuntimeError, match="capturable=True"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


def test_ranger_update_resumes_from_a_checkpoint_on_the_cpu() -> None:
    model = _model()
    optimizer = Ranger(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    other = copy.deepcopy(model)
    resumed = Ranger(other.parameters())
    on_cpu = copy.deepcopy(optimizer.state_dict())
    on_cpu["state"] = {i: {k: v.cpu() for k, v in state.items()} for i, state in on_cpu["state"].items()}
    resumed.load_state_dict(on_cpu)
    for p in other.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
