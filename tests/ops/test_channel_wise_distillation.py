"""The contract of `hyperfast::channel_wise_distillation`, against the formula in float64."""

import pytest
import torch
import torch.nn.functional as F
from map_loss_contract import FORMATS, with_gradients
from paired_contract import PairedContract, maps

from hyperfast import functional
from hyperfast.ops.channel_wise_distillation import loss

DISPATCHER = loss.forward_implementations
# Many channels: what rounding does to a loss of few is a matter of luck, ours and that of the yardstick.
SHAPES = [(3, 50, 6, 7), (3, 80, 4, 4), (3, 40, 9), (3, 70, 2, 3, 3), (3, 5, 1, 1), (3, 45, 33, 41)]


def plain(students, teachers, temperature):
    losses = []
    for s, t in zip(students, teachers, strict=True):
        log_s, log_t = ((x.flatten(2) / temperature).log_softmax(-1) for x in (s, t))
        divergence = F.kl_div(log_s, log_t, reduction="sum", log_target=True)
        losses.append(divergence * temperature**2 / max(s.shape[0] * s.shape[1], 1))
    return torch.stack(losses)


class TestChannelWiseDistillation(PairedContract):
    loss = loss
    public = staticmethod(functional.channel_wise_distillation)
    plain = staticmethod(plain)
    cases = ({"temperature": 4.0}, {"temperature": 1.0})
    arguments = staticmethod(lambda temperature: (temperature,))
    shapes = SHAPES


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_definition(backend, temperature, memory_format):
    """Channel by channel, as the paper writes it."""
    students, teachers = maps([(2, 20, 5, 3)], memory_format=memory_format)
    expected, gradient = 0, torch.zeros(2, 20, 5, 3, dtype=torch.float64)
    for b in range(2):
        for c in range(20):
            p_s, p_t = (
                (x[b, c].detach() / temperature).exp() / (x[b, c].detach() / temperature).exp().sum()
                for x in (students[0], teachers[0])
            )
            expected += temperature**2 / 40 * (p_t * (p_t / p_s).log()).sum()
            gradient[b, c] = temperature / 40 * (p_s - p_t)
    losses, gradients = with_gradients(
        lambda s, t: functional.channel_wise_distillation(s, t, temperature=temperature), students, teachers
    )
    torch.testing.assert_close(losses[0], expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients[0], gradient, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_finite_where_positions_are_far_apart(backend, memory_format):
    student = torch.zeros(1, 3, 4, 4).to(memory_format=memory_format)
    student[..., 0], student[..., 1] = 1e4, -1e4
    student, teacher = student.requires_grad_(), student.detach().flip(-1).contiguous(memory_format=memory_format)
    losses = functional.channel_wise_distillation([student], [teacher], temperature=1.0)
    losses.sum().backward()
    exact = plain([student.detach().double()], [teacher.double()], 1.0)
    torch.testing.assert_close(losses.detach().double(), exact, rtol=1e-6, atol=0)
    assert student.grad.isfinite().all() and student.grad.any()


def test_invariant_to_a_constant_in_a_channel(backend):
    students, teachers = maps()
    losses = functional.channel_wise_distillation(students[:3], teachers[:3])

    def shifted(features):
        return features + torch.randn(features.shape[:2], dtype=torch.float64).view(3, -1, *[1] * (features.ndim - 2))

    found = functional.channel_wise_distillation([shifted(s) for s in students[:3]], [shifted(t) for t in teachers[:3]])
    torch.testing.assert_close(found, losses)
    assert (functional.channel_wise_distillation([2 * s for s in students[:3]], teachers[:3]) != losses).all()


def test_a_student_that_is_not_a_number_shows(backend):
    student = torch.randn(2, 4, 5, 5)
    student[1, 3, 2, 2] = torch.nan
    assert functional.channel_wise_distillation([student], [torch.randn(2, 4, 5, 5)])[0].isnan()


def test_maps_without_positions():
    with pytest.raises(
        ValueError, match=r"student map 0 is torch.float32 \[2, 3\]; expected floats \[B, C, \*spatial\]"
    ):
        functional.channel_wise_distillation([torch.randn(2, 3)], [torch.randn(2, 3)])


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match="temperature is .*; expected a positive number"):
        functional.channel_wise_distillation(*maps(), temperature=temperature)
