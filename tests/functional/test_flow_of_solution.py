"""What `functional.flow_of_solution` refuses; its values are tested in tests/ops/test_flow_of_solution.py."""

import pytest
import torch

from hyperfast import functional

SHAPES = [(3, 5, 12, 13), (3, 70, 12, 13), (3, 9, 12, 13)]


def maps(shapes=SHAPES):
    """Students and teachers."""
    return tuple([torch.randn(shape) for shape in shapes] for _ in range(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, t: (s, t[:1]), "2 student maps but 1 teacher maps"),
        (lambda s, t: ([], []), "no feature maps were given"),
        (lambda s, t: (s[:1], t[:1]), "one tap; the flow is that between two, tap at least two"),
        (lambda s, t: (s, [t[0], t[1][:1]]), "teacher map 1 has a batch of 1, student map 0 one of 3"),
        (
            lambda s, t: (s, [t[0], t[1][:, 1:]]),
            "tap 1: 70 student channels, 69 teacher channels; .* choose other taps",
        ),
        (
            lambda s, t: ([s[0].flatten(1), s[1]], t),
            r"student map 0 is .* \[3, 780\]; expected floats \[B, C, \*spatial",
        ),
        (lambda s, t: ([s[0][:, :, None, None], s[1]], t), r"a map is \[3, 5, 1, 1, 12, 13\]; expected"),
        (lambda s, t: (s, [t[0].long(), t[1]]), "teacher map 0 is torch.int64"),
        (lambda s, t: (s, [t[0].to("meta"), t[1]]), "student map 0 on cpu, teacher map 0 on meta"),
        (lambda s, t: ([s[0].flatten(2), s[1]], t), "taps 0 and 1: maps .* cannot be matched by pooling"),
    ],
)
def test_bad_maps(change, message):
    students, teachers = change(*maps(SHAPES[:2]))
    with pytest.raises(ValueError, match=message):
        functional.flow_of_solution(students, teachers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "min"}, "pool is 'min'; choose one of 'avg', 'max'"),
        ({"reduction": "none"}, "reduction is 'none'; choose one of 'mean', 'sum'"),
        ({"pairs": [(0, 3)]}, r"pairs holds \(0, 3\), but the taps are 0 to 2"),
        ({"pairs": [(-1, 0)]}, r"pairs holds \(-1, 0\), but the taps are 0 to 2"),
        ({"pairs": []}, "pairs is empty; name at least one pair"),
        ({"statistics": [torch.ones(3, 5, 70)]}, "both given"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        functional.flow_of_solution(*maps(), **options)


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ([torch.ones(3, 5, 70)], r"1 statistics for 2 pairs of taps; flow_statistics\(\) makes them"),
        (
            [torch.ones(3, 5, 70), torch.ones(3, 9, 70)],
            r"statistics 1 is .* \[3, 9, 70\] on cpu; expected .* \[3, 70, 9\]",
        ),
        ([torch.ones(3, 5, 70).long(), torch.ones(3, 70, 9)], "statistics 0 is torch.int64"),
    ],
)
def test_bad_statistics(statistics, message):
    with pytest.raises(ValueError, match=message):
        functional.flow_of_solution(maps()[0], statistics=statistics)
