"""The contract of `hyperfast::activation_boundary`, and of teachers packed in bits."""

import pytest
import torch
from helpers import golden
from map_loss_contract import FORMATS, with_gradients
from paired_contract import SHAPES, PairedContract, maps

from hyperfast import functional
from hyperfast.ops.activation_boundary import loss
from hyperfast.reference.activation_boundary import is_active

DISPATCHER = loss.forward_implementations


def plain(students, teachers, margin, reduction):
    """As the official code writes it: two branches, of which one is active."""
    losses = []
    for s, t in zip(students, teachers, strict=True):
        above = (s + margin).clamp_min(0).square() * ((s > -margin) & (t <= 0))
        below = (s - margin).clamp_max(0).square() * ((s <= margin) & (t > 0))
        total = (above + below).sum()
        losses.append(total / max(s.numel() if reduction == "mean" else len(s), 1))
    return torch.stack(losses)


class TestActivationBoundary(PairedContract):
    loss = loss
    public = staticmethod(functional.activation_boundary)
    plain = staticmethod(plain)
    cases = tuple({"margin": m, "reduction": r} for m in (1.0, 2.5) for r in ("mean", "batch"))
    arguments = staticmethod(lambda margin, reduction: (margin, reduction))
    zero_for_equal_maps = False


@pytest.mark.parametrize(
    ("case", "options", "taps"),
    [("ab_rep", {"reduction": "batch"}, 3), ("ab_zoo_m2", {"margin": 2.0}, 1)],
)
def test_golden(backend, case, options, taps):
    values = golden()
    students = [values[f"in.s{i}"].requires_grad_() for i in range(taps)]
    losses, _ = functional.activation_boundary(students, [values[f"in.t{i}"] for i in range(taps)], **options)
    if case == "ab_rep":
        losses = losses * torch.tensor([0.25, 0.5, 1.0]) * 3 / 1000
    gradients = torch.autograd.grad(losses.sum(), students)
    torch.testing.assert_close(losses.sum().detach(), values[f"{case}.loss"], rtol=1e-12, atol=1e-12)
    for i, gradient in enumerate(gradients):
        torch.testing.assert_close(gradient, values[f"{case}.grad{i}"], rtol=1e-12, atol=1e-12)


def test_a_teacher_of_zero_is_inactive(backend):
    student, teacher = torch.tensor([[-2.0, 0.0, 0.5]]), torch.zeros(1, 3)
    losses, mismatches = functional.activation_boundary([student], [teacher], reduction="batch")
    assert losses.tolist() == [0 + 1 + 1.5**2]
    assert mismatches.tolist() == [torch.tensor(1 / 3).item()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_mismatches(backend, dtype):
    students, teachers = maps(dtype=dtype)
    students[0].data[0] = 0  # counts as inactive
    _, mismatches = functional.activation_boundary(students, teachers)
    expected = [((s > 0) ^ (t > 0)).double().mean() for s, t in zip(students, teachers, strict=True)]
    assert not mismatches.requires_grad
    assert mismatches.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(mismatches.double(), torch.stack(expected), rtol=1e-7, atol=0)


def test_zero_where_the_student_is_beyond_the_margin(backend):
    teacher = torch.randn(4, 5, 6)
    student = (teacher.sign() * (1 + teacher.abs())).requires_grad_()
    losses, mismatches = functional.activation_boundary([student], [teacher])
    losses.sum().backward()
    assert losses == 0 and mismatches == 0 and not student.grad.any()


def test_invariant_to_the_scale_of_the_teacher_alone(backend):
    students, teachers = maps()
    losses, _ = functional.activation_boundary(students, teachers)
    assert torch.equal(functional.activation_boundary(students, [1e-3 * t for t in teachers])[0], losses)
    for changed in ([2 * s for s in students], [s + 1 for s in students]):
        assert (functional.activation_boundary(changed, teachers)[0] != losses).all()
    assert (functional.activation_boundary(students, [t + 1 for t in teachers])[0] != losses).all()


def test_reductions_convert(backend):
    students, teachers = maps()
    mean, batch = (functional.activation_boundary(students, teachers, reduction=r)[0] for r in ("mean", "batch"))
    torch.testing.assert_close(batch, mean * torch.tensor([s[0].numel() for s in students]))


def test_a_student_that_is_not_a_number_shows(backend):
    student = torch.randn(2, 40)
    student[1, 3] = torch.nan
    assert functional.activation_boundary([student], [torch.randn(2, 40)])[0].isnan()


# Packed teachers


def test_bits_of_a_packed_map():
    features = torch.tensor([[1.0, -1, 0, 2, -3, 0, 5, -1, 9], [-1.0, -1, -1, -1, -1, -1, -1, 4, -1]])
    (packed,) = functional.pack_signs([features])
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [[0b01001001, 1], [0b10000000, 0]]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_packed_teacher_gives_what_the_maps_give(backend, dtype, memory_format):
    students, teachers = maps(dtype=dtype, memory_format=memory_format)
    packed = functional.pack_signs(teachers)
    assert [list(p.shape) for p in packed] == [[3, (t[0].numel() + 7) // 8] for t in teachers]
    measures = []

    def losses(students, teachers):
        losses, mismatches = functional.activation_boundary(students, teachers)
        measures.append(mismatches)
        return losses

    found, gradients = with_gradients(losses, students, packed)
    expected, expected_gradients = with_gradients(losses, students, teachers)
    exact = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 1e-2)
    torch.testing.assert_close(found, expected, rtol=min(exact, 1e-6), atol=0)
    torch.testing.assert_close(gradients, expected_gradients, rtol=exact, atol=0)
    assert torch.equal(*measures)


def test_samples_of_a_packed_teacher_may_be_put_together_anew(backend):
    students, teachers = maps()
    order = torch.tensor([2, 0, 2])
    packed = [p[order] for p in functional.pack_signs(teachers)]
    losses, _ = functional.activation_boundary(students, packed)
    expected, _ = functional.activation_boundary(students, [t[order] for t in teachers])
    torch.testing.assert_close(losses, expected, rtol=1e-14, atol=0)


def test_unpacking_is_the_way_back():
    _, teachers = maps()
    for t in teachers:
        assert torch.equal(is_active(t, *functional.pack_signs([t])), t > 0)


def test_opcheck_of_a_packed_teacher(backend):
    students, teachers = maps(SHAPES[:3], torch.float32)
    packed = functional.pack_signs(teachers)
    torch.library.opcheck(loss.forward, (students, packed, 1.0, "mean", None))
    torch.library.opcheck(loss.backward, (torch.ones(3), [s.detach() for s in students], packed, 1.0, "mean"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, p, t: (s, [p[0], t[1]]), "teacher map 1 is not packed and others are; pack all or none"),
        (lambda s, p, t: (s, p[:1]), "2 student maps but 1 teacher maps"),
        (
            lambda s, p, t: (s, [p[0][:, 1:], p[1]]),
            r"tap 0: packed teacher \[3, 26\]; expected \[3, 27\] for a student",
        ),
        (lambda s, p, t: (s, [p[0][:1], p[1]]), "teacher map 0 has a batch of 1, student map 0 one of 3"),
        (lambda s, p, t: ([s[0].long(), s[1]], p), "student map 0 is torch.int64"),
    ],
)
def test_bad_packed_maps(change, message):
    students, teachers = maps(SHAPES[:2])
    with pytest.raises(ValueError, match=message):
        functional.activation_boundary(*change(students, functional.pack_signs(teachers), teachers))


def test_only_maps_are_packed():
    with pytest.raises(ValueError, match=r"map 1 is torch.int64 \[2, 3\]; expected floats \[B, ...\]"):
        functional.pack_signs([torch.randn(2, 3), torch.ones(2, 3, dtype=torch.int64)])


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": 0.0}, r"margin is 0.0; expected a positive number"),
        ({"margin": float("nan")}, r"margin is nan; expected a positive number"),
        ({"reduction": "sum"}, "reduction is 'sum'; choose one of 'mean', 'batch'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        functional.activation_boundary(*maps(), **options)
