"""Golden values of RepDistiller and NeRN, invariances, float32 arithmetic, bad input."""

import pytest
import torch
from helpers import golden as load_golden

from hyperfast.losses import LogitDistillation

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
    with pytest.raises(ValueError, match="on cpu, teacher_logits on meta; move one"):
        LogitDistillation()(torch.randn(2, 10), torch.randn(2, 10, device="meta"))
