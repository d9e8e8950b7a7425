"""The contract of `hyperfast::attention_transfer`, on every backend."""

import sys
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from helpers import golden
from map_loss_contract import AheadContract, with_gradients

from hyperfast import functional
from hyperfast.ops.attention_transfer import attention_transfer, attention_transfer_backward, forward_implementations

DISPATCHER = forward_implementations
# One to three spatial axes; sizes that fill no vector.
SHAPES = [(3, 5, 6, 7), (3, 8, 4, 4), (3, 4, 9), (3, 3, 2, 3, 3), (3, 70, 33, 1)]


def plain(students, teachers, p=2, mode="code"):
    """As the projects write it."""

    def attention(features):
        power = features.abs().pow(p)
        energy = (power.mean(1) if mode == "code" else power.sum(1)).flatten(1)
        return energy / (energy.norm(dim=1, keepdim=True) + 1e-6) if mode == "zoo" else F.normalize(energy, eps=1e-12)

    losses = []
    for s, t in zip(students, teachers, strict=True):
        difference = attention(s) - attention(t)
        losses.append(difference.norm(dim=1).mean() if mode == "paper" else difference.square().mean())
    return torch.stack(losses)


class TestAttentionTransfer(AheadContract):
    public = staticmethod(functional.attention_transfer)
    plain = staticmethod(plain)
    cases = tuple({"p": p, "mode": mode} for mode in ("code", "paper", "zoo") for p in (2, 1, 3))
    traced: ClassVar = {}  # the compiler would make a p that is given a symbol, which torch's pow cannot take
    shapes = SHAPES
    accurate = (*SHAPES[:2], (3, 33, 17, 19))
    scale = 2.0**14
    no_second_derivative = "attention_transfer has no fused second derivative"
    backward = (sys.modules["hyperfast.ops.attention_transfer"], "attention_transfer_backward")

    def teacher_shape(self, index, shape):
        """One channel more in the second tap."""
        batch, channels, *spatial = shape
        return (batch, channels + (index == 1), *spatial)

    def call(self, students, teachers, options, expected_grad):
        p, mode = options.get("p", 2), options.get("mode", "code")
        return attention_transfer, (students, teachers, p, mode, 1e-6 if mode == "zoo" else 1e-12, expected_grad)

    def more_calls(self, students, teachers, options):
        operation, arguments = self.call(students, teachers, options, None)
        _, coefficients, _ = operation(*arguments)
        yield attention_transfer_backward, (torch.ones(len(students)), students, coefficients, 2)

    @pytest.mark.parametrize(("student", "teacher"), [((8, 8), (4, 4)), ((4, 4), (8, 8)), ((7, 5), (3, 6))])
    def test_larger_map_is_average_pooled(self, backend, student, teacher):
        s, t = torch.randn(2, 3, *student), torch.randn(2, 5, *teacher)
        size = tuple(min(pair) for pair in zip(student, teacher, strict=True))
        expected = plain([F.adaptive_avg_pool2d(s, size)], [F.adaptive_avg_pool2d(t, size)])
        torch.testing.assert_close(self.public([s], [t]), expected)

    @pytest.mark.parametrize("mode", ["code", "paper"])
    @pytest.mark.parametrize("p", [1, 2, 3])
    def test_invariant_to_the_scale_of_either_map(self, backend, mode, p):
        students, teachers = self.maps()
        options = {"p": p, "mode": mode}
        scaled = self.operation([100 * s for s in students], [0.01 * t for t in teachers], options)
        torch.testing.assert_close(scaled, self.operation(students, teachers, options), rtol=1e-10, atol=1e-14)

    def test_a_zero_map_has_a_zero_gradient(self, backend, options):
        students, teachers = self.maps(dtype=torch.float32)
        with torch.no_grad():
            for s, t in zip(students, teachers, strict=True):
                s[0] = 0
                t[1] = 0
        losses, gradients = with_gradients(self.operation, students, teachers, options)
        assert losses.isfinite().all()
        for gradient in gradients:
            assert gradient.isfinite().all()
            assert not gradient[0].any()
            assert gradient[2].any()

    def test_equal_maps_have_zero_loss_and_gradient(self, backend, options):
        students, _ = self.maps()
        losses, gradients = with_gradients(self.operation, students, [s.detach() for s in students], options)
        torch.testing.assert_close(losses, torch.zeros_like(losses), rtol=0, atol=1e-15)
        for gradient in gradients:
            torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)

    @pytest.mark.parametrize(("mode", "p"), [("code", 1), ("code", 2), ("code", 3), ("zoo", 2)])
    def test_maps_of_one_position_have_zero_loss_and_gradient(self, backend, mode, p):
        students, teachers = self.maps([(4, 8, 1, 1), (4, 8, 1)], torch.float32)
        losses, gradients = with_gradients(self.operation, students, teachers, {"p": p, "mode": mode})
        assert losses.abs().max() < 1e-10
        assert max(gradient.abs().max() for gradient in gradients) < 1e-6

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s, t: ([s[0].flatten(1), s[1]], t), r"student map 0 is torch.float64 \[3, 210\]; expected floats"),
            (lambda s, t: ([s[0].flatten(2), s[1]], t), "tap 0: maps .* cannot be matched by pooling"),
        ],
    )
    def test_maps_without_positions_or_of_other_axes(self, change, message):
        students, teachers = change(*self.maps(SHAPES[:2]))
        with pytest.raises(ValueError, match=message):
            self.public(students, teachers)

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"mode": "sum"}, "mode is 'sum'; choose one of 'code', 'paper', 'zoo'"),
            ({"p": 4}, "p is 4; choose 1, 2 or 3"),
        ],
    )
    def test_bad_options(self, wrong, message):
        with pytest.raises(ValueError, match=message):
            self.public(*self.maps(), **wrong)


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
