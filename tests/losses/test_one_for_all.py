"""OFA-KD: the loss of an exit written out, its gradient, the branches, weights, and every message."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_accurate

from hyperfast.losses import OneForAll, one_for_all

CLASSES = 6


def literal(exits, teacher, labels, gamma, temperature):
    losses = []
    for z in exits:
        total = 0
        for row, t_row, y in zip(z / temperature, teacher / temperature, labels.tolist(), strict=True):
            p, t = row.softmax(0), t_row.softmax(0)
            for c in range(CLASSES):
                w = (1 + t[c]) ** gamma - 1 if c == y else t[c] ** gamma
                total -= w * p[c].log()
        losses.append(total / len(z))
    return torch.stack(losses)


def case(dtype=torch.float64, batch=4, exits=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z, t = (2 * torch.randn(*n, batch, CLASSES, generator=generator, dtype=torch.float64) for n in ((exits,), ()))
    labels = torch.randint(CLASSES, (batch,), generator=generator)
    return z.to(dtype).requires_grad_(), t.to(dtype), labels


@pytest.mark.parametrize("gamma", [1.0, 1.5])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_formula_and_closed_form_gradient(gamma, temperature):
    z, t, y = case()
    found = one_for_all(z, t, y, gamma, temperature)
    torch.testing.assert_close(found, literal(z, t, y, gamma, temperature))
    upstream = torch.tensor([1.0, 0.5, -2.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(found, z, upstream)
    p, q = (z.detach() / temperature).softmax(2), (t / temperature).softmax(1)
    is_label = F.one_hot(y, CLASSES).bool()
    w = torch.where(is_label, (1 + q) ** gamma - 1, q**gamma)
    expected = upstream[:, None, None] * (p * w.sum(1, keepdim=True) - w) / (len(y) * temperature)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)
    assert torch.autograd.gradcheck(lambda x: one_for_all(x, t, y, gamma, temperature), z)


def test_gamma_1_is_cross_entropy_with_the_teachers_probabilities():
    z, t, y = case()
    expected = torch.stack([F.cross_entropy(exit, t.softmax(1)) for exit in z])
    torch.testing.assert_close(one_for_all(z, t, y), expected)
    torch.testing.assert_close(one_for_all(z, t, (y + 1) % CLASSES), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_arithmetic_is_float32_also_under_autocast(dtype):
    z, t, y = case(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = one_for_all(z, t, y, 1.5)
    found.sum().backward()
    assert found.dtype == torch.float32 and z.grad.dtype == dtype
    exact, eager = z.detach().double().requires_grad_(), z.detach().float().requires_grad_()
    expected = literal(exact, t.double(), y, 1.5, 1.0)
    expected.sum().backward()
    literal(eager, t.float(), y, 1.5, 1.0).sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    assert_as_accurate(z.grad, eager.grad.to(dtype), exact.grad)


def test_large_logits_and_empty_batches_are_finite():
    z, t, y = case(torch.float16)
    found = one_for_all(1000 * z, 1000 * t, y)
    assert found.isfinite().all() and (found > 100).any()  # the logarithm of the softmax itself would be -inf
    assert one_for_all(z[:, :0], t[:0], y[:0]).tolist() == [0.0] * 3


def maps(batch=4):
    return {"a": torch.randn(batch, 4, 8, 8), "b": torch.randn(batch, 8, 4, 4)}


def loss_for(student, **options):
    return OneForAll.for_maps(student, [torch.randn(4, 12)], CLASSES, **options)


def test_exits_are_projectors_and_linear_layers():
    student, loss = maps(), loss_for(maps())
    logits, teacher, labels = case(exits=1)[0][0].float(), case()[1].float(), case()[2]
    loss.eval()
    total = loss(student, {}, logits, teacher, labels)
    exits = [c(p(x)) for c, p, x in zip(loss.classifiers, loss.projectors, student.values(), strict=True)]
    torch.testing.assert_close(loss.last, one_for_all(torch.stack([*exits, logits]), teacher, labels))
    torch.testing.assert_close(total, loss.last.sum())
    assert loss.last_names == ["a", "b", "logits"]
    assert [p.width for p in loss.projectors] == [12, 12] and [c.in_features for c in loss.classifiers] == [12, 12]


def test_gradients_flow_to_maps_logits_and_branches():
    student = {name: features.requires_grad_() for name, features in maps().items()}
    loss, (z, t, y) = loss_for(student), case(torch.float32, exits=1)
    loss(student, {}, z[0], t.requires_grad_(), y).backward()
    assert all(x.grad.any() for x in (*student.values(), z, *loss.classifiers.parameters())) and t.grad is None
    assert all(p.grad is not None for p in loss.parameters())


def test_weights_of_the_exits():
    student, (z, t, y) = maps(), case(torch.float32, exits=1)
    loss = loss_for(student, weights={"a": 0.0, "b": 0.5, "logits": 2.0}, beta=3.0).eval()
    total = loss(student, {}, z[0], t, y)
    torch.testing.assert_close(total.detach(), 3 * (0.5 * loss.last[1] + 2 * loss.last[2]))


def test_the_width_is_the_larger_of_both_networks_or_what_is_given():
    student = maps()
    widths = [
        OneForAll.for_maps(student, teacher, CLASSES, **options).projectors[0].width
        for teacher, options in (([torch.randn(4, 5)], {}), ([torch.randn(4, 20)], {}), ([], {}), ([], {"width": 3}))
    ]
    assert widths == [8, 20, 8, 3]


def test_token_maps():
    student = [torch.randn(4, 17, 8), torch.randn(4, 16, 8)]
    loss, (z, t, y) = loss_for(student), case(torch.float32, exits=1)
    loss(student, [], z[0], t, y).backward()
    assert [p.width for p in loss.projectors] == [8, 8] and loss.last_names == ["0", "1", "logits"]
    assert all(p.grad is not None for p in loss.parameters())


def test_classifiers_start_small():
    loss = OneForAll([(256, 2, 2)], 100, 256)
    assert 0.8 < float(loss.classifiers[0].weight.detach().std()) / 0.02 < 0.95
    assert not loss.classifiers[0].bias.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], CLASSES, 8), "shapes is empty; give the shape of the student's map at one stage at least"),
        (([(4, 8, 8)], CLASSES, 8, 0), "gamma is 0; expected a positive number"),
        (([(4, 8, 8)], CLASSES, 8, 1.0, -1), "temperature is -1; expected a positive number"),
        (([(4,)], CLASSES, 8), r"the map is \[4\] without the batch"),
    ],
)
def test_what_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        OneForAll(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": 1}, "1 student taps: a; the loss has branches for 2"),
        ({"logits": 1}, r"student_logits are \[4, 7\]; expected \[B, classes\] = \[4, 6\]"),
        ({"teacher": 1}, r"teacher_logits are \[4, 7\]; expected \[B, classes\] = \[4, 6\]"),
        ({"labels": 1}, r"labels are torch.float32 \[4, 6\]; expected torch.int64 \[B\], class indices"),
    ],
)
def test_bad_input(change, message):
    student, loss, (z, t, y) = maps(), loss_for(maps()), case(torch.float32, exits=1)
    wide = torch.randn(4, 7)
    if "student" in change:
        del student["b"]
    soft = torch.rand(4, 6) if "labels" in change else y
    with pytest.raises(ValueError, match=message):
        loss(student, {}, wide if "logits" in change else z[0], wide if "teacher" in change else t, soft)


def test_repr_shows_the_options():
    assert repr(OneForAll([(4, 2, 2)], 3, 5, gamma=1.5)).startswith("OneForAll(\n  gamma=1.5, temperature=1.0\n")


def test_compiled_with_fullgraph():
    torch.compiler.reset()
    z, t, y = case(torch.float32)
    compiled = torch.compile(one_for_all, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z, t, y, 1.5, 2.0), one_for_all(z, t, y, 1.5, 2.0))
