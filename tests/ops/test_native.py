"""The native module itself: its pool of host memory, its instruction sets, its independence of the thread count."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from helpers import on_threads

from hyperfast import functional
from hyperfast.ops import _native

pytestmark = pytest.mark.skipif(_native.missing() is not None, reason="the native module was not built")

MEGABYTES = 1 << 20


@pytest.fixture
def pool():
    _native.module().release_idle_host_blocks()
    yield _native.module()
    _native.module().release_idle_host_blocks()


def test_a_large_block_is_used_again(pool):
    first = _native.empty((8 * MEGABYTES,), torch.empty(0))
    address = first.data_ptr()
    assert address % 64 == 0
    del first
    assert pool.idle_host_bytes() == 32 * MEGABYTES
    again = _native.empty((4, 2 * MEGABYTES), torch.empty(0))
    assert again.data_ptr() == address
    assert pool.idle_host_bytes() == 0


def test_a_view_keeps_its_block(pool):
    view = _native.empty((8 * MEGABYTES,), torch.empty(0))[5:9]
    other = _native.empty((8 * MEGABYTES,), torch.empty(0))
    view.fill_(3)
    other.fill_(4)
    assert view.tolist() == [3, 3, 3, 3]


def test_blocks_of_a_step_that_are_not_live_together_are_all_kept(pool):
    addresses = []
    for _ in range(3):
        for size in (32, 16, 8):
            held = _native.empty((size * MEGABYTES,), torch.empty(0))
            addresses.append(held.data_ptr())
            del held
    assert addresses[:3] == addresses[3:6] == addresses[6:]


def test_idle_and_live_blocks_never_exceed_twice_what_was_live_at_once(pool):
    held = _native.empty((16 * MEGABYTES,), torch.empty(0))
    for size in range(8, 15):
        del held
        held = _native.empty((size * MEGABYTES,), torch.empty(0))
        assert pool.idle_host_bytes() + held.numel() * 4 <= 2 * 64 * MEGABYTES
    del held
    assert pool.release_idle_host_blocks() > 0
    assert pool.idle_host_bytes() == 0


def test_small_tensors_stay_out_of_the_pool(pool):
    tensor = _native.empty((1000,), torch.empty(0))
    del tensor
    assert pool.idle_host_bytes() == 0


def test_uninitialised_memory_is_poisoned_in_tests():
    assert _native.empty((8 * MEGABYTES,), torch.empty(0)).isnan().all()


def test_empty_like_keeps_the_strides_of_a_dense_tensor():
    features = torch.empty(128, 64, 32, 32).contiguous(memory_format=torch.channels_last)
    assert _native.empty_like(features).stride() == features.stride()


_COMPARE = """
import torch, hyperfast
from hyperfast import functional
from hyperfast.ops import _native
assert _native.module().instruction_set() == {wanted!r}, _native.module().instruction_set()
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    student = [torch.randn(3, 9, 7, 5).to(dtype).requires_grad_(), torch.randn(3, 8, 4, 8).to(dtype).requires_grad_()]
    student[1] = student[1].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    teacher = [torch.randn(3, 4, 7, 5).to(dtype), torch.randn(3, 33, 4, 8).to(dtype)]
    found = []
    for backend in ("cpu", "reference"):
        with hyperfast.use_backend(backend):
            losses = functional.attention_transfer(student, teacher, p=3)
            found.append([losses.detach(), *torch.autograd.grad(losses.sum() * 1000, student)])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=2e-5 if dtype == torch.float32 else 2e-2, atol=1e-5)
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    student, teacher = (torch.randn(6, 77).mul(4).to(dtype) for _ in range(2))
    labels = torch.tensor([0, 76, 3, -100, 64, 5])
    for mode in ("kl", "stable", "multi_stable"):
        found = []
        for backend in ("cpu", "reference"):
            leaf = student.clone().requires_grad_()
            with hyperfast.use_backend(backend):
                losses = functional.cross_entropy_distillation(leaf, teacher, labels, mode=mode)
                found.append([losses.detach(), *torch.autograd.grad(losses.sum() * 1000, leaf)])
        for a, b in zip(*found):
            torch.testing.assert_close(a, b, rtol=1e-5 if dtype.itemsize > 2 else 2e-2, atol=1e-4)
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    student, teacher, sub_logits = (torch.randn(6, *more, 77).mul(4).to(dtype) for more in ((), (), (2, 3)))
    labels = torch.tensor([0, 76, 3, 9, 64, 5])
    for options in ({{}}, {{"temperature": 3.0, "orthogonality": "sub", "theta": 0.0}}):
        found = []
        for backend in ("cpu", "reference"):
            leaves = [student.clone().requires_grad_(), sub_logits.clone().requires_grad_()]
            with hyperfast.use_backend(backend):
                losses = functional.sub_logit_distillation(leaves[0], teacher, leaves[1], labels, **options)
                found.append([losses.components, *torch.autograd.grad(losses.total, leaves)])
        for a, b in zip(*found):
            torch.testing.assert_close(a, b, rtol=1e-4 if dtype.itemsize > 2 else 2e-2, atol=1e-4)
weights = [torch.randn(5, 4, requires_grad=True), torch.randn(19, 5, requires_grad=True)]
biases = [torch.randn(5, requires_grad=True), torch.randn(19, requires_grad=True)]
head, theta0 = torch.randn(1001, 19, requires_grad=True), torch.randn(1001, requires_grad=True)
condition = torch.rand(3, 2, requires_grad=True)
found = []
for backend in ("cpu", "reference"):
    with hyperfast.use_backend(backend):
        theta = functional.generate(condition, weights, biases, head, theta0)
        leaves = [condition, *weights, *biases, head, theta0]
        found.append([theta.detach(), *torch.autograd.grad(theta.square().sum(), leaves)])
for a, b in zip(*found):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    found = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(0)
        moved = [torch.randn(9, 37).to(dtype), torch.randn(2100).to(dtype)]
        wide = torch.promote_types(dtype, torch.float32)
        state = [[torch.zeros_like(p, dtype=wide) for p in moved] for _ in range(2)] + [[p.to(wide) for p in moved]]
        steps = [torch.zeros(()) for _ in moved]
        with hyperfast.use_backend(backend):
            for _ in range(7):
                functional.ranger_update(moved, [torch.randn_like(p) for p in moved], *state, steps, lr=0.1)
        found.append(moved)
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=4 * torch.finfo(dtype).eps, atol=1e-5)
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    torch.manual_seed(1)
    students = [torch.randn(s).to(dtype).requires_grad_() for s in ((19, 5, 7, 9), (19, 23, 7, 9), (19, 4, 3, 3))]
    teachers = [torch.randn(s).to(dtype) for s in ((19, 5, 7, 9), (19, 23, 7, 9), (19, 4, 3, 3))]
    for function in (
        functional.similarity_preserving, functional.relational_distance_angle, functional.flow_of_solution
    ):
        found = []
        for backend in ("cpu", "reference"):
            with hyperfast.use_backend(backend):
                losses = function(students, teachers)
                found.append([losses.detach(), *torch.autograd.grad(1000 * losses.sum(), students)])
        for a, b in zip(*found):
            allowed = (4 if dtype.itemsize == 2 else 100) * torch.finfo(dtype).eps
            assert (a.double() - b.double()).norm() <= allowed * b.double().norm(), (function, dtype)
embeddings = [functional.positional_embedding(n, 0.76, 3) for n in (3, 200)]
indices = torch.stack((torch.randint(3, (120,)), torch.randint(200, (120,))), 1)
weights = [torch.randn(o, i).div(i**0.5).requires_grad_() for o, i in ((37, 12), (37, 37), (37, 37), (9, 37))]
biases = [torch.randn(w.shape[0], requires_grad=True) for w in weights]
targets = torch.randn(120, 9)
for dtype, precision in ((torch.float32, "fp32"), (torch.float32, "bf16"), (torch.float64, "fp32")):
    layers = [[p.detach().to(dtype).requires_grad_() for p in group] for group in (weights, biases)]
    tables, found = [e.to(dtype) for e in embeddings], []
    for backend in ("cpu", "reference"):
        with hyperfast.use_backend(backend):
            error = torch.ops.hyperfast.predict_squared_error(
                tables, indices, *layers, targets.to(dtype), None, None, "concat", "relu", precision, True)
            found.append([functional.predict(tables, indices, *layers, precision=precision).detach(), *error])
    for a, b in zip(*found):
        assert (a - b).norm() <= (5e-3 if precision == "bf16" else 1e-5) * b.norm(), (dtype, precision)
"""


@pytest.mark.parametrize("wanted", ["baseline", "avx2", "avx512", "avx512bf16"])
def test_every_instruction_set_computes_the_same(wanted):
    order = ["baseline", "avx2", "avx512", "avx512bf16"]
    widest = _native.module().instruction_set()
    if order.index(wanted) > order.index(widest):
        pytest.skip(f"the processor has no more than {widest}")
    environment = {**os.environ, "HYPERFAST_INSTRUCTION_SET": wanted, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _COMPARE.format(wanted=wanted)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_results_do_not_depend_on_the_number_of_threads():
    head, theta0 = torch.randn(30_011, 24), torch.randn(30_011)
    arguments = (torch.rand(1, 1, 12), [], [], head)
    grad = torch.randn(1, 30_011)
    options = (None, "cos|sin", "leaky_relu", 0.01)
    results = []
    for threads in (1, 2, 3):
        with on_threads(threads):
            theta = torch.ops.hyperfast.generate(*arguments, theta0, *options)
            results.append([theta, *torch.ops.hyperfast.generate_backward(grad, *arguments, *options, True)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    "loss",
    [functional.similarity_preserving, functional.relational_distance_angle, functional.flow_of_solution],
    ids=lambda loss: loss.__name__,
)
def test_gram_losses_do_not_depend_on_the_number_of_threads(loss):
    shapes = (33, 20, 30, 31), (33, 17, 30, 31)
    students, teachers = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    students = [s.requires_grad_() for s in students]
    results = []
    for threads in (1, 2, 3):
        with on_threads(threads):
            losses = loss(students, teachers)
            results.append([losses.detach(), *torch.autograd.grad(losses.sum(), students)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
