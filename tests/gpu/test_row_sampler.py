"""Rows drawn on a GPU: no synchronisation, a new draw at each replay of a graph, resuming."""

import itertools

import pytest
import torch

from hyperfast.nn import RowSampler

METHODS = ("random_weighted", "uniform", "epoch", "layer", "random_layer")


def sampler(method="random_weighted"):
    norms = torch.arange(29_744.0, device="cuda") % 2
    return RowSampler(norms, 4096, method=method, layers=[432, 29_312])


@pytest.mark.parametrize("method", METHODS)
def test_no_draw_waits_for_the_device(method):
    draws = sampler(method)
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows = [draws() for _ in range(10)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(r.is_cuda and r.dtype == torch.int64 for r in rows)


@pytest.mark.parametrize("kind", ["uniform", "magnitude"])
def test_every_replay_of_a_graph_draws_anew(kind):
    draws = sampler()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        draws.draw(kind)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(draws.device_generator)
    with torch.cuda.graph(graph):
        rows = draws.draw(kind)
    found = []
    for _ in range(20):
        graph.replay()
        found.append(rows.clone())
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(found))
    if kind == "uniform":
        assert all(len(r.unique()) == 4096 for r in found)
    else:
        assert all((r % 2 == 1).all() and len(r.unique()) < 4096 for r in found)


@pytest.mark.parametrize("method", METHODS)
def test_resumes_bit_for_bit(method):
    draws, other = sampler(method), sampler(method)
    for _ in range(3):
        draws()
    other.load_state_dict(draws.state_dict())
    assert all(torch.equal(draws(), other()) for _ in range(9))
