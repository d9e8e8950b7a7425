"""The contract of `hyperfast::cross_entropy_distillation`, on every backend."""

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_accurate, golden
from torch import nn

from hyperfast import functional
from hyperfast.backends import use_backend
from hyperfast.ops.cross_entropy_distillation import (
    cross_entropy_distillation,
    cross_entropy_distillation_backward,
    forward_implementations,
)

DISPATCHER = forward_implementations
MODES = ("kl", "stable", "multi_stable")
CHUNK = 4096  # classes that native code takes at once
# temperature, mode, label smoothing
OPTIONS = [*itertools.product((1.0, 4.0), MODES, (0.0,)), (2.5, "kl", 0.1)]


def logits(rows=7, classes=37, dtype=torch.float64, spread=3.0):
    """A student that wants gradients, a teacher, and labels of which one row has none."""
    student, teacher = (spread * torch.randn(rows, classes, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(classes, (rows,))
    labels[:3] = torch.tensor([0, classes - 1, -100])
    return student.to(dtype).requires_grad_(), teacher.to(dtype), labels


def operation(student, teacher, labels, temperature=4.0, mode="kl", smoothing=0.0, ignore_index=-100):
    """The registered operation itself; the public function leaves it out on the reference backend."""
    return cross_entropy_distillation(student, teacher, labels, temperature, mode, smoothing, ignore_index, None)[0]


def plain(student, teacher, labels, temperature=4.0, mode="kl", smoothing=0.0):
    """As the projects write it, in at least float32."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    student, rows = student.to(dtype), len(student)
    losses = [student.new_zeros(()), student.new_zeros(())]
    if labels is not None:
        losses[0] = F.cross_entropy(student, labels, label_smoothing=smoothing)
    if teacher is not None:
        p, eps = F.softmax(teacher.to(dtype) / temperature, 1), 1e-4
        if mode == "kl":
            divergence = F.kl_div(F.log_softmax(student / temperature, 1), p, reduction="sum")
        else:
            w = p + eps if mode == "multi_stable" else p
            divergence = (w * (w.log() - ((student / temperature).softmax(1) + eps).log())).sum()
        losses[1] = divergence * (temperature**2 / rows)
    return torch.stack(losses)


def with_gradient(function, student, *arguments, weights=(0.7, 1.3), scale=1.0, **options):
    """The losses and the gradient of a weighted sum. float16 needs a loss scale."""
    losses = function(student, *arguments, **options)
    total = (scale * losses * torch.tensor(weights, dtype=losses.dtype)).sum()
    return losses.detach(), torch.autograd.grad(total, student)[0]


# Values


def test_golden(backend):
    values = golden()
    student = values["in.zs"].requires_grad_()
    losses = functional.cross_entropy_distillation(student, values["in.zt"], temperature=4.0)
    (gradient,) = torch.autograd.grad(losses[1], student)
    torch.testing.assert_close(losses[1].detach(), values["kd_rep_T4.loss"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, values["kd_rep_T4.grad0"], rtol=1e-12, atol=1e-12)
    assert losses[0] == 0


@pytest.mark.parametrize("given", ["both", "teacher", "labels"])
@pytest.mark.parametrize(("temperature", "mode", "smoothing"), OPTIONS)
def test_equals_plain_autograd(backend, temperature, mode, smoothing, given):
    student, teacher, labels = logits()
    arguments = (None if given == "labels" else teacher, None if given == "teacher" else labels)
    losses, gradient = with_gradient(operation, student, *arguments, temperature, mode, smoothing)
    expected, expected_gradient = with_gradient(plain, student, *arguments, temperature, mode, smoothing)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("classes", [2, 10, 100, 1000, CHUNK + 907])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("temperature", "mode", "smoothing"), OPTIONS)
def test_accuracy(backend, temperature, mode, smoothing, dtype, classes):
    student, teacher, labels = logits(64, classes, dtype)
    arguments, scale = (teacher, labels, temperature, mode, smoothing), 2.0**10
    losses, gradient = with_gradient(operation, student, *arguments, scale=scale)
    eager, eager_gradient = with_gradient(plain, student, *arguments, scale=scale)
    wide = student.detach().double().requires_grad_()
    exact, exact_gradient = with_gradient(plain, wide, teacher.double(), *arguments[1:], scale=scale)
    assert losses.dtype == torch.float32 and gradient.dtype == dtype
    for index, what in enumerate(("cross-entropy", "distillation")):
        assert_as_accurate(losses[index], eager[index], exact[index], what=what)
    assert_as_accurate(gradient, eager_gradient, exact_gradient, what="gradient")


@pytest.mark.parametrize(("temperature", "mode", "smoothing"), OPTIONS)
def test_public_function_and_operation_agree(backend, temperature, mode, smoothing):
    student, teacher, labels = logits()
    found = functional.cross_entropy_distillation(
        student, teacher, labels, temperature=temperature, mode=mode, label_smoothing=smoothing
    )
    expected = operation(student, teacher, labels, temperature, mode, smoothing)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("order", ["rising", "falling", "apart"])
@pytest.mark.parametrize("mode", MODES)
def test_many_classes_whose_largest_logits_are_in_different_chunks(backend, mode, order):
    student, teacher, labels = logits(3, 100_003)
    slope = torch.linspace(-30, 30, 100_003, dtype=torch.float64)
    with torch.no_grad():
        student += -slope if order == "falling" else slope
    teacher += slope if order == "rising" else -slope
    losses, gradient = with_gradient(operation, student, teacher, labels, 2.0, mode, 0.1)
    expected, expected_gradient = with_gradient(plain, student, teacher, labels, 2.0, mode, 0.1)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-16)


# Unusual logits


@pytest.mark.parametrize("rows", [slice(None, None), slice(2, 3)], ids=["all rows", "one row"])
@pytest.mark.parametrize("mode", MODES)
def test_a_class_that_both_exclude_contributes_nothing(backend, mode, rows):
    student, teacher, labels = logits()
    keep = torch.arange(37) != 5
    labels[labels == 5] = 6
    short, short_teacher = student.detach()[rows][:, keep].requires_grad_(), teacher[rows][:, keep]
    with torch.no_grad():
        student[rows, 5] = -torch.inf
    teacher[rows, 5] = -torch.inf
    labels = labels[rows]
    moved = torch.where(labels > 5, labels - 1, labels)
    student = student.detach()[rows].requires_grad_()
    losses, gradient = with_gradient(operation, student, teacher[rows], labels, 4.0, mode)
    expected, expected_gradient = with_gradient(operation, short, short_teacher, moved, 4.0, mode)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient[:, keep], expected_gradient, rtol=1e-10, atol=1e-14)
    assert not gradient[:, 5].any()


def test_a_class_that_the_student_alone_excludes(backend):
    student, teacher, labels = logits()
    labels[:] = 1
    with torch.no_grad():
        student[0, 5] = -torch.inf
    losses, gradient = with_gradient(operation, student, teacher, labels)
    assert losses[0].isfinite() and losses[1] == torch.inf
    assert gradient.isfinite().all() and gradient[0, 5] < 0
    assert operation(student, teacher, labels, mode="stable").isfinite().all()
    assert operation(student, teacher, labels, smoothing=0.1)[0] == torch.inf


@pytest.mark.parametrize("mode", MODES)
def test_a_whole_chunk_of_excluded_classes(backend, mode):
    student, teacher, labels = logits(5, CHUNK + 50)
    labels[:] = CHUNK + 7
    with torch.no_grad():
        student[:, :CHUNK] = -torch.inf
    teacher[:, :CHUNK] = -torch.inf
    losses, gradient = with_gradient(operation, student, teacher, labels, 2.0, mode)
    short = student.detach()[:, CHUNK:].requires_grad_()
    expected, expected_gradient = with_gradient(operation, short, teacher[:, CHUNK:], labels - CHUNK, 2.0, mode)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient[:, CHUNK:], expected_gradient, rtol=1e-10, atol=1e-14)
    assert not gradient[:, :CHUNK].any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_logits_of_1e4(backend, dtype, mode):
    student, teacher, labels = logits(32, 100, torch.float32)
    student = (1e4 + 10 * student.detach().clamp(-9, 9)).to(dtype).requires_grad_()
    teacher = (-1e4 + 10 * teacher.clamp(-9, 9)).to(dtype)
    losses, gradient = with_gradient(operation, student, teacher, labels, 4.0, mode)
    eager, eager_gradient = with_gradient(plain, student, teacher, labels, 4.0, mode)
    wide = student.detach().double().requires_grad_()
    exact, exact_gradient = with_gradient(plain, wide, teacher.double(), labels, 4.0, mode)
    assert_as_accurate(losses, eager, exact, what="losses")
    assert_as_accurate(gradient, eager_gradient, exact_gradient)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("mode", MODES)
def test_a_nan_shows(backend, mode, side):
    student, teacher, labels = logits()
    with torch.no_grad():
        (student if side == "student" else teacher)[4, 30] = torch.nan
    losses = operation(student, teacher, labels, 4.0, mode)
    assert losses[1].isnan() and losses[0].isnan() == (side == "student")


# Properties


@pytest.mark.parametrize("mode", MODES)
def test_a_constant_added_to_a_row_changes_nothing(backend, mode):
    student, teacher, labels = logits()
    losses, gradient = with_gradient(operation, student, teacher, labels, 4.0, mode, 0.1)
    shifted = (student.detach() + 100 * torch.randn(7, 1)).requires_grad_()
    others, other_gradient = with_gradient(operation, shifted, teacher - 5, labels, 4.0, mode, 0.1)
    torch.testing.assert_close(others, losses, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(other_gradient, gradient, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient.sum(1), torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-14)


def test_equal_logits_have_no_divergence(backend):
    student, _, labels = logits(dtype=torch.float32)
    losses, gradient = with_gradient(operation, student, student.detach() + 3, labels, weights=(0.0, 1.0))
    assert abs(losses[1]) < 1e-6 and gradient.abs().max() < 1e-6


@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_rows_without_a_label_count_for_the_distillation_alone(backend, ignore_index):
    student, teacher, labels = logits()
    labels[:] = torch.tensor([0, 36, 1, 4, 5, 6, 7])
    expected = plain(student, teacher, labels)[1], F.cross_entropy(student[::2], labels[::2])
    labels[1::2] = ignore_index
    losses, gradient = with_gradient(operation, student, teacher, labels, ignore_index=ignore_index, weights=(1.0, 0.0))
    torch.testing.assert_close(losses, torch.stack(expected[::-1]).detach(), rtol=1e-12, atol=1e-14)
    assert not gradient[1::2].any() and gradient[::2].all()


def test_no_row_has_a_label(backend):
    student, teacher, labels = logits()
    losses, gradient = with_gradient(operation, student, teacher, torch.full_like(labels, -100), weights=(1.0, 0.0))
    assert losses[0] == 0 and losses[1] > 0
    assert not gradient.any()


def test_bitwise_repeatable(backend):
    student, teacher, labels = logits(70, 1003, torch.float32)
    first, first_gradient = with_gradient(operation, student, teacher, labels)
    second, second_gradient = with_gradient(operation, student, teacher, labels)
    assert torch.equal(first, second) and torch.equal(first_gradient, second_gradient)


def test_the_teacher_gets_no_gradient(backend):
    student, teacher, labels = logits()
    losses = functional.cross_entropy_distillation(student, teacher.requires_grad_(), labels)
    found = torch.autograd.grad(losses.sum(), [student, teacher], allow_unused=True)
    assert found[0] is not None and found[1] is None


# Layouts and dtypes


@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced"])
def test_noncontiguous_logits(backend, layout):
    def lay(x):
        if layout == "transposed":
            return x.t().contiguous().t()
        return x[:1].expand_as(x) if layout == "expanded" else x[:, ::2]

    student, teacher, labels = logits()
    student, teacher = lay(student.detach()).requires_grad_(), lay(teacher)
    labels = torch.stack((labels, labels), 1)[:, 0].clamp_max(student.shape[1] - 1)
    losses, gradient = with_gradient(operation, student, teacher, labels)
    expected, expected_gradient = with_gradient(plain, student, teacher, labels)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("teacher_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_logits_of_two_dtypes(backend, dtype, teacher_dtype):
    student, teacher, labels = logits(dtype=dtype)
    teacher = teacher.to(teacher_dtype)
    losses, gradient = with_gradient(functional.cross_entropy_distillation, student, teacher, labels)
    expected, expected_gradient = with_gradient(plain, student, teacher, labels)
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and gradient.dtype == dtype
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(gradient, expected_gradient)


# Gradients


@pytest.mark.parametrize(("temperature", "mode", "smoothing"), OPTIONS)
def test_gradcheck(backend, temperature, mode, smoothing):
    student, teacher, labels = logits(4, 5)
    assert torch.autograd.gradcheck(lambda s: operation(s, teacher, labels, temperature, mode, smoothing), student)


@pytest.mark.parametrize(("temperature", "mode", "smoothing"), OPTIONS)
def test_second_derivative(backend, temperature, mode, smoothing):
    student, teacher, labels = logits(4, 5)
    assert torch.autograd.gradgradcheck(lambda s: operation(s, teacher, labels, temperature, mode, smoothing), student)


# The gradient computed ahead


def ahead(student, teacher, labels, expected=(0.7, 1.3), factor=1.0, **options):
    """Losses and gradient where the forward pass was told to expect the gradient `expected`."""
    weights = torch.tensor(expected, dtype=torch.promote_types(student.dtype, torch.float32))
    losses = functional.cross_entropy_distillation(student, teacher, labels, expected_grad=weights, **options)
    return losses.detach(), torch.autograd.grad((losses * weights * factor).sum(), student)[0]


@pytest.fixture
def backward_runs(monkeypatch):
    """How often the backward operation ran."""
    runs = []
    module = sys.modules["hyperfast.ops.cross_entropy_distillation"]
    run = module.cross_entropy_distillation_backward
    monkeypatch.setattr(module, "cross_entropy_distillation_backward", lambda *a: runs.append(1) or run(*a))
    return runs


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", ["both", "teacher", "labels"])
@pytest.mark.parametrize(("temperature", "mode", "smoothing"), OPTIONS)
def test_a_gradient_computed_ahead_is_the_gradient(backward_runs, temperature, mode, smoothing, given, dtype):
    student, teacher, labels = logits(dtype=dtype)
    arguments = (None if given == "labels" else teacher, None if given == "teacher" else labels)
    options = {"temperature": temperature, "mode": mode, "label_smoothing": smoothing}
    losses, gradient = ahead(student, *arguments, **options)
    assert not backward_runs
    late_losses, late = with_gradient(functional.cross_entropy_distillation, student, *arguments, **options)
    assert backward_runs
    assert torch.equal(losses, late_losses) and torch.equal(gradient, late)


def test_a_gradient_computed_ahead_has_the_promised_strides():
    student, teacher, labels = logits()
    student = student.detach().t().contiguous().t().requires_grad_()
    assert ahead(student, teacher, labels)[1].stride() == torch.empty_like(student).stride() == (1, 7)


def test_a_large_gradient_is_written_past_the_caches():
    student, teacher, labels = logits(600, 8192, torch.float32)
    _, gradient = ahead(student, teacher, labels)
    torch.testing.assert_close(gradient, with_gradient(plain, student, teacher, labels)[1])


def test_an_unexpected_gradient_is_right_too(backward_runs):
    student, teacher, labels = logits()
    _, gradient = ahead(student, teacher, labels, factor=3.0)
    assert backward_runs
    late = with_gradient(operation, student, teacher, labels, scale=3.0)[1]
    torch.testing.assert_close(gradient, late, rtol=1e-14, atol=1e-16)


def test_weights_that_change_before_the_backward_pass():
    student, teacher, labels = logits()
    weights = torch.ones(2)
    total = functional.cross_entropy_distillation(student, teacher, labels, expected_grad=weights).sum()
    weights.zero_()
    expected = with_gradient(operation, student, teacher, labels, weights=(1.0, 1.0))[1]
    assert torch.equal(torch.autograd.grad(total, student)[0], expected)


def test_two_backward_passes_do_not_share_memory_that_either_changes():
    student, teacher, labels = logits()
    total = functional.cross_entropy_distillation(student, teacher, labels, expected_grad=torch.ones(2)).sum()
    for _ in range(2):
        total.backward(retain_graph=True)
    (once,) = torch.autograd.grad(total, student)
    torch.testing.assert_close(student.grad, 2 * once, rtol=0, atol=0)


def test_second_derivative_of_a_gradient_computed_ahead():
    student, teacher, labels = logits(4, 5)
    weights = torch.ones(2, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda s: functional.cross_entropy_distillation(s, teacher, labels, expected_grad=weights).sum(), student
    )


# PyTorch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "permuted", "ahead"])
def test_opcheck(backend, layout, dtype):
    student, teacher, labels = logits(dtype=dtype)
    if layout == "permuted":
        student = student.detach().t().contiguous().t().requires_grad_()
    expected = torch.ones(2) if layout == "ahead" else None
    options = (4.0, "stable", 0.1, -100)
    for given in ((teacher, labels), (None, labels), (teacher, None)):
        torch.library.opcheck(cross_entropy_distillation, (student, *given, *options, expected))
        _, statistics, _ = cross_entropy_distillation(student, *given, *options, None)
        arguments = (torch.ones(2), student.detach(), *given, statistics, *options)
        torch.library.opcheck(cross_entropy_distillation_backward, arguments)


@pytest.mark.parametrize("sliced", [False, True])
def test_compiles_to_one_graph_with_dynamic_shapes(backend, sliced):
    torch.compiler.reset()
    compiled = torch.compile(
        lambda student, teacher, labels: functional.cross_entropy_distillation(student, teacher, labels),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for rows in (4, 9):
        student, teacher, labels = logits(rows, 20, torch.float32)
        labels = labels % 10
        if sliced:
            student, teacher = student.detach()[:, ::2].requires_grad_(), teacher[:, ::2]
        losses, gradient = with_gradient(compiled, student, teacher, labels)
        expected, expected_gradient = with_gradient(plain, student, teacher, labels)
        torch.testing.assert_close(losses, expected)
        torch.testing.assert_close(gradient, expected_gradient)


def test_autocast(backend):
    layer, images = nn.Linear(12, 10), torch.randn(4, 12)
    teacher, labels = torch.randn(4, 10), torch.tensor([0, 3, 9, 1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(images)
        losses = functional.cross_entropy_distillation(found, teacher, labels)
    losses.sum().backward()
    assert found.dtype == torch.bfloat16
    assert losses.dtype == torch.float32 and layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(losses.detach(), plain(found.detach(), teacher, labels))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_meta(backend, dtype):
    student, teacher, labels = (x.detach().to("meta") for x in logits(dtype=dtype))
    losses = operation(student.requires_grad_(), teacher, labels)
    (gradient,) = torch.autograd.grad(losses.sum(), student)
    assert losses.is_meta and losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (gradient.shape, gradient.dtype, gradient.stride()) == (student.shape, dtype, student.stride())


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_empty_batch(name):
    student, teacher, labels = torch.randn(0, 9, requires_grad=True), torch.randn(0, 9), torch.zeros(0).long()
    with use_backend(name):
        losses, gradient = with_gradient(operation, student, teacher, labels)
        torch.testing.assert_close(functional.cross_entropy_distillation(student, teacher, labels), losses)
    assert losses.tolist() == [0, 0] and gradient.shape == (0, 9)


def test_what_the_reference_keeps_is_what_native_code_needs(backend):
    student, teacher, labels = logits()
    options = (4.0, "stable", 0.1, -100)
    with use_backend("reference"):
        _, statistics, _ = cross_entropy_distillation(student, teacher, labels, *options, None)
    grad = torch.ones(2, dtype=torch.float64)
    found = cross_entropy_distillation_backward(grad, student, teacher, labels, statistics, *options)
    expected = with_gradient(plain, student, teacher, labels, *options[:3], weights=(1.0, 1.0))[1]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


# Bad input


@pytest.mark.parametrize("label", [-1, 37])
def test_a_label_that_is_none_of_the_classes(backend, label):
    student, teacher, labels = logits()
    labels[4] = label
    with pytest.raises(IndexError, match=r"label of cross_entropy_distillation is none of the classes|out of bounds"):
        operation(student, teacher, labels)
