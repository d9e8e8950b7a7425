from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest
import torch
from helpers import on_threads
from torch import Tensor

import hyperfast
from hyperfast.functional import greedy_chain
from hyperfast.functional.greedy_chain import implementations
from hyperfast.ops import _native

DISPATCHER = implementations
needs_native = pytest.mark.skipif(_native.missing() is not None, reason="the native module was not built")


def naive(vectors: Tensor, distance: bool = False) -> list[int]:
    """One comparison at a time, in exact integers."""
    whole = [[int(x) for x in vector] for vector in vectors.tolist()]

    def similarity(a: list[int], b: list[int]) -> int:
        return -abs(a[0] - b[0]) if distance else sum(x * y for x, y in zip(a, b, strict=True))

    zeros = [] if distance else [i for i, v in enumerate(whole) if not any(v)]
    left = [i for i in range(len(whole)) if i not in zeros]
    chain: list[int] = []
    while left:
        best = left[0]
        for i in left[1:] if chain else []:
            if similarity(whole[i], whole[chain[-1]]) > similarity(whole[best], whole[chain[-1]]):
                best = i
        left.remove(best)
        chain.append(best)
    return chain + zeros


def units(*shape: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


@pytest.mark.parametrize(
    ("count", "dimension"), [(1, 9), (2, 9), (3, 1), (31, 4), (33, 9), (64, 2), (200, 9), (40, 90)]
)
def test_as_the_naive_chain_with_many_ties(backend, count, dimension):
    vectors = torch.randint(-2, 3, (count, dimension)).float()
    (order,) = greedy_chain([vectors])
    assert order.dtype == torch.int64
    assert order.tolist() == naive(vectors)


@pytest.mark.parametrize("count", [1, 2, 33, 150])
def test_distances_as_the_naive_chain(backend, count):
    values = torch.randint(-40, 40, (count, 1)).float()
    assert greedy_chain([values], similarity="distance")[0].tolist() == naive(values, distance=True)


def test_of_equals_the_first(backend):
    same = units(1, 9).expand(70, 9)
    assert greedy_chain([same])[0].tolist() == list(range(70))
    # 1 and 3 are as near to 0 as each other, then 3 is 1's duplicate.
    vectors = torch.tensor([[1.0, 0], [0.6, 0.8], [-1, 0], [0.6, 0.8], [0.6, -0.8]])
    assert greedy_chain([vectors])[0].tolist() == [0, 1, 3, 4, 2]
    assert greedy_chain([torch.tensor([[3.0], [1], [5], [5], [2]])], similarity="distance")[0].tolist() == [
        0,
        4,
        1,
        2,
        3,
    ]


def test_zeros_come_last_and_none_is_the_start(backend):
    vectors = torch.tensor([[0.0, 0], [1, 0], [0, 0], [-1, 0], [1, 1]])
    assert greedy_chain([vectors])[0].tolist() == [1, 4, 3, 0, 2]
    assert greedy_chain([torch.zeros(3, 2)])[0].tolist() == [0, 1, 2]
    assert greedy_chain([torch.tensor([[0.0], [2], [1]])], similarity="distance")[0].tolist() == [0, 2, 1]


def test_many_sets_of_several_chains(backend):
    sets = [units(3, 20, 9), units(50, 9), units(2, 1, 4), units(4, 5, 1), units(0, 7, 3), torch.empty(0, 9)]
    orders = greedy_chain(sets)
    assert [order.shape for order in orders] == [s.shape[:-1] for s in sets]
    for order, vectors in zip(orders[:4], sets[:4], strict=True):
        each = vectors if vectors.ndim == 3 else [vectors]
        alone = torch.cat([greedy_chain([chain])[0] for chain in each]).view(order.shape)
        assert torch.equal(order, alone)
    assert greedy_chain([]) == []


def test_scale_and_dtype_do_not_matter(backend):
    vectors = units(60, 9)
    expected = greedy_chain([vectors])[0]
    for same in (vectors.double(), vectors * 2.0**-100, vectors * 2.0**100, vectors[:, None].expand(-1, 2, -1)[:, 1]):
        assert torch.equal(greedy_chain([same])[0], expected)


@needs_native
@pytest.mark.parametrize("shape", [(900, 9), (4, 300, 9), (130, 700), (8000, 9)])
def test_native_code_and_pytorch_agree_to_the_last_tie(shape):
    vectors = units(*shape)
    with hyperfast.use_backend("reference"):
        (expected,) = greedy_chain([vectors])
    assert torch.equal(greedy_chain([vectors])[0], expected)


@needs_native
def test_the_order_does_not_depend_on_the_number_of_threads():
    # The first is long enough that all threads search it together, the others are shared out.
    sets = [units(9000, 9), units(2, 500, 9), units(7, 9)]
    found = []
    for threads in (1, 2, 3):
        with on_threads(threads):
            found.append(greedy_chain(sets))
    for orders in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], orders, strict=True))


_DIGEST = """
import hashlib, torch
from hyperfast.functional import greedy_chain
from hyperfast.ops import _native
torch.manual_seed(0)
sets = [torch.randn(n, d) for n, d in ((8000, 9), (500, 4), (40, 300))]
values = [torch.randn(3, 200, 1)]
orders = [*greedy_chain(sets), *greedy_chain(values, similarity="distance")]
print(_native.module().instruction_set(), hashlib.sha256(torch.cat([o.flatten() for o in orders]).numpy()).hexdigest())
"""


@needs_native
def test_every_instruction_set_finds_the_same_order():
    known = ["baseline", "avx2", "avx512", "avx512bf16"]
    known = known[: known.index(_native.module().instruction_set()) + 1]
    printed = []
    for wanted in known:
        environment = {**os.environ, "HYPERFAST_INSTRUCTION_SET": wanted}
        result = subprocess.run([sys.executable, "-c", _DIGEST], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        printed.append(result.stdout.split())
    assert [name for name, _ in printed] == known
    assert len({digest for _, digest in printed}) == 1
    assert len(printed[0][1]) == hashlib.sha256().digest_size * 2


@pytest.mark.parametrize(
    ("vectors", "similarity", "message"),
    [
        (torch.zeros(3), "product", r"vectors 0 are torch.float32 \[3\]; expected floats \[n, D\] or \[B, n, D\]"),
        (torch.zeros(3, 2, dtype=torch.int64), "product", r"vectors 0 are torch.int64 \[3, 2\]; expected floats"),
        (torch.zeros(3, 0), "product", r"vectors 0 are torch.float32 \[3, 0\]; expected floats"),
        (torch.zeros(3, 2), "distance", "vectors 0 have 2 dimensions; similarity='distance' compares numbers"),
        (torch.tensor([[1.0], [torch.nan]]), "product", "vectors 0 contain NaN or infinity"),
        (torch.tensor([[1.0], [torch.inf]]), "distance", "vectors 0 contain NaN or infinity"),
        (torch.zeros(3, 2), "cosine", "similarity is 'cosine'; choose one of 'product', 'distance'"),
    ],
)
def test_bad_input_is_named(vectors, similarity, message):
    with pytest.raises(ValueError, match=message):
        greedy_chain([vectors], similarity=similarity)
