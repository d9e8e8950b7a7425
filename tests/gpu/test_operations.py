"""The operations on a GPU: every backend against float64 on the CPU, launches, graphs, repeatability, large heads."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import hyperfast
from hyperfast import functional

BACKENDS = ("cuda", "triton")
CASES = {
    "shared": {"batch": None, "rows": 1000, "hidden": (16, 64, 128)},
    "odd": {"batch": None, "rows": 77, "hidden": (5, 7)},
    "narrow": {"batch": None, "rows": 4097, "hidden": (16, 16, 16)},
    "no-trunk": {"batch": None, "rows": 100, "hidden": ()},
    "batch": {"batch": 5, "rows": 300, "hidden": (16, 32)},
    "segments": {"batch": None, "rows": 300, "hidden": (16, 64), "offsets": (0, 1, 17, 256, 300)},
    "batch-segments": {"batch": 3, "rows": 300, "hidden": (16, 64), "offsets": (0, 100, 300)},
}


def _generate_inputs(
    rows: int, hidden: tuple[int, ...], batch: int | None = None, offsets: tuple[int, ...] = ()
) -> dict[str, Any]:
    size, dtype = 3, torch.float64
    shape = [*([] if batch is None else [batch]), *([len(offsets) - 1] if offsets else []), size]
    widths = [2 * size, *hidden]
    pairs = list(itertools.pairwise(widths))
    return {
        "condition": torch.rand(shape, dtype=dtype),
        "trunk_weights": [torch.randn(o, i, dtype=dtype) / i**0.5 for i, o in pairs],
        "trunk_biases": [torch.randn(o, dtype=dtype) * 0.1 for _, o in pairs],
        "head_weight": torch.randn(rows, widths[-1], dtype=dtype) * 0.1,
        "theta0": torch.randn(rows, dtype=dtype),
        "offsets": torch.tensor(offsets) if offsets else None,
    }


def _to(value: Any, device: str, dtype: torch.dtype) -> Any:
    if isinstance(value, list):
        return [_to(x, device, dtype) for x in value]
    if not isinstance(value, Tensor):
        return value
    if not value.is_floating_point():
        return value.to(device)
    return value.detach().to(device, dtype).requires_grad_()


def _leaves(inputs: dict[str, Any]) -> list[Tensor]:
    return [
        inputs["condition"], *inputs["trunk_weights"], *inputs["trunk_biases"], inputs["head_weight"], inputs["theta0"]
    ]  # fmt: skip


def _run_generate(inputs: dict[str, Any], grad: Tensor, **options: Any) -> list[Tensor]:
    theta = functional.generate(**inputs, **options)
    theta.backward(grad.to(theta))
    return [theta.detach(), *(leaf.grad for leaf in _leaves(inputs))]


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return float((actual.cpu().double() - expected).norm() / expected.norm().clamp_min(1e-30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["leaky_relu", "gelu"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_generate_agrees_with_float64(backend: str, case: str, activation: str, dtype: torch.dtype) -> None:
    inputs = _to(_generate_inputs(**CASES[case]), "cpu", dtype)
    wide = _to(inputs, "cpu", torch.float64)
    shape = functional.generate(**wide).shape
    grad = torch.randn(shape).to(dtype)
    with hyperfast.use_backend("reference"):
        expected = _run_generate(wide, grad.double(), activation=activation)
    with hyperfast.use_backend(backend):
        actual = _run_generate(_to(inputs, "cuda", dtype), grad.cuda(), activation=activation)
    bound = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == dtype
        assert _relative_error(a, e) < bound, f"output {index}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_generate_is_one_launch_each_way(backend: str) -> None:
    inputs = _to(_generate_inputs(**CASES["shared"]), "cuda", torch.float32)
    grad = torch.randn(1, 1000, device="cuda")
    operation = torch.ops.hyperfast
    arguments = (
        inputs["condition"].detach()[None, None], [w.detach() for w in inputs["trunk_weights"]],
        [b.detach() for b in inputs["trunk_biases"]], inputs["head_weight"].detach(),
    )  # fmt: skip
    options = (None, "cos|sin", "leaky_relu", 0.01)
    with hyperfast.use_backend(backend):
        forward = _kernels(lambda: operation.generate(*arguments, inputs["theta0"].detach(), *options))
        backward = _kernels(lambda: operation.generate_backward(grad, *arguments, *options, True))
    assert len(forward) == 1, forward
    assert len(backward) == 1, backward


def _kernels(function: Any) -> list[str]:
    """Names of the kernels that `function` launches; memory operations are not kernels."""
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return [e.name for e in profile.events() if e.device_type.name == "CUDA" and not e.name.startswith("Mem")]


@pytest.mark.parametrize("backend", BACKENDS)
def test_generate_repeats_bit_for_bit(backend: str) -> None:
    inputs = _to(_generate_inputs(rows=100_003, hidden=(16, 64)), "cuda", torch.float32)
    grad = torch.randn(100_003, device="cuda")
    with hyperfast.use_backend(backend):
        first = [x.clone() for x in _run_generate(inputs, grad)]
        for leaf in _leaves(inputs):
            leaf.grad = None
        second = _run_generate(inputs, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_of_more_than_2_to_the_31_weights(backend: str) -> None:
    rows, hidden = 20_600_000, 128
    if torch.cuda.mem_get_info()[0] < 3 * rows * hidden * 2:
        pytest.skip("not enough GPU memory")
    head = torch.zeros(rows, hidden, device="cuda", dtype=torch.bfloat16)
    head[-1] = 1
    arguments = (
        torch.full((1, 1, 64), 0.5, device="cuda", dtype=torch.bfloat16), [], [], head,
        torch.zeros(rows, device="cuda", dtype=torch.bfloat16), None, "cos|sin", "relu", 0.0,
    )  # fmt: skip
    with hyperfast.use_backend(backend):
        theta = torch.ops.hyperfast.generate(*arguments)
    assert theta[0, 0] == 0
    assert abs(float(theta[0, -1]) - 128 * 0.5**0.5) < 1


MAPS = {
    "resnet": [(4, 16, 32, 32), (4, 32, 16, 16), (4, 64, 8, 8)],
    "odd": [(3, 5, 7, 9), (3, 130, 1, 1), (2, 3, 33)],
}


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("mode", ["code", "paper", "zoo"])
@pytest.mark.parametrize("maps", MAPS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_transfer_agrees_with_float64(
    backend: str, maps: str, mode: str, p: int, dtype: torch.dtype, memory_format: str
) -> None:
    def place(x: Tensor, device: str, dtype: torch.dtype) -> Tensor:
        x = x.to(device, dtype)
        if memory_format == "channels_last" and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        return x.detach().requires_grad_()

    drawn = [(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)) for shape in MAPS[maps]]
    results = []
    for name, device, kind in (("reference", "cpu", torch.float64), (backend, "cuda", dtype)):
        student = [place(s, device, kind) for s, _ in drawn]
        teacher = [place(t, device, kind).detach() for _, t in drawn]
        with hyperfast.use_backend(name):
            losses = functional.attention_transfer(student, teacher, p=p, mode=mode)
            losses.sum().backward()
        results.append([losses.detach(), *(s.grad for s in student)])
    bound = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
    expected, actual = results
    assert _relative_error(actual[0], expected[0]) < 2e-5
    for a, e in zip(actual[1:], expected[1:], strict=True):
        if e.abs().max() < 1e-12:  # one position: nothing to learn
            assert a.abs().max() < 1e-6
        else:
            assert _relative_error(a, e) < bound


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_transfer_is_one_launch_each_way(backend: str) -> None:
    student = [torch.randn(shape, device="cuda") for shape in MAPS["resnet"]]
    with hyperfast.use_backend(backend):
        forward = _kernels(lambda: torch.ops.hyperfast.attention_transfer(student, student, 2, "code", 1e-12, None))
        losses, coefficients, _ = torch.ops.hyperfast.attention_transfer(student, student, 2, "code", 1e-12, None)
        backward = _kernels(
            lambda: torch.ops.hyperfast.attention_transfer_backward(losses, student, coefficients, 2)
        )
    assert len(forward) == 1, forward
    assert len(backward) == 1, backward


GRAM_LOSSES = {
    "similarity_preserving": lambda s, t: functional.similarity_preserving(s, t),
    "relational_distance_angle": lambda s, t: functional.relational_distance_angle(s, t),
    "flow_of_solution": lambda s, t: functional.flow_of_solution(s, t),
}
GRAM_MAPS = {
    "resnet": [(64, 16, 32, 32), (64, 32, 16, 16), (64, 64, 8, 8)],
    "odd": [(37, 5, 7, 9), (37, 130, 7, 9), (37, 3, 5, 5)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("maps", GRAM_MAPS, ids=str)
@pytest.mark.parametrize("loss", GRAM_LOSSES, ids=str)
def test_gram_losses_agree_with_float64(loss: str, maps: str, dtype: torch.dtype) -> None:
    drawn = [(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)) for shape in GRAM_MAPS[maps]]
    results = []
    for name, device, kind in (("reference", "cpu", torch.float64), ("triton", "cuda", dtype)):
        student = [s.to(device, kind, copy=True).requires_grad_() for s, _ in drawn]
        teacher = [t.to(device, kind) for _, t in drawn]
        with hyperfast.use_backend(name):
            losses = GRAM_LOSSES[loss](student, teacher)
            (1024 * losses).sum().backward()
        results.append([losses.detach(), *(s.grad for s in student)])
    bound = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
    expected, actual = results
    # Random maps of many elements have nearly equal distances: what is compared is what is left of differences.
    assert _relative_error(actual[0], expected[0]) < (2e-3 if dtype != torch.float32 else 2e-4)
    for a, e in zip(actual[1:], expected[1:], strict=True):
        assert a.dtype == dtype
        assert _relative_error(a, e) < bound


@pytest.mark.parametrize("loss", GRAM_LOSSES, ids=str)
def test_gram_losses_repeat_bit_for_bit_and_are_zero_for_equal_networks(loss: str) -> None:
    drawn = [torch.randn(shape, device="cuda") for shape in GRAM_MAPS["odd"]]
    drawn[0][3] = drawn[0][5]
    for teacher in ([d.flip(0) for d in drawn], [d.clone() for d in drawn]):
        runs = []
        for _ in range(2):
            student = [d.clone().requires_grad_() for d in drawn]
            losses = GRAM_LOSSES[loss](student, teacher)
            losses.sum().backward()
            runs.append([losses.detach(), *(s.grad for s in student)])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert not any(x.any() for x in runs[0])


@pytest.mark.parametrize("loss", GRAM_LOSSES, ids=str)
def test_gram_losses_in_a_cuda_graph(loss: str) -> None:
    student = [torch.randn(shape, device="cuda", requires_grad=True) for shape in GRAM_MAPS["odd"]]
    teacher = [torch.randn(shape, device="cuda") for shape in GRAM_MAPS["odd"]]

    def step() -> None:
        GRAM_LOSSES[loss](student, teacher).sum().backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    expected = [s.grad.clone() for s in student]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for s in student:
        s.grad.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(s.grad, e) for s, e in zip(student, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [2, 10, 1000, 1003, 50_257])
@pytest.mark.parametrize("mode", ["kl", "stable", "multi_stable"])
def test_cross_entropy_distillation_agrees_with_float64(mode: str, classes: int, dtype: torch.dtype) -> None:
    student, teacher = (3 * torch.randn(37, classes).to(dtype) for _ in range(2))
    labels = torch.randint(classes, (37,))
    labels[:3] = torch.tensor([0, classes - 1, -100])
    results = []
    for backend, device, kind in (("reference", "cpu", torch.float64), ("cuda", "cuda", dtype)):
        leaf = student.to(device, kind).requires_grad_()
        with hyperfast.use_backend(backend):
            losses = functional.cross_entropy_distillation(
                leaf, teacher.to(device, kind), labels.to(device), mode=mode, label_smoothing=0.1
            )
        results.append([losses.detach(), *torch.autograd.grad(1000 * losses.sum(), leaf)])
    bound = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert results[1][1].dtype == dtype
    assert _relative_error(results[1][0], results[0][0]) < 1e-5
    assert _relative_error(results[1][1], results[0][1]) < bound


@pytest.mark.parametrize("classes", [100, 5000])
def test_cross_entropy_distillation_is_one_launch_each_way(classes: int) -> None:
    student, teacher = torch.randn(64, classes, device="cuda"), torch.randn(64, classes, device="cuda")
    labels, options = torch.randint(classes, (64,), device="cuda"), (4.0, "kl", 0.0, -100)
    operation = torch.ops.hyperfast
    with hyperfast.use_backend("cuda"):
        losses, statistics, _ = operation.cross_entropy_distillation(student, teacher, labels, *options, None)
        forward = _kernels(lambda: operation.cross_entropy_distillation(student, teacher, labels, *options, None))
        backward = _kernels(
            lambda: operation.cross_entropy_distillation_backward(
                losses, student, teacher, labels, statistics, *options
            )
        )
    assert len(forward) == 1, forward
    assert len(backward) == 1, backward


def test_cross_entropy_distillation_shows_a_label_that_is_none_of_the_classes() -> None:
    student, labels = torch.randn(4, 10, device="cuda", requires_grad=True), torch.tensor([1, 2, 10, 3], device="cuda")
    losses = functional.cross_entropy_distillation(student, student.detach(), labels)
    assert losses[0].isnan() and not losses[1].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [10, 100, 1000, 1003])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("orthogonality", ["fused", "sub"])
def test_sub_logit_distillation_agrees_with_float64(
    orthogonality: str, count: int, classes: int, dtype: torch.dtype
) -> None:
    student, teacher, sub_logits = (2 * torch.randn(19, *more, classes).to(dtype) for more in ((), (), (3, count)))
    labels, results = torch.randint(classes, (19,)), []
    for backend, device, kind in (("reference", "cpu", torch.float64), ("cuda", "cuda", dtype)):
        leaves = [x.to(device, kind).requires_grad_() for x in (student, sub_logits)]
        with hyperfast.use_backend(backend):
            losses = functional.sub_logit_distillation(
                leaves[0],
                teacher.to(device, kind),
                leaves[1],
                labels.to(device),
                temperature=3.0,
                orthogonality=orthogonality,
                theta=-0.2,
            )
        results.append([losses.total.detach(), losses.components, *torch.autograd.grad(1000 * losses.total, leaves)])
    bound = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for index, (found, expected) in enumerate(zip(results[1], results[0], strict=True)):
        assert _relative_error(found, expected) < (1e-5 if index < 2 else bound)


@pytest.mark.parametrize("classes", [100, 1000])
def test_sub_logit_distillation_is_one_launch(classes: int) -> None:
    student, teacher = torch.randn(64, classes, device="cuda"), torch.randn(64, classes, device="cuda")
    sub_logits, labels = torch.randn(64, 4, 4, classes, device="cuda"), torch.randint(classes, (64,), device="cuda")
    weights, options = torch.ones(4, device="cuda"), (0.1, 1.0, 1.0, 1.0, 0.5, False, True, False)
    with hyperfast.use_backend("cuda"):
        given = (student, teacher, sub_logits, labels, weights, *options)
        forward = _kernels(lambda: torch.ops.hyperfast.sub_logit_distillation(*given))
    assert len(forward) == 1, forward


def test_sub_logit_distillation_shows_a_label_that_is_none_of_the_classes() -> None:
    student, labels = torch.randn(4, 10, device="cuda"), torch.tensor([1, 2, 10, 3], device="cuda")
    losses = functional.sub_logit_distillation(student, student, torch.randn(4, 2, 2, 10, device="cuda"), labels)
    assert losses.components[0].isnan() and not losses.components[1].isnan()


@pytest.mark.parametrize("hidden", [16, 45, 128])
@pytest.mark.parametrize("rule", ["sgd", "nesterov", "adam", "adamw"])
def test_rank_one_update_agrees_with_float64(rule: str, hidden: int) -> None:
    rows, steps = 5000, 3
    weight, factors = torch.randn(rows, hidden), [(torch.randn(rows), torch.randn(2, hidden)) for _ in range(steps)]
    offsets = torch.tensor([0, 1234, rows])
    results = []
    for backend, device, dtype in (("reference", "cpu", torch.float64), ("cuda", "cuda", torch.float32)):
        w = weight.to(device, dtype, copy=True)
        state = [torch.zeros_like(w), torch.zeros_like(w)]
        with hyperfast.use_backend(backend):
            for step, (left, right) in enumerate(factors, start=1):
                vectors = left.to(device, dtype), right.to(device, dtype)
                if rule.startswith("adam"):
                    functional.adam_rank_one(
                        w, *vectors, exp_avg=state[0], exp_avg_sq=state[1], step=step, weight_decay=0.1,
                        decoupled=rule == "adamw", offsets=offsets.to(device),
                    )  # fmt: skip
                else:
                    functional.sgd_rank_one(
                        w, *vectors, lr=0.1, momentum_buffer=state[0], momentum=0.9, weight_decay=0.1,
                        nesterov=rule == "nesterov", offsets=offsets.to(device),
                    )  # fmt: skip
        results.append([w, *state])
    for a, e in zip(results[1], results[0], strict=True):
        assert not e.any() or _relative_error(a, e) < 2e-5


def test_a_whole_step_in_a_cuda_graph_gives_the_same_gradients() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3)).cuda()
    student = hyperfast.hypernetize(model)
    loss = hyperfast.losses.AttentionTransfer()
    x = torch.randn(4, 3, 12, 12, device="cuda")
    target = torch.randn(4, 8, 8, 8, device="cuda")

    def step() -> None:
        student.zero_grad(set_to_none=False)
        loss([student(x)], [target]).backward()

    step()
    expected = [p.grad.clone() for p in student.parameters()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for parameter in student.parameters():
        parameter.grad.fill_(7)
    graph.replay()
    torch.cuda.synchronize()
    for parameter, gradient in zip(student.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_kernels_run_on_the_current_stream() -> None:
    inputs = _to(_generate_inputs(rows=1_000_000, hidden=(16, 64)), "cuda", torch.float32)
    expected = functional.generate(**inputs)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        actual = functional.generate(**inputs)
    stream.synchronize()
    assert torch.equal(actual, expected)


GATED = {
    "layer": {"z": (8, 16, 32, 32), "heads": 3, "outputs": 64, "bias": False},
    "odd": {"z": (5, 6, 3, 5), "heads": 3, "outputs": 7, "bias": True},
    "wide": {"z": (4, 100, 9, 8), "heads": 8, "outputs": 130, "bias": True},
    "sixteen heads": {"z": (3, 40, 8, 8), "heads": 16, "outputs": 64, "bias": False},
    "one head": {"z": (3, 8, 4, 4), "heads": 1, "outputs": 16, "bias": True},
}


def _gated_inputs(
    z: tuple[int, ...], heads: int, outputs: int, bias: bool, dtype: torch.dtype
) -> list[Tensor | None]:
    rank = z[1]
    given = [
        torch.randn(z),
        torch.randn(heads, outputs, rank) / rank**0.5,
        torch.randn(heads, outputs) if bias else None,
        torch.randn(heads, rank),
        torch.randn(heads) if bias else None,
    ]
    return [None if x is None else x.to(dtype) for x in given]


def _run_gated(given: list[Tensor | None], grad: Tensor, device: str, dtype: torch.dtype) -> list[Tensor]:
    leaves = [None if x is None else x.to(device, dtype).requires_grad_() for x in given]
    output, gates = functional.gated_experts(*leaves)  # type: ignore[arg-type]
    some = [x for x in leaves if x is not None]
    gradients = torch.autograd.grad(output, some, grad.to(output))
    return [output.detach(), gates.detach(), *gradients]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", GATED, ids=str)
def test_gated_experts_agree_with_float64_and_repeat(case: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    given = _gated_inputs(**GATED[case], dtype=dtype)  # type: ignore[arg-type]
    assert given[0] is not None and given[1] is not None
    shape = (given[0].shape[0], given[1].shape[1], *given[0].shape[2:])
    grad = torch.randn(shape).to(dtype)
    with hyperfast.use_backend("reference"):
        expected = _run_gated(given, grad, "cpu", torch.float64)
        eager = _run_gated(given, grad, "cuda", dtype)
    with hyperfast.use_backend("triton"):
        actual = _run_gated(given, grad, "cuda", dtype)
        again = _run_gated(given, grad, "cuda", dtype)
    for index, (a, b, e, r) in enumerate(zip(actual, again, expected, eager, strict=True)):
        assert a.dtype == r.dtype and torch.equal(a, b)
        if GATED[case]["heads"] == 1 and e.abs().max() < 1e-9:
            continue  # one gate is 1 whatever its logit
        bound = max(2 * _relative_error(r, e), 1e-6)
        assert _relative_error(a, e) <= bound, f"output {index}"
