"""The contract of `hyperfast::attention_transfer`, on every backend."""

import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_accurate, golden
from torch import nn

from hyperfast import functional
from hyperfast.backends import use_backend
from hyperfast.ops.attention_transfer import (
    attention_transfer,
    attention_transfer_backward,
    forward_implementations,
)

DISPATCHER = forward_implementations
CASES = [(mode, p) for mode in ("code", "paper", "zoo") for p in (1, 2, 3)]
# Students' and teachers' channels differ in one tap; one to three spatial axes; sizes that fill no vector.
SHAPES = [(3, 5, 6, 7), (3, 8, 4, 4), (3, 4, 9), (3, 3, 2, 3, 3), (3, 70, 33, 1)]


def eps_of(mode):
    return 1e-6 if mode == "zoo" else 1e-12


def maps(shapes=SHAPES, dtype=torch.float64, memory_format=torch.contiguous_format):
    """Students that want gradients, and teachers with one channel more in the second tap."""

    def make(index, shape, extra):
        batch, channels, *spatial = shape
        features = torch.randn(batch, channels + (extra if index == 1 else 0), *spatial).to(dtype)
        return features.to(memory_format=memory_format) if features.ndim == 4 else features

    students = [make(i, shape, 0).requires_grad_() for i, shape in enumerate(shapes)]
    return students, [make(i, shape, 1) for i, shape in enumerate(shapes)]


def operation(students, teachers, p=2, mode="code", eps=None):
    """The registered operation itself; the public function leaves it out on the reference backend."""
    return attention_transfer(students, teachers, p, mode, eps_of(mode) if eps is None else eps, None)[0]


def plain(students, teachers, p=2, mode="code"):
    """As the projects write it, in at least float32."""

    def attention(features):
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        power = features.abs().pow(p)
        energy = (power.mean(1) if mode == "code" else power.sum(1)).flatten(1)
        return energy / (energy.norm(dim=1, keepdim=True) + 1e-6) if mode == "zoo" else F.normalize(energy, eps=1e-12)

    losses = []
    for s, t in zip(students, teachers, strict=True):
        difference = attention(s) - attention(t)
        losses.append(difference.norm(dim=1).mean() if mode == "paper" else difference.square().mean())
    return torch.stack(losses)


def with_gradients(function, students, *arguments, scale=1.0):
    """Losses and the gradients of a sum that weighs every tap differently. float16 needs a loss scale."""
    losses = function(students, *arguments)
    weights = torch.arange(1, len(losses) + 1, device=losses.device, dtype=losses.dtype)
    return losses.detach(), torch.autograd.grad((scale * losses * weights).sum(), students)


# Values


@pytest.mark.parametrize(
    ("case", "mode", "p", "taps"), [("at_rep", "code", 2, 3), ("at_zoo_p2", "zoo", 2, 1), ("at_zoo_p1", "zoo", 1, 1)]
)
def test_golden(backend, case, mode, p, taps):
    values = golden()
    students = [values[f"in.s{i}"].requires_grad_() for i in range(taps)]
    losses = functional.attention_transfer(students, [values[f"in.t{i}"] for i in range(taps)], p=p, mode=mode)
    gradients = torch.autograd.grad(losses.sum(), students)
    torch.testing.assert_close(losses.sum().detach(), values[f"{case}.loss"], rtol=1e-12, atol=1e-12)
    for i, gradient in enumerate(gradients):
        torch.testing.assert_close(gradient, values[f"{case}.grad{i}"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("mode", "p"), CASES)
def test_equals_plain_autograd(backend, mode, p):
    students, teachers = maps()
    losses, gradients = with_gradients(operation, students, teachers, p, mode)
    expected, expected_gradients = with_gradients(plain, students, teachers, p, mode)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("mode", "p"), CASES)
def test_accuracy(backend, mode, p, dtype):
    students, teachers = maps([*SHAPES[:2], (3, 33, 17, 19)], dtype)
    scale = 2.0**14
    losses, gradients = with_gradients(operation, students, teachers, p, mode, scale=scale)
    eager, eager_gradients = with_gradients(plain, students, teachers, p, mode, scale=scale)
    exact_students = [s.detach().double().requires_grad_() for s in students]
    exact, exact_gradients = with_gradients(plain, exact_students, [t.double() for t in teachers], p, mode, scale=scale)
    assert losses.dtype == torch.float32
    assert_as_accurate(losses, eager, exact, what="losses")
    for i, gradient in enumerate(gradients):
        assert gradient.dtype == dtype
        assert_as_accurate(gradient, eager_gradients[i], exact_gradients[i], what=f"gradient {i}")


@pytest.mark.parametrize(("mode", "p"), CASES)
def test_public_function_and_operation_agree(backend, mode, p):
    students, teachers = maps()
    losses = functional.attention_transfer(students, teachers, p=p, mode=mode)
    torch.testing.assert_close(losses, operation(students, teachers, p, mode), rtol=1e-12, atol=1e-14)


def test_many_taps(backend):
    students, teachers = maps([(2, 3, 2 + i % 3, 2) for i in range(150)])
    losses, gradients = with_gradients(operation, students, teachers)
    expected, expected_gradients = with_gradients(plain, students, teachers)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("student", "teacher"), [((8, 8), (4, 4)), ((4, 4), (8, 8)), ((7, 5), (3, 6))])
def test_larger_map_is_average_pooled(backend, student, teacher):
    s, t = torch.randn(2, 3, *student), torch.randn(2, 5, *teacher)
    size = tuple(min(pair) for pair in zip(student, teacher, strict=True))
    expected = plain([F.adaptive_avg_pool2d(s, size)], [F.adaptive_avg_pool2d(t, size)])
    torch.testing.assert_close(functional.attention_transfer([s], [t]), expected)


# Properties


@pytest.mark.parametrize("mode", ["code", "paper"])
@pytest.mark.parametrize("p", [1, 2, 3])
def test_invariant_to_the_scale_of_either_map(backend, mode, p):
    students, teachers = maps()
    scaled = operation([100 * s for s in students], [0.01 * t for t in teachers], p, mode)
    torch.testing.assert_close(scaled, operation(students, teachers, p, mode), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("mode", "p"), CASES)
def test_a_zero_map_has_a_zero_gradient(backend, mode, p):
    students, teachers = maps(dtype=torch.float32)
    with torch.no_grad():
        for s, t in zip(students, teachers, strict=True):
            s[0] = 0
            t[1] = 0
    losses, gradients = with_gradients(operation, students, teachers, p, mode)
    assert losses.isfinite().all()
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert not gradient[0].any()
        assert gradient[2].any()


@pytest.mark.parametrize(("mode", "p"), CASES)
def test_equal_maps_have_zero_loss_and_gradient(backend, mode, p):
    students, _ = maps()
    losses, gradients = with_gradients(operation, students, [s.detach() for s in students], p, mode)
    torch.testing.assert_close(losses, torch.zeros_like(losses), rtol=0, atol=1e-15)
    for gradient in gradients:
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("mode", "p"), [("code", 1), ("code", 2), ("code", 3), ("zoo", 2)])
def test_maps_of_one_position_have_zero_loss_and_gradient(backend, mode, p):
    students, teachers = maps([(4, 8, 1, 1), (4, 8, 1)], torch.float32)
    losses, gradients = with_gradients(operation, students, teachers, p, mode)
    assert losses.abs().max() < 1e-10
    assert max(gradient.abs().max() for gradient in gradients) < 1e-6


def test_float16_values_of_1e4(backend):
    students, teachers = maps(dtype=torch.float32)
    students = [(1e4 * s.detach().clamp(-6, 6)).half().requires_grad_() for s in students]
    teachers = [(1e4 * t.clamp(-6, 6)).half() for t in teachers]
    losses, gradients = with_gradients(operation, students, teachers)
    expected = plain([s.detach().double() for s in students], [t.double() for t in teachers])
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-9)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_bitwise_repeatable(backend):
    students, teachers = maps([(8, 33, 19, 17), (8, 64, 8, 8)], torch.float32)
    first, first_gradients = with_gradients(operation, students, teachers)
    second, second_gradients = with_gradients(operation, students, teachers)
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(first_gradients, second_gradients, strict=True))


def test_the_teacher_gets_no_gradient(backend):
    students, teachers = maps()
    losses = operation(students, [t.requires_grad_() for t in teachers])
    found = torch.autograd.grad(losses.sum(), [*students, *teachers], allow_unused=True)
    assert [gradient is None for gradient in found] == [False] * len(students) + [True] * len(teachers)


def test_an_unused_tap_changes_nothing_for_the_others(backend):
    students, teachers = maps()
    losses = operation(students, teachers)
    (gradient,) = torch.autograd.grad(losses[1], students[1])
    (expected,) = torch.autograd.grad(plain(students, teachers)[1], students[1])
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)


# Layouts


@pytest.mark.parametrize("layout", ["channels_last", "expanded", "sliced", "offset"])
@pytest.mark.parametrize("teacher_contiguous", [True, False])
def test_noncontiguous_maps(backend, layout, teacher_contiguous):
    def lay(features):
        if layout == "channels_last":
            return features.to(memory_format=torch.channels_last)
        if layout == "expanded":
            return features[:, :1].expand_as(features)
        if layout == "sliced":
            return features[:, ::2, 1:, ::2]
        return features.flatten()[1:].reshape(1, -1)[:, :-2].reshape(1, -1)[:, : 2 * 6 * 16].view(2, 6, 4, 4)

    base, other = torch.randn(2, 6, 8, 8, dtype=torch.float64), torch.randn(2, 6, 8, 8, dtype=torch.float64)
    student, teacher = lay(base).detach().requires_grad_(), lay(other)
    teacher = teacher.contiguous() if teacher_contiguous else teacher
    losses, gradients = with_gradients(operation, [student], [teacher])
    expected, expected_gradients = with_gradients(plain, [student], [teacher])
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-10, atol=1e-14)


# Gradients


@pytest.mark.parametrize(("mode", "p"), CASES)
def test_gradcheck(backend, mode, p):
    students, teachers = maps([(2, 3, 2, 3), (2, 2, 4)])
    assert torch.autograd.gradcheck(lambda *s: operation(list(s), teachers, p, mode), students)


def test_second_derivative_is_a_clear_error(backend):
    students, teachers = maps()
    gradients = torch.autograd.grad(operation(students, teachers).sum(), students, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no fused second derivative.*use_backend\('reference'\)"):
        torch.autograd.grad(gradients[0].sum(), students[0])


@pytest.mark.parametrize(("mode", "p"), CASES)
def test_second_derivative_of_the_reference(mode, p):
    students, teachers = maps([(2, 3, 2, 3)])
    with use_backend("reference"):
        assert torch.autograd.gradgradcheck(
            lambda s: functional.attention_transfer([s], teachers, p=p, mode=mode), students
        )


# The gradient computed ahead


def ahead(students, teachers, expected, factor=1.0, **options):
    """Loss and gradients where the forward pass was told to expect the gradient `expected`."""
    losses = functional.attention_transfer(students, teachers, expected_grad=expected, **options)
    return losses.detach(), torch.autograd.grad((losses * expected * factor).sum(), students)


@pytest.fixture
def backward_runs(monkeypatch):
    """How often the backward operation ran."""
    runs = []
    module = sys.modules["hyperfast.ops.attention_transfer"]
    run = module.attention_transfer_backward
    monkeypatch.setattr(module, "attention_transfer_backward", lambda *a: runs.append(1) or run(*a))
    return runs


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("mode", "p"), CASES)
def test_a_gradient_computed_ahead_is_the_gradient(backward_runs, mode, p, dtype, memory_format):
    students, teachers = maps(dtype=dtype, memory_format=memory_format)
    expected = torch.tensor([1.0, 0.0, 0.3, 2.0, 1e3])
    losses, gradients = ahead(students, teachers, expected, p=p, mode=mode)
    assert not backward_runs
    late_losses = functional.attention_transfer(students, teachers, p=p, mode=mode)
    late = torch.autograd.grad((late_losses * expected).sum(), students)
    assert torch.equal(losses, late_losses) and all(map(torch.equal, gradients, late))
    assert [g.stride() for g in gradients] == [torch.empty_like(s).stride() for s in students]


def test_an_unexpected_gradient_is_right_too(backward_runs):
    students, teachers = maps()
    _, gradients = ahead(students, teachers, torch.ones(5), factor=3.0)
    assert backward_runs
    late = torch.autograd.grad(3 * functional.attention_transfer(students, teachers).sum(), students)
    torch.testing.assert_close(gradients, late, rtol=1e-14, atol=0)


def test_weights_that_change_before_the_backward_pass():
    students, teachers = maps()
    weights = torch.ones(5)
    loss = functional.attention_transfer(students, teachers, expected_grad=weights).sum()
    weights.zero_()
    expected = torch.autograd.grad(functional.attention_transfer(students, teachers).sum(), students)
    assert all(map(torch.equal, torch.autograd.grad(loss, students), expected))


def test_two_backward_passes_do_not_share_memory_that_either_changes():
    students, teachers = maps()
    loss = functional.attention_transfer(students, teachers, expected_grad=torch.ones(5)).sum()
    for _ in range(2):
        loss.backward(retain_graph=True)
    once = torch.autograd.grad(loss, students)
    torch.testing.assert_close([s.grad for s in students], [2 * g for g in once], rtol=0, atol=0)


def test_second_derivative_of_a_gradient_computed_ahead_is_a_clear_error():
    students, teachers = maps()
    losses = functional.attention_transfer(students, teachers, expected_grad=torch.ones(5))
    gradients = torch.autograd.grad(losses.sum(), students, create_graph=True)
    with pytest.raises(RuntimeError, match="no fused second derivative"):
        torch.autograd.grad(gradients[0].sum(), students[0])


def test_opcheck_with_an_expectation():
    students, teachers = maps(SHAPES[:3], torch.float32)
    torch.library.opcheck(attention_transfer, (students, teachers, 2, "code", 1e-12, torch.ones(3)))


def test_an_expectation_of_another_length():
    with pytest.raises(ValueError, match=r"expected_grad is \[2\]; expected \[5\], one per tap"):
        functional.attention_transfer(*maps(), expected_grad=torch.ones(2))


# PyTorch


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend, memory_format, dtype):
    students, teachers = maps(SHAPES[:3], dtype, memory_format)
    torch.library.opcheck(attention_transfer, (students, teachers, 2, "code", 1e-12, None))
    _, coefficients, _ = attention_transfer(students, teachers, 2, "code", 1e-12, None)
    detached = [s.detach() for s in students]
    torch.library.opcheck(attention_transfer_backward, (torch.ones(3), detached, coefficients, 2))


@pytest.mark.parametrize("sliced", [False, True])
def test_compiles_to_one_graph_with_dynamic_shapes(backend, sliced):
    torch.compiler.reset()
    # A lambda: the compiler would make the default p of the function itself a symbol, which torch's pow cannot take.
    compiled = torch.compile(
        lambda students, teachers: functional.attention_transfer(students, teachers),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for batch in (2, 5):
        students, teachers = maps([(batch, 4, 6, 6), (batch, 6, 3, 3)], torch.float32)
        if sliced:
            students = [s[:, ::2] for s in students]
        losses, gradients = with_gradients(compiled, students, teachers)
        expected, expected_gradients = with_gradients(plain, students, teachers)
        torch.testing.assert_close(losses, expected)
        torch.testing.assert_close(gradients, expected_gradients)


def test_autocast(backend):
    layer, images = nn.Conv2d(3, 8, 3), torch.randn(2, 3, 9, 9)
    teacher = torch.randn(2, 8, 7, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = layer(images)
        losses = functional.attention_transfer([features], [teacher.bfloat16()])
    losses.sum().backward()
    assert features.dtype == torch.bfloat16
    assert losses.dtype == torch.float32
    assert layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(losses.detach(), plain([features.detach()], [teacher.bfloat16()]))


def test_maps_of_two_dtypes():
    (student,), (teacher,) = maps(SHAPES[:1], torch.float32)
    found = functional.attention_transfer([student], [teacher.bfloat16()])
    torch.testing.assert_close(found, plain([student], [teacher.bfloat16()]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_meta(backend, dtype):
    students, teachers = maps(dtype=dtype)
    students = [s.detach().to("meta").requires_grad_() for s in students]
    losses, gradients = with_gradients(operation, students, [t.to("meta") for t in teachers])
    assert losses.is_meta
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert [(g.shape, g.dtype, g.stride()) for g in gradients] == [(s.shape, s.dtype, s.stride()) for s in students]


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_empty_batch(name):
    with use_backend(name):
        students, teachers = maps([(0, 4, 3, 3), (0, 6, 2, 2)])
        losses, gradients = with_gradients(operation, students, teachers)
        torch.testing.assert_close(functional.attention_transfer(students, teachers), losses)
    assert losses.tolist() == [0, 0]
    assert [gradient.shape for gradient in gradients] == [s.shape for s in students]


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, t: (s, t[:1]), "2 student maps but 1 teacher maps"),
        (lambda s, t: ([], []), "no feature maps were given"),
        (lambda s, t: (s, [t[0], t[1][:1]]), "tap 1: student batch 3, teacher batch 1; .* on the same images"),
        (lambda s, t: ([s[0].flatten(1), s[1]], t), r"student map 0 is torch.float64 \[3, 210\]; expected floats"),
        (lambda s, t: (s, [t[0].long(), t[1]]), "teacher map 0 is torch.int64"),
        (lambda s, t: (s, [t[0].to("meta"), t[1]]), "student map 0 on cpu, teacher map 0 on meta"),
        (lambda s, t: ([s[0].flatten(2), s[1]], t), "tap 0: maps .* cannot be matched by pooling"),
    ],
)
def test_bad_maps(change, message):
    students, teachers = change(*maps(SHAPES[:2]))
    with pytest.raises(ValueError, match=message):
        functional.attention_transfer(students, teachers)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"mode": "sum"}, "mode is 'sum'; choose one of 'code', 'paper', 'zoo'"), ({"p": 4}, "p is 4; choose 1, 2 or 3")],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        functional.attention_transfer(*maps(), **options)
