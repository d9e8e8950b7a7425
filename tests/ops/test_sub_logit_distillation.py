"""The contract of `hyperfast::sub_logit_distillation`, on every backend."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_accurate
from torch import nn

from hyperfast import functional
from hyperfast.backends import Backend, current_backend, use_backend
from hyperfast.ops.sub_logit_distillation import (
    implementations,
    sub_logit_distillation,
    sub_logit_distillation_backward,
)

DISPATCHER = implementations
WEIGHTS = (1.0, 0.7, 6.0, 2.0)
DEFAULTS = {"label_smoothing": 0.1, "temperature": 1.0, "lambda_s": 1.0, "lambda_t": 1.0, "theta": 0.5}
DEFAULTS |= {"detach_target": False, "orthogonality": "fused", "reduction": "sum"}
OPTIONS = [
    {},
    {"temperature": 3.0, "label_smoothing": 0.0},
    {"temperature": 3.0, "detach_target": True, "reduction": "mean", "orthogonality": "sub", "theta": -0.3},
    {"detach_target": True, "theta": 0.0},
    {"lambda_s": 0.5, "lambda_t": 2.0, "theta": -1.0, "orthogonality": "sub"},
    {"lambda_s": 0.0, "reduction": "mean"},
    {"lambda_t": 0.0, "theta": 0.1},
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda given: "-".join(map(str, given.values())))


def logits(rows=6, classes=17, stages=3, count=4, dtype=torch.float64, spread=2.0):
    """Student and sub-logits that want gradients, a teacher, labels; all sub-logits of a sample are alike."""
    student, teacher = (spread * torch.randn(rows, classes, dtype=torch.float64) for _ in range(2))
    sub = torch.randn(rows, stages, 1, classes, dtype=torch.float64)
    sub = spread * (sub + torch.randn(rows, stages, count, classes, dtype=torch.float64))
    labels = torch.randint(classes, (rows,))
    labels[:2] = torch.tensor([0, classes - 1])
    return student.to(dtype).requires_grad_(), teacher.to(dtype), sub.to(dtype).requires_grad_(), labels


def literal(student, teacher, sub, labels, weights=WEIGHTS, **options):
    """Sample by sample the losses as they are defined, in at least float32: total, components, mean cosine."""
    o = {**DEFAULTS, **options}
    dtype = torch.promote_types(student.dtype, torch.float32)
    student, teacher, sub = student.to(dtype), teacher.to(dtype), sub.to(dtype)
    _, stages, count, classes = sub.shape
    t, share = o["temperature"], 1 / stages if o["reduction"] == "mean" else 1
    smoothing = {"label_smoothing": o["label_smoothing"]}
    log_p = F.log_softmax(student / t, 1)
    gt = F.cross_entropy(student, labels, **smoothing)
    kd = t**2 * F.kl_div(log_p, F.softmax(teacher / t, 1), reduction="batchmean")
    sdd, ol, similarity = student.new_zeros(()), student.new_zeros(()), student.new_zeros(())
    others = torch.stack([torch.tensor([k for k in range(classes) if k != label]) for label in labels.tolist()])
    for i in range(stages):
        fused = [o["lambda_s"] * sub[:, i, j] + o["lambda_t"] * teacher for j in range(count)]
        for f in fused:
            q = F.softmax((f.detach() if o["detach_target"] else f) / t, 1)
            gt = gt + share / count * F.cross_entropy(f, labels, **smoothing)
            sdd = sdd + share / count * t**2 * F.kl_div(log_p, q, reduction="batchmean")
        compared = fused if o["orthogonality"] == "fused" else [sub[:, i, j] for j in range(count)]
        units = [F.normalize(x.gather(1, others), dim=1) for x in compared]
        for j, k in itertools.permutations(range(count), 2):
            cosine = (units[j] * units[k]).sum(1)
            ol = ol + share / (count * (count - 1)) * F.relu(cosine - o["theta"]).square().mean()
            similarity = similarity + cosine.mean() / (stages * count * (count - 1))
    components = torch.stack((gt, kd, sdd, ol))
    return components @ torch.tensor(weights, dtype=dtype), components.detach(), similarity.detach()


def operation(student, teacher, sub, labels, weights=WEIGHTS, **options):
    """The registered operation itself; the public function leaves it out on the reference backend."""
    return run(student, teacher, sub, labels, torch.tensor(weights, dtype=torch.float64), *flat(**options))[:2]


def run(*arguments):
    return sub_logit_distillation(*arguments)


def flat(**options):
    """The options as the operation takes them."""
    *numbers, detach, orthogonality, reduction = {**DEFAULTS, **options}.values()
    return (*numbers, detach, orthogonality == "fused", reduction == "mean")


def with_gradients(function, student, teacher, sub, labels, scale=1.0, **options):
    """Total, components and both gradients of the total. float16 needs a loss scale."""
    total, components, *_ = function(student, teacher, sub, labels, **options)
    gradients = torch.autograd.grad(scale * total, (student, sub))
    return total.detach(), components[:4], *gradients


def close(found, expected, **tolerance):
    for name, *pair in zip(("total", "components", "by student", "by sub-logits"), found, expected, strict=True):
        torch.testing.assert_close(*pair, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


# Values


@every_option
@pytest.mark.parametrize("count", [1, 2, 4, 7, 8])
def test_equals_the_definition_and_its_autograd(backend, options, count):
    given = logits(count=count)
    found, expected = with_gradients(operation, *given, **options), with_gradients(literal, *given, **options)
    close(found, expected, rtol=1e-11, atol=1e-13)


def test_two_classes(backend):
    given = logits(classes=2)
    found, expected = with_gradients(operation, *given), with_gradients(literal, *given)
    close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("classes", [10, 100, 1000])
@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS[:3], ids=["defaults", "warm", "stable"])
def test_accuracy(backend, options, dtype, count, classes):
    student, teacher, sub, labels = logits(16, classes, 2, count, dtype)
    found = with_gradients(operation, student, teacher, sub, labels, 1024, **options)
    eager = with_gradients(literal, student, teacher, sub, labels, 1024, **options)
    wide = [x.detach().double().requires_grad_() for x in (student, teacher, sub)]
    exact = with_gradients(literal, *wide, labels, 1024, **options)
    assert found[0].dtype == found[1].dtype == torch.float32 and found[2].dtype == found[3].dtype == dtype
    for index, what in enumerate(("total", "components", "by student", "by sub-logits")):
        assert_as_accurate(found[index], eager[index], exact[index], what=what)


@every_option
def test_public_function_and_operation_agree(backend, options):
    given = logits()
    losses = functional.sub_logit_distillation(*given, WEIGHTS, **options)
    total, components = operation(*given, **options)
    _, _, similarity = literal(*given, **options)
    torch.testing.assert_close(losses.total, total, rtol=1e-12, atol=0)
    torch.testing.assert_close(losses.components, components[:4], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(losses.similarity, similarity, rtol=1e-10, atol=1e-12)
    assert losses.total.requires_grad and not losses.components.requires_grad


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("orthogonality", ["fused", "sub"])
def test_identical_sub_logits(backend, orthogonality, reduction):
    student, teacher, sub, labels = logits()
    same = sub.detach()[:, :, :1].expand_as(sub).clone().requires_grad_()
    options = {"orthogonality": orthogonality, "reduction": reduction, "theta": 0.3}
    losses = functional.sub_logit_distillation(student, teacher, same, labels, (0.0, 0.0, 0.0, 2.0), **options)
    expected = (1 if reduction == "mean" else 3) * (1 - 0.3) ** 2
    assert losses.components[3].item() == pytest.approx(expected) and losses.total.item() == pytest.approx(2 * expected)
    assert losses.similarity.item() == pytest.approx(1)


def test_orthogonal_sub_logits(backend):
    student, teacher, _, _ = logits(rows=4, classes=9, count=4)
    sub = 5 * torch.eye(9, dtype=torch.float64)[1:5].expand(4, 3, 4, 9).clone().requires_grad_()
    labels = torch.tensor([0, 5, 6, 7])
    weights = (0.0, 0.0, 0.0, 1.0)
    losses = functional.sub_logit_distillation(student, teacher, sub, labels, weights, orthogonality="sub", theta=0.0)
    assert losses.components[3] == 0 and losses.similarity == 0
    assert not torch.autograd.grad(losses.total, sub)[0].any()


def test_orthogonal_sub_logits_are_pushed_beyond_a_negative_theta(backend):
    student, teacher, _, _ = logits(rows=4, classes=9, count=4)
    sub = 5 * torch.eye(9, dtype=torch.float64)[1:5].expand(4, 3, 4, 9).clone().requires_grad_()
    given, options = (student, teacher, sub, torch.tensor([0, 5, 6, 7])), {"orthogonality": "sub", "theta": -0.5}
    found, expected = with_gradients(operation, *given, **options), with_gradients(literal, *given, **options)
    close(found, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("scale", [1e-14, 1e-20])
def test_sub_logits_next_to_nothing_have_no_direction(backend, scale):
    student, teacher, sub, labels = logits(dtype=torch.float32)
    sub = (scale * sub.detach()).requires_grad_()
    losses = functional.sub_logit_distillation(student, teacher, sub, labels, orthogonality="sub")
    gradients = torch.autograd.grad(losses.total, (student, sub))
    assert losses.components[3] == 0 and losses.similarity == 0 and all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("what", ["all", "but the label", "one"])
def test_zero_sub_logits_have_no_direction(backend, what):
    student, teacher, sub, labels = logits(dtype=torch.float32)
    with torch.no_grad():
        sub[:, :, 1 if what == "one" else slice(None)] = 0
        if what == "but the label":
            sub.scatter_(3, labels[:, None, None, None].expand(6, 3, 4, 1), 3.0)
    losses = functional.sub_logit_distillation(student, teacher, sub, labels, orthogonality="sub")
    gradients = torch.autograd.grad(losses.total, (student, sub))
    assert all(x.isfinite().all() for x in (losses.total, losses.components, losses.similarity, *gradients))
    assert (losses.components[3] == 0) == (what != "one")


def test_the_label_entry_has_no_part_in_orthogonality(backend):
    student, teacher, sub, labels = logits(dtype=torch.float32)
    weights = (0.0, 0.0, 0.0, 1.0)

    def apart(sub):
        total = functional.sub_logit_distillation(student, teacher, sub, labels, weights, theta=-1.0).total
        return total.detach(), torch.autograd.grad(total, sub)[0]

    index = labels[:, None, None, None].expand(6, 3, 4, 1)
    raised = sub.detach().scatter(3, index, 3e3).requires_grad_()
    (value, gradient), (other, other_gradient) = apart(sub), apart(raised)
    torch.testing.assert_close(other, value)
    torch.testing.assert_close(other_gradient, gradient)
    assert not gradient.gather(3, index).any() and gradient.any()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_half_precision_logits_of_100(backend, temperature):
    student, teacher, sub, labels = (
        x if not x.is_floating_point() else (100 * x.detach().sign()).half().requires_grad_() for x in logits()
    )
    found = with_gradients(operation, student, teacher, sub, labels, temperature=temperature)
    assert all(x.isfinite().all() for x in found)
    wide = [x.detach().double().requires_grad_() for x in (student, teacher, sub)]
    exact = with_gradients(literal, *wide, labels, temperature=temperature)
    torch.testing.assert_close(found[1], exact[1].float(), rtol=1e-4, atol=1e-4)


def test_a_nan_shows(backend):
    student, teacher, sub, labels = logits()
    with torch.no_grad():
        sub[4, 1, 2, 3] = torch.nan
    losses = functional.sub_logit_distillation(student, teacher, sub, labels)
    assert losses.components.isnan().tolist() == [True, False, True, True] and losses.total.isnan()


def test_bitwise_repeatable(backend):
    given = logits(40, 103, dtype=torch.float32)
    first, second = (with_gradients(operation, *given) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_more_sub_logits_than_native_code_takes():
    given = logits(count=9)
    found, expected = with_gradients(operation, *given), with_gradients(literal, *given)
    close(found, expected, rtol=1e-11, atol=1e-13)
    reason = implementations.implementations[1].supports(*given)
    assert reason == "a stage has more than 8 sub-logits"


def test_a_large_gradient_is_written_past_the_caches(backend):
    given = logits(40, 5003, 4, 4, torch.float32)
    if current_backend() is Backend.REFERENCE:
        pytest.skip("the reference writes as PyTorch does")
    found = with_gradients(operation, *given)
    with use_backend("reference"):
        close(found, with_gradients(operation, *given), rtol=1e-4, atol=1e-6)


# Gradients


@every_option
def test_gradcheck(backend, options):
    student, teacher, sub, labels = logits(3, 4, 2, 3)
    if options.get("detach_target"):
        options = {**options, "detach_target": False}

    def total(student, sub):
        return operation(student, teacher, sub, labels, **options)[0]

    assert torch.autograd.gradcheck(total, (student, sub))


@every_option
def test_second_derivative(backend, options):
    student, teacher, sub, labels = logits(3, 4, 2, 3)

    def total(student, sub):
        return operation(student, teacher, sub, labels, **options)[0]

    assert torch.autograd.gradgradcheck(total, (student, sub))


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_the_backward_pass_scales(backend, factor):
    student, teacher, sub, labels = logits()
    found = with_gradients(operation, student, teacher, sub, labels, scale=factor)[2:]
    expected = with_gradients(literal, student, teacher, sub, labels, scale=factor)[2:]
    for pair in zip(found, expected, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-11, atol=1e-13)


def test_two_backward_passes_do_not_share_memory_that_either_changes(backend):
    student, teacher, sub, labels = logits()
    total, _ = operation(student, teacher, sub, labels)
    for _ in range(2):
        total.backward(retain_graph=True)
    once = torch.autograd.grad(total, (student, sub))
    assert torch.equal(student.grad, 2 * once[0]) and torch.equal(sub.grad, 2 * once[1])


def test_teacher_and_weights_get_no_gradient(backend):
    student, teacher, sub, labels = logits()
    weights = torch.tensor(WEIGHTS, dtype=torch.float64, requires_grad=True)
    total = functional.sub_logit_distillation(student, teacher.requires_grad_(), sub, labels, weights).total
    found = torch.autograd.grad(total, [student, teacher, sub, weights], allow_unused=True)
    assert [gradient is None for gradient in found] == [False, True, False, True]


def test_a_detached_target_leaves_the_students_gradient_as_it_is(backend):
    given = logits()
    free, held = (with_gradients(operation, *given, detach_target=detach) for detach in (False, True))
    torch.testing.assert_close(held[:3], free[:3], rtol=1e-12, atol=1e-14)
    assert not torch.allclose(held[3], free[3])


# Layouts and dtypes


@pytest.mark.parametrize("layout", ["permuted", "expanded", "sliced"])
def test_noncontiguous_logits(backend, layout):
    def lay(x):
        if layout == "permuted":
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        return x[:1].expand_as(x) if layout == "expanded" else x[..., ::2]

    student, teacher, sub, labels = logits()
    student, teacher, sub = (lay(x.detach()).requires_grad_() for x in (student, teacher, sub))
    labels = torch.stack((labels, labels), 1)[:, 0].clamp_max(student.shape[1] - 1)
    close(
        with_gradients(operation, student, teacher, sub, labels),
        with_gradients(literal, student, teacher, sub, labels),
        rtol=1e-11,
        atol=1e-13,
    )


def test_logits_of_several_dtypes(backend):
    student, teacher, sub, labels = logits(dtype=torch.float32)
    student, sub = student.detach().bfloat16().requires_grad_(), sub.detach().half().requires_grad_()
    losses = functional.sub_logit_distillation(student, teacher, sub, labels, WEIGHTS)
    gradients = torch.autograd.grad(losses.total, (student, sub))
    expected = with_gradients(literal, student, teacher, sub, labels)
    assert losses.total.dtype == torch.float32 and [x.dtype for x in gradients] == [torch.bfloat16, torch.float16]
    close((losses.total.detach(), losses.components, *gradients), expected)


# PyTorch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_opcheck(backend, layout, dtype):
    student, teacher, sub, labels = logits(dtype=dtype)
    if layout == "permuted":
        student = student.detach().t().contiguous().t().requires_grad_()
        sub = sub.detach().permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0).requires_grad_()
    weights = torch.tensor(WEIGHTS)
    torch.library.opcheck(sub_logit_distillation, (student, teacher, sub, labels, weights, *flat()))
    tensors = (student.detach(), teacher, sub.detach(), labels, weights)
    gradients = sub_logit_distillation(*tensors, *flat())[2:]
    arguments = (torch.tensor(2.0), *tensors, *gradients, *flat())
    torch.library.opcheck(sub_logit_distillation_backward, arguments)


def test_compiles_to_one_graph_with_dynamic_shapes(backend):
    torch.compiler.reset()
    compiled = torch.compile(
        lambda *given: functional.sub_logit_distillation(*given, torch.tensor(WEIGHTS))[:2],
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for rows in (4, 9):
        given = logits(rows, dtype=torch.float32)
        close(with_gradients(compiled, *given), with_gradients(literal, *given))


def test_autocast(backend):
    layer, images = nn.Linear(12, 10), torch.randn(4, 12)
    teacher, labels, sub = torch.randn(4, 10), torch.tensor([0, 3, 9, 1]), nn.Linear(12, 60)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, others = layer(images), sub(images).view(4, 3, 2, 10)
        losses = functional.sub_logit_distillation(found, teacher, others, labels, WEIGHTS)
    losses.total.backward()
    assert found.dtype == torch.bfloat16 and losses.total.dtype == torch.float32
    assert layer.weight.grad.dtype == sub.weight.grad.dtype == torch.float32
    torch.testing.assert_close(losses.components, literal(found, teacher, others, labels)[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_meta(backend, dtype):
    student, teacher, sub, labels = (x.detach().to("meta") for x in logits(dtype=dtype))
    leaves = student.requires_grad_(), sub.requires_grad_()
    total, components, *_ = run(student, teacher, sub, labels, torch.ones(4, device="meta"), *flat())
    assert total.is_meta and total.shape == () and components.shape == (5,)
    assert total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for leaf, gradient in zip(leaves, torch.autograd.grad(total, leaves), strict=True):
        assert (gradient.shape, gradient.dtype, gradient.stride()) == (leaf.shape, dtype, leaf.stride())


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_empty_batch(name):
    student, teacher, sub = (torch.randn(0, *more, requires_grad=True) for more in ((9,), (9,), (2, 3, 9)))
    labels = torch.zeros(0).long()
    with use_backend(name):
        total, components, *gradients = with_gradients(operation, student, teacher, sub, labels)
        public = functional.sub_logit_distillation(student, teacher, sub, labels, WEIGHTS)
    assert total == 0 and not components.any() and [g.shape for g in gradients] == [(0, 9), (0, 2, 3, 9)]
    assert public.total == 0 and not public.components.any()


# Bad input


@pytest.mark.parametrize("label", [-1, 17])
def test_a_label_that_is_none_of_the_classes(backend, label):
    student, teacher, sub, labels = logits()
    labels[4] = label
    with pytest.raises(IndexError, match=r"label of sub_logit_distillation is none of the classes|out of bounds"):
        operation(student, teacher, sub, labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_logits": torch.zeros(6, 17, 1)}, r"student_logits are torch.float32 \[6, 17, 1\]; expected floats"),
        ({"student_logits": torch.zeros(6, 17).long()}, r"student_logits are torch.int64 \[6, 17\]; expected floats"),
        ({"teacher_logits": torch.zeros(6, 16)}, r"are \[6, 17\], teacher_logits torch.float32 \[6, 16\]"),
        ({"teacher_logits": torch.zeros(6, 17).long()}, r"teacher_logits torch.int64 \[6, 17\]; expected floats"),
        ({"sub_logits": torch.zeros(6, 12, 17)}, r"\[6, 12, 17\]; expected floats \[6, stages, sub-logits, 17\]"),
        ({"sub_logits": torch.zeros(5, 3, 4, 17)}, r"\[5, 3, 4, 17\]; expected floats \[6, stages, sub-logits, 17\]"),
        ({"sub_logits": torch.zeros(6, 3, 4, 16)}, r"\[6, 3, 4, 16\]; expected floats \[6, stages, sub-logits, 17\]"),
        ({"sub_logits": torch.zeros(6, 0, 4, 17)}, r"\[6, 0, 4, 17\]; expected floats \[6, stages, sub-logits, 17\]"),
        ({"sub_logits": torch.zeros(6, 3, 4, 17).long()}, r"torch.int64 \[6, 3, 4, 17\]; expected floats"),
        ({"labels": torch.zeros(6, 17)}, r"torch.float32 \[6, 17\], probabilities of .*argmax\(1\)"),
        ({"labels": torch.zeros(5).long()}, r"labels are torch.int64 \[5\]; expected torch.int64 \[6\]"),
        ({"labels": torch.zeros(6).int()}, r"labels are torch.int32 \[6\]; expected torch.int64 \[6\]"),
        ({"labels": torch.zeros(6, device="meta").long()}, "must be on one device; got .*labels on meta"),
        ({"weights": (1.0, 2.0)}, r"weights are \[2\]; expected \[4\], of gt, kd, sdd and ol"),
        ({"weights": torch.ones(4, 1)}, r"weights are \[4, 1\]; expected \[4\], of gt, kd, sdd and ol"),
        ({"weights": torch.ones(4, device="meta")}, "must be on one device; got .*weights on meta"),
        ({"temperature": 0}, "temperature is 0.0; expected a positive number"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5; expected a number from 0 to 1"),
        ({"lambda_s": -1}, "lambda_s is -1.0; expected a finite number that is not negative"),
        ({"lambda_t": float("inf")}, "lambda_t is inf; expected a finite number that is not negative"),
        ({"theta": 1.5}, "theta is 1.5; expected a cosine, from -1 to 1"),
        ({"orthogonality": "both"}, "orthogonality is 'both'; choose one of 'fused', 'sub'"),
        ({"reduction": "none"}, "reduction is 'none'; choose one of 'sum', 'mean'"),
    ],
)
def test_messages(change, message):
    names = ("student_logits", "teacher_logits", "sub_logits", "labels")
    given = {**dict(zip(names, logits(), strict=True)), **change}
    with pytest.raises(ValueError, match=message):
        functional.sub_logit_distillation(**given)
