"""Golden values of NeRN, duplicates, sums over taps, accuracy in small dtypes, bad input."""

import pytest
import torch
from helpers import assert_as_accurate
from helpers import golden as load_golden
from torch import nn

from hyperfast.losses import FeatureMapDistillation
from hyperfast.surgery import taps

NERN = load_golden("nern")
MODES = ("l2_batched", "l2", "sp")


def golden(side, dtype=torch.float32):
    return [NERN[f"D_{side}_fmap{i}"].to(dtype) for i in range(2)]


def maps(*shapes, **options):
    return [torch.randn(shape, **options) for shape in shapes]


def by_the_formula(mode, student, teacher):
    """Sample by sample, in float64."""
    a, t = student.double().flatten(1), teacher.double().flatten(1)
    batch = len(a)
    if mode == "l2":
        return (a / ((a * a).sum().sqrt() + 1e-3) - t / (t * t).sum().sqrt()).square().sum()
    if mode == "sp":
        a, t = (torch.stack([torch.stack([x @ y for y in m]) for x in m]) for m in (a, t))
    pairs = zip(a, t, strict=True)
    total = sum(((x / (x.norm() + 1e-3) - y / (y.norm() + 1e-3)) ** 2).sum() for x, y in pairs)
    return total / (batch**2 if mode == "sp" else batch)


@pytest.mark.parametrize(("mode", "name"), [("l2_batched", "L2Batched"), ("l2", "L2"), ("sp", "SP")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden_values(mode, name, dtype):
    loss = FeatureMapDistillation(mode)(golden("student", dtype), golden("teacher", dtype))
    assert loss.dtype == dtype
    torch.testing.assert_close(loss.double(), NERN[f"D_fmd_{name}"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden_gradients(dtype):
    student = [features.detach().requires_grad_() for features in golden("student", dtype)]
    FeatureMapDistillation()(student, golden("teacher", dtype)).backward()
    for index, features in enumerate(student):
        expected = NERN[f"D_fmd_L2Batched_grad{index}"].double()
        torch.testing.assert_close(features.grad.double(), expected, rtol=0, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode):
    student = maps((3, 2, 2), (3, 4), dtype=torch.float64, requires_grad=True)
    teacher = maps((3, 2, 2), (3, 4), dtype=torch.float64)
    loss = FeatureMapDistillation(mode, weights=[1.0, 0.3])
    assert torch.autograd.gradcheck(lambda *pair: loss(pair, teacher), student)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_arithmetic_is_float32_also_under_autocast(mode, dtype):
    (student, teacher) = maps((4, 8, 5, 5), (4, 8, 5, 5), dtype=dtype)
    student.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = FeatureMapDistillation(mode)([student], [teacher])
    assert loss.dtype == torch.float32
    loss.backward()
    assert student.grad.dtype == dtype
    exact = student.detach().double().requires_grad_()
    expected = by_the_formula(mode, exact, teacher)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert_as_accurate(student.grad, exact.grad.to(dtype), exact.grad)


def test_taps_are_summed():
    student, teacher = maps((2, 3, 4, 4), (2, 5, 2)), maps((2, 3, 4, 4), (2, 5, 2))
    loss = FeatureMapDistillation()
    total = loss(student, teacher)
    torch.testing.assert_close(total, loss.last[0] + loss.last[1])
    torch.testing.assert_close(FeatureMapDistillation(weights=[0.0, 2.0])(student, teacher), 2 * loss.last[1])


def test_duplicates_count_once_unless_asked_for():
    (a, b), (s, t) = maps((2, 3, 4), (2, 3, 4), requires_grad=True), maps((2, 3, 4), (2, 3, 4))
    pairs = [a, b, a], [s, t, s]
    loss, as_nern = FeatureMapDistillation(), FeatureMapDistillation(count_duplicates=True)
    once, each = loss(*pairs), as_nern(*pairs)
    torch.testing.assert_close(each - once, loss.last[0])
    assert loss.last[2] == 0 and as_nern.last[2] == loss.last[0] > 0
    torch.testing.assert_close(torch.autograd.grad(each, a)[0], 2 * torch.autograd.grad(once, a)[0])


def test_aliases_are_duplicates_and_equal_values_are_not():
    (a, s) = maps((2, 3, 4), (2, 3, 4))
    loss = FeatureMapDistillation()
    loss([a, a.view(2, 3, 4), a.clone(), a[:], a.half()], [s, s.detach(), s, s.clone(), s])
    assert loss.last[1] == 0
    assert (loss.last[[0, 2, 3, 4]] > 0).all()


def test_one_student_map_against_two_teacher_maps_is_no_duplicate():
    (a, s, t) = maps((2, 3, 4), (2, 3, 4), (2, 3, 4))
    loss = FeatureMapDistillation()
    loss([a, a], [s, t])
    assert (loss.last > 0).all()


def test_duplicates_among_the_taps_of_two_networks():
    """The output of a container is that of its last module."""

    def network():
        return nn.Sequential(nn.Sequential(nn.Linear(4, 5), nn.Tanh()), nn.Linear(5, 2))

    student, teacher, loss = network(), network(), FeatureMapDistillation()
    with taps(student, teacher, at=["0", "0.1", "1"]) as record:
        student(torch.randn(3, 4)), teacher(torch.randn(3, 4))
    loss(record.student, record.teacher)
    # Modules are read as they finish: the activation before the container that holds it.
    assert dict(zip(loss.last_names, (loss.last == 0).tolist(), strict=True)) == {"0.1": False, "0": True, "1": False}


@pytest.mark.parametrize("mode", MODES)
def test_zero_maps_of_the_student_have_finite_gradients(mode):
    student, teacher = torch.zeros(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4)
    loss = FeatureMapDistillation(mode)([student], [teacher])
    loss.backward()
    assert loss > 0 and student.grad.isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_empty_batch_is_zero(mode):
    assert FeatureMapDistillation(mode)(maps((0, 3, 4)), maps((0, 3, 4))) == 0


def test_gradients_flow_to_the_student_only():
    (student, teacher) = maps((2, 3), (2, 3), requires_grad=True)
    FeatureMapDistillation()([student], [teacher]).backward()
    assert student.grad.any() and teacher.grad is None


@pytest.mark.parametrize("mode", MODES)
def test_compiled_with_fullgraph(mode):
    torch.compiler.reset()
    (a, b), (s, t) = maps((2, 3, 4), (2, 5), requires_grad=True), maps((2, 3, 4), (2, 5))
    loss = FeatureMapDistillation(mode)
    expected = loss([a, b, a], [s, t, s])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled([a, b, a], [s, t, s]), expected)


def test_similarity_compares_maps_of_different_sizes():
    loss = FeatureMapDistillation("sp")(maps((3, 2, 4, 4)), maps((3, 5, 2, 2)))
    assert 0 < loss < 1


@pytest.mark.parametrize("mode", ["l2", "l2_batched"])
def test_shapes_must_agree(mode):
    message = (
        rf"tap 1: student map \[3, 2\], teacher map \[3, 4\]; mode '{mode}' needs equal shapes, mode='sp' does not"
    )
    with pytest.raises(ValueError, match=message):
        FeatureMapDistillation(mode)(maps((3, 2), (3, 2)), maps((3, 2), (3, 4)))


def test_modes():
    with pytest.raises(ValueError, match="mode is 'l1'; choose one of 'l2_batched', 'l2', 'sp'"):
        FeatureMapDistillation("l1")


def test_repr_shows_the_options():
    assert repr(FeatureMapDistillation("sp")) == "FeatureMapDistillation(mode='sp')"
    expected = "FeatureMapDistillation(mode='l2', count_duplicates=True)"
    assert repr(FeatureMapDistillation("l2", count_duplicates=True)) == expected
