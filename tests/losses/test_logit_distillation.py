"""Golden values of RepDistiller and NeRN, invariances, float32 arithmetic, the weighted sum, bad input."""

import pytest
import torch
from helpers import golden as load_golden
from torch.nn import functional as F

from hyperfast.losses import CrossEntropyDistillation, LogitDistillation

GOLDEN = load_golden()
NERN = load_golden("nern")


def test_golden_values_and_gradient():
    student = GOLDEN["in.zs"].clone().requires_grad_()
    loss = LogitDistillation(temperature=4.0)(student, GOLDEN["in.zt"])
    loss.backward()
    torch.testing.assert_close(loss.detach(), GOLDEN["kd_rep_T4.loss"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(student.grad, GOLDEN["kd_rep_T4.grad0"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "temperature", "mode"),
    [
        ("KLDiv", 1.0, "kl"),
        ("StableKLDiv", 1.0, "stable"),
        ("MultiStableKLDiv", 1.0, "multi_stable"),
        ("TempStableKLDiv_T2", 2.0, "stable"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden_values_and_gradients_of_nern(name, temperature, mode, dtype):
    student = NERN["D_student_logits"].to(dtype).detach().requires_grad_()
    loss = LogitDistillation(temperature, mode)(student, NERN["D_teacher_logits"].to(dtype))
    loss.backward()
    torch.testing.assert_close(loss.detach().double(), NERN[f"D_loss_{name}"], rtol=1e-6, atol=0)
    expected = NERN[f"D_grad_{name}"].double()
    torch.testing.assert_close(student.grad.double(), expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_stable_modes_bound_the_gradient_of_an_impossible_class():
    student, teacher = torch.tensor([[-60.0, 0.0]], requires_grad=True), torch.tensor([[1.0, 0.0]])
    gradients = {}
    for mode in ("kl", "stable", "multi_stable"):
        gradients[mode] = torch.autograd.grad(LogitDistillation(1.0, mode)(student, teacher), student)[0][0, 0]
    assert gradients["kl"] < -0.7
    assert abs(gradients["stable"]) < 1e-12 and abs(gradients["multi_stable"]) < 1e-12


def test_gradient_is_the_difference_of_the_probabilities():
    student, teacher = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    LogitDistillation(3.0)(student, teacher).backward()
    expected = 3.0 * ((student / 3).softmax(1) - (teacher / 3).softmax(1)) / 5
    torch.testing.assert_close(student.grad, expected.detach())


def test_zero_where_the_probabilities_agree_and_no_gradient_to_the_teacher():
    logits = torch.randn(4, 6, requires_grad=True)
    teacher = (logits.detach() + 3).requires_grad_()
    loss = LogitDistillation()(logits, teacher)
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor(0.0), atol=1e-6, rtol=0)
    assert teacher.grad is None


@pytest.mark.parametrize("mode", ["kl", "stable", "multi_stable"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_arithmetic_is_float32_also_under_autocast(dtype, mode):
    distillation = LogitDistillation(mode=mode)
    student, teacher = 20 * torch.randn(8, 100), 20 * torch.randn(8, 100)
    student, teacher = student.to(dtype).requires_grad_(), teacher.to(dtype)
    loss = distillation(student, teacher)
    assert loss.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(distillation(student, teacher), loss, rtol=0, atol=0)
    loss.backward()
    assert student.grad.dtype == dtype
    torch.testing.assert_close(distillation(student.double(), teacher.double()).float(), loss)


def test_empty_batch_is_zero():
    assert LogitDistillation()(torch.randn(0, 10), torch.randn(0, 10)) == 0


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match=r"temperature is .*; expected a positive number"):
        LogitDistillation(temperature)


def test_modes():
    with pytest.raises(ValueError, match="mode is 'soft'; choose one of 'kl', 'stable', 'multi_stable'"):
        LogitDistillation(mode="soft")


def test_repr_shows_the_mode_where_it_is_not_the_usual_one():
    assert repr(LogitDistillation()) == "LogitDistillation(temperature=4.0)"
    assert repr(LogitDistillation(1, "stable")) == "LogitDistillation(temperature=1.0, mode='stable')"


def test_shapes_and_devices():
    with pytest.raises(ValueError, match=r"\[2, 10\], teacher_logits \[2, 100\]; expected \[B, classes\] for both"):
        LogitDistillation()(torch.randn(2, 10), torch.randn(2, 100))
    with pytest.raises(ValueError, match="student_logits on cpu, teacher_logits on meta. Move them"):
        LogitDistillation()(torch.randn(2, 10), torch.randn(2, 10, device="meta"))


# With cross-entropy


def batch(dtype=torch.float32):
    return torch.randn(6, 9, dtype=dtype, requires_grad=True), torch.randint(9, (6,)), torch.randn(6, 9, dtype=dtype)


def test_the_weighted_sum_of_both_and_what_is_kept_of_it():
    student, labels, teacher = batch(torch.float64)
    loss = CrossEntropyDistillation(0.3, 0.7, temperature=2.0, label_smoothing=0.1)
    found = loss(student, labels, teacher)
    terms = F.cross_entropy(student, labels, label_smoothing=0.1), LogitDistillation(2.0)(student, teacher)
    torch.testing.assert_close(found, 0.3 * terms[0] + 0.7 * terms[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.last, torch.stack(terms).detach(), rtol=1e-12, atol=0)
    assert not loss.last.requires_grad
    (gradient,) = torch.autograd.grad(found, student)
    (expected,) = torch.autograd.grad(0.3 * terms[0] + 0.7 * terms[1], student)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)


def test_weights_may_change_from_step_to_step():
    student, labels, teacher = batch()
    loss = CrossEntropyDistillation()
    before = loss(student, labels, teacher)
    loss.kd_weight = 0.0
    assert before != loss(student, labels, teacher) == loss.last[0]


def test_without_a_teacher_it_is_cross_entropy():
    student, labels, _ = batch()
    loss = CrossEntropyDistillation(ignore_index=4)
    found = loss(student, labels)
    torch.testing.assert_close(found, F.cross_entropy(student, labels, ignore_index=4))
    assert torch.equal(found, loss.last[0]) and loss.last[1] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_weighted_sum_is_float32_also_under_autocast(dtype):
    student, labels, teacher = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = CrossEntropyDistillation()(student.to(dtype), labels, teacher.to(dtype))
    assert found.dtype == torch.float32


def test_repr_of_the_weighted_sum():
    assert repr(CrossEntropyDistillation(kd_weight=0.9)) == (
        "CrossEntropyDistillation(cross_entropy_weight=1.0, kd_weight=0.9, temperature=4.0, mode='kl', "
        "label_smoothing=0.0)"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature is -1; expected a positive number"),
        ({"mode": "soft"}, "mode is 'soft'"),
        ({"label_smoothing": 2}, "label_smoothing is 2; expected a number from 0 to 1"),
    ],
)
def test_options_of_the_weighted_sum(options, message):
    with pytest.raises(ValueError, match=message):
        CrossEntropyDistillation(**options)
