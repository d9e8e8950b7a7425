"""What `functional.cross_entropy_distillation` refuses; its values are tested in tests/ops."""

import pytest
import torch

from hyperfast import functional


def logits():
    """A student, a teacher and labels."""
    student, teacher = (torch.randn(7, 37, dtype=torch.float64) for _ in range(2))
    return student, teacher, torch.randint(37, (7,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, t, y: (s, None, None), "neither teacher_logits nor labels were given"),
        (lambda s, t, y: (s[0], t, y), r"student_logits are torch.float64 \[37\]; expected floats \[B, classes\]"),
        (lambda s, t, y: (s.long(), t, y), r"student_logits are torch.int64"),
        (lambda s, t, y: (s[:, :0], t[:, :0], y), r"student_logits are torch.float64 \[7, 0\]"),
        (lambda s, t, y: (s, t[:, 1:], y), r"\[7, 37\], teacher_logits \[7, 36\]; .* the same classes"),
        (lambda s, t, y: (s, t.int(), y), "teacher_logits are torch.int32; expected floats"),
        (lambda s, t, y: (s, t, y.int()), r"labels are torch.int32 \[7\]; expected torch.int64 \[7\]"),
        (lambda s, t, y: (s, t, y[1:]), r"labels are torch.int64 \[6\]; expected torch.int64 \[7\]"),
        (lambda s, t, y: (s, t.to("meta"), y), "student_logits on cpu, teacher_logits on meta"),
    ],
)
def test_bad_tensors(change, message):
    with pytest.raises(ValueError, match=message):
        functional.cross_entropy_distillation(*change(*logits()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "soft"}, "mode is 'soft'; choose one of 'kl', 'stable', 'multi_stable'"),
        ({"temperature": 0}, r"temperature is 0.0; expected a positive number"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5; expected a number from 0 to 1"),
        ({"expected_grad": torch.ones(3)}, r"expected_grad is \[3\]; expected \[2\], one per loss"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        functional.cross_entropy_distillation(*logits(), **options)
