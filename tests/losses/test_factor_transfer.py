"""The module over taps of factors, RepDistiller's form, and the networks that make factors."""

import pytest
import torch
import torch.nn.functional as F
from helpers import golden as load_golden
from torch import nn

from hyperfast.losses import AttentionTransfer, FactorTransfer, Paraphraser, Translator

GOLDEN = load_golden()


def golden(name):
    return [GOLDEN[f"in.{name}{i}"] for i in range(3)]


def by_attention(student, teacher, p):
    """As RepDistiller writes it."""
    unit_s, unit_t = (F.normalize(x.double().square().mean(1).flatten(1)) for x in (student, teacher))
    return (unit_s - unit_t).abs().pow(p).mean()


def test_golden():
    student = GOLDEN["in.s0"].requires_grad_()
    loss = FactorTransfer()([student], [GOLDEN["in.t0"]])
    torch.testing.assert_close(loss.detach(), GOLDEN["ft_zoo.loss"], rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, GOLDEN["ft_zoo.grad0"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("p", [1, 2])
def test_attention_is_repdistillers(p):
    student, teacher = [features.requires_grad_() for features in golden("s")], golden("t")
    teacher[1] = teacher[1][:, :3]  # numbers of channels may differ
    loss = FactorTransfer(p, "attention", weights=[1.0] * 3)
    gradients = torch.autograd.grad(loss(student, teacher), student)
    expected = torch.stack([by_attention(s, t, p) for s, t in zip(student, teacher, strict=True)])
    torch.testing.assert_close(loss.last, expected.detach())
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), student))


def test_attention_with_squares_is_attention_transfer():
    found = FactorTransfer(2, "attention")(golden("s"), golden("t"))
    assert found == AttentionTransfer()(golden("s"), golden("t"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", [1, 2])
def test_attention_of_large_half_precision_factors(dtype, p):
    student, teacher = ((1e4 * torch.randn(2, 3, 4, 4).clamp(-6, 6)).to(dtype).requires_grad_() for _ in range(2))
    loss = FactorTransfer(p, "attention")([student], [teacher])
    torch.testing.assert_close(loss.detach().double(), by_attention(student, teacher, p).detach(), rtol=1e-5, atol=0)
    loss.backward()
    assert student.grad.isfinite().all()


def test_a_translator_learns_the_factors():
    teacher, student = torch.randn(8, 6, 5, 5), torch.randn(8, 4, 5, 5)
    paraphraser = Paraphraser(6)
    translator, loss = Translator(4, paraphraser.factors), FactorTransfer(beta=500)
    optimiser = torch.optim.Adam(translator.parameters(), lr=1e-2)
    with torch.no_grad():
        factors = paraphraser.encoder(teacher)
    values = []
    for _ in range(20):
        optimiser.zero_grad()
        value = loss([translator(student)], [factors])
        value.backward()
        optimiser.step()
        values.append(value.item())
    assert values[-1] < 0.9 * values[0]


def test_layout_of_the_official_networks():
    paraphraser, translator = Paraphraser(10), Translator(7, 5)
    assert paraphraser.factors == 5
    convolutions = [layer for layer in paraphraser.modules() if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)]
    assert [(type(c), c.in_channels, c.out_channels) for c in convolutions] == [
        *((nn.Conv2d, a, b) for a, b in ((10, 10), (10, 5), (5, 5))),
        *((nn.ConvTranspose2d, a, b) for a, b in ((5, 5), (5, 10), (10, 10))),
    ]
    assert all(c.kernel_size == (3, 3) and c.padding == (1, 1) and c.bias is not None for c in convolutions)
    activations = [layer for layer in paraphraser.modules() if isinstance(layer, nn.LeakyReLU)]
    assert [layer.negative_slope for layer in activations] == [0.1] * 6
    assert isinstance(paraphraser.decoder[-1], nn.LeakyReLU)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in paraphraser.modules())
    assert paraphraser(torch.randn(2, 10, 6, 5)).shape == (2, 10, 6, 5)
    assert translator(torch.randn(2, 7, 6, 5)).shape == paraphraser.encoder(torch.randn(2, 10, 6, 5)).shape


def test_at_least_one_factor():
    assert Paraphraser(1, k=0.1).factors == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [({"p": 3}, "p is 3; choose 1 or 2"), ({"mode": "map"}, "mode is 'map'; choose one of 'factor', 'attention'")],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        FactorTransfer(**options)


def test_repr_shows_the_options():
    assert repr(FactorTransfer(2, "attention")) == "FactorTransfer(p=2, mode='attention')"
