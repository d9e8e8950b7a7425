"""The module over taps; the arithmetic itself is tested in tests/ops/test_attention_transfer.py."""

import warnings

import pytest
import torch
from helpers import golden as load_golden
from torch import nn

from hyperfast.losses import AttentionTransfer
from hyperfast.surgery import taps

GOLDEN = load_golden()


def golden(name):
    return [GOLDEN[f"in.{name}{i}"] for i in range(3)]


def test_sum_over_the_taps_is_repdistiller():
    loss = AttentionTransfer(weights=[1.0] * 3)(golden("s"), golden("t"))
    torch.testing.assert_close(loss, GOLDEN["at_rep.loss"], rtol=1e-12, atol=1e-12)


def test_default_weights_are_one_over_the_number_of_taps():
    loss = AttentionTransfer()(golden("s"), golden("t"))
    torch.testing.assert_close(3 * loss, GOLDEN["at_rep.loss"], rtol=1e-12, atol=1e-12)


def test_options_reach_the_operation():
    loss = AttentionTransfer(p=1, mode="zoo")(golden("s")[:1], golden("t")[:1])
    torch.testing.assert_close(loss, GOLDEN["at_zoo_p1.loss"], rtol=1e-12, atol=1e-12)


def test_on_taps_of_two_networks_a_step_lowers_the_loss():
    def network():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 3, stride=2), nn.ReLU())

    student, teacher, images = network(), network().eval(), torch.randn(4, 3, 9, 9)
    loss, optimiser = AttentionTransfer(), torch.optim.SGD(student.parameters(), lr=10.0)
    values = []
    for _ in range(3):
        with taps(student, teacher, at=["0", "2"]) as record:
            student(images)
            with torch.no_grad():
                teacher(images)
        value = loss(record.student, record.teacher)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        values.append(value.item())
    assert values[0] > values[1] > values[2]
    assert loss.last_names == ["0", "2"]


def test_maps_of_one_position_are_warned_of_once_and_contribute_nothing():
    loss = AttentionTransfer()
    maps = [torch.randn(2, 3, 4, 4), torch.randn(2, 3, 1, 1)]
    with pytest.warns(UserWarning, match=r"tap '1' has maps of one position \(\[2, 3, 1, 1\]\).*contribute nothing"):
        loss(maps, [features.flip(0) for features in maps])
    assert loss.last[0] > 0
    assert loss.last[1] < 1e-12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(maps, maps)


def test_compiled_with_fullgraph():
    torch.compiler.reset()
    loss = AttentionTransfer(weights=[1.0, 2.0, 3.0])
    expected = loss(golden("s"), golden("t"))
    torch.testing.assert_close(
        torch.compile(loss, fullgraph=True, backend="aot_eager")(golden("s"), golden("t")), expected
    )


def test_bad_maps_are_named_by_tap():
    with pytest.raises(ValueError, match=r"tap '0': .*the batch sizes differ"):
        AttentionTransfer()([torch.randn(2, 3, 4, 4)], [torch.randn(3, 3, 4, 4)])


def test_repr_shows_the_options():
    assert repr(AttentionTransfer(p=1, mode="paper")) == "AttentionTransfer(p=1, mode='paper')"


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("mode", ["code", "paper", "zoo"])
def test_a_compressed_teacher_is_the_teacher(p, mode):
    student = [torch.randn(3, c, 4, 4, dtype=torch.float64, requires_grad=True) for c in (5, 6)]
    teacher = [torch.randn(3, c, 4, 4, dtype=torch.float64) for c in (7, 6)]
    loss = AttentionTransfer(p=p, mode=mode)
    known = loss.compress(teacher)
    assert [list(attention.shape) for attention in known] == [[3, 1, 4, 4]] * 2 and loss.per_sample
    expected, found = loss(student, teacher), loss(student, statistics=known)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, student), torch.autograd.grad(expected, student), strict=True):
        torch.testing.assert_close(a, b)


def test_a_compressed_teacher_of_half_precision_is_float32():
    teacher = [torch.full((2, 4, 3, 3), 3e4, dtype=torch.float16)]
    (known,) = AttentionTransfer().compress(teacher)
    assert known.dtype == torch.float32 and known.isfinite().all()
    student = [torch.randn(2, 4, 3, 3).half()]
    assert AttentionTransfer()(student, statistics=[known]).isfinite()
