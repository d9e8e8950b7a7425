"""Flow of the solution procedure: how the feature maps of one tap lead to those of another."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from hyperfast import reference
from hyperfast.backends import Backend, current_backend
from hyperfast.functional._checks import check_choice
from hyperfast.functional._maps import POOLS, check_maps, choose_teacher, expectation, pooled
from hyperfast.ops import flow_of_solution as _op
from hyperfast.ops._library import without_autocast
from hyperfast.reference.flow_of_solution import REDUCTIONS

Pairs = Sequence[tuple[int, int]]
_SHAPE = "[B, C, *spatial] with one to three spatial axes"


def flow_of_solution(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor] | None = None,
    *,
    statistics: Sequence[Tensor] | None = None,
    pairs: Pairs | None = None,
    pool: str = "avg",
    reduction: str = "mean",
    normalize: bool = False,
    expected_grad: Tensor | None = None,
) -> Tensor:
    r"""Flow of the solution procedure (FSP) between pairs of taps, all in one call: one loss per pair.

    With maps :math:`F_1` and :math:`F_2` of two taps as `[C1, N]` and `[C2, N]` of every sample b, N positions:

    .. math::
        G_b = \frac{1}{N} F_{1,b} F_{2,b}^T, \qquad
        L_{mean} = \frac{1}{B C_1 C_2} \sum_b \| G^s_b - G^t_b \|_F^2, \qquad
        L_{sum} = \frac{1}{B} \sum_b \| G^s_b - G^t_b \|_F^2

    Args:
        student: feature maps `[B, C, *spatial]`, float16, bfloat16, float32 or float64. Gradients flow here only.
        teacher: as many maps with the same channels, of the same batch; its spatial sizes may be others.
        statistics: in place of the teacher's maps, what `flow_statistics` made of them with the same pairs and pool.
        pairs: indices of taps; default those that follow each other: (0, 1), (1, 2), ...
        pool: how the larger map of a pair is brought to the size of the smaller: `"avg"` as RepDistiller and
            Knowledge-Distillation-Zoo do, `"max"` as torchdistill does.
        reduction: `"mean"` as RepDistiller does, or `"sum"`, per sample, the paper's.
        normalize: divide every sample's term by :math:`\|G^t_b\|_F^2`; with `"sum"` it is the relative squared error.
        expected_grad: `[P]`, what the gradient of the result will be: the weights with which the losses are added up.
            Changes no value. On the CPU the forward pass then writes the gradients while a sample's matrices are in
            the cache, and keeps none of them; if the gradient turns out to be another, the forward pass runs anew.

    Returns:
        float32 `[P]` (float64 for float64 maps), unweighted. Products are summed in float32 whatever the maps are.

    Raises:
        ValueError: less than two taps without pairs; unequal numbers of maps, channels, batch sizes or devices; a pair
            of a tap that there is not; statistics of other shapes; both or neither of teacher and statistics.

    Notes:
        Invariant neither to scale nor to shift: G grows with the square of the activations, and the loss with the
        fourth power; with `normalize` it does not change if both networks' maps are scaled alike. A sample whose
        :math:`\|G^t_b\|_F` is up to 1e-12 then has no loss. No tensor of B x C1 x C2 x N is made; without
        `expected_grad` the gradient keeps the B x C1 x C2 differences of every pair.

    Source: Yim et al., A Gift from Knowledge Distillation, CVPR 2017; RepDistiller.
    """
    check_choice("pool", pool, tuple(POOLS))
    check_choice("reduction", reduction, REDUCTIONS)
    teachers = choose_teacher(student, teacher, statistics, "flow_statistics")
    _check_maps(student, teachers)
    for index, (s, t) in enumerate(zip(student, teachers, strict=False)):
        if s.shape[1] != t.shape[1]:
            raise ValueError(
                f"tap {index}: {s.shape[1]} student channels, {t.shape[1]} teacher channels; "
                "their matrices need equal sizes: choose other taps"
            )
    chosen = check_pairs(pairs, len(student))
    known = [] if statistics is None else _check_statistics(student, list(statistics), chosen)
    students, flat = _maps_of_pairs([list(student), *([teachers] if teachers else [])], chosen, pool)
    arguments = (students[0], students[1] if teachers else [], known, flat, reduction, normalize)
    if current_backend() is Backend.REFERENCE:
        exact: Tensor = without_autocast(reference.flow_of_solution)(*arguments)
        return exact
    expected_grad = expectation(expected_grad, students[0], len(chosen), "pair")
    losses: Tensor = _op.flow_of_solution(*arguments, expected_grad)[0]
    return losses


def flow_statistics(teacher: Sequence[Tensor], *, pairs: Pairs | None = None, pool: str = "avg") -> list[Tensor]:
    """G of all pairs of taps of a teacher, `[B, C1, C2]` each, in float32 (float64 for float64 maps).

    They are all that `flow_of_solution` needs of the maps. Each sample has its own: they may be computed once for a
    whole set of images.

    Args:
        teacher: feature maps `[B, C, *spatial]` of one batch.
        pairs: as they will be for the loss.
        pool: as it will be for the loss.

    Raises:
        ValueError: as `flow_of_solution`.
    """
    check_choice("pool", pool, tuple(POOLS))
    maps = [t.detach() for t in teacher]
    _check_maps(maps, [])
    (used,), flat = _maps_of_pairs([maps], check_pairs(pairs, len(maps)), pool)
    statistics: list[Tensor] = _op.flow_statistics(used, flat)
    return statistics


def _check_maps(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    check_maps(student, teacher, 3, _SHAPE)
    for features in (*student, *teacher):
        if features.ndim > 5:
            raise ValueError(f"a map is {list(features.shape)}; expected {_SHAPE}")


def check_pairs(pairs: Pairs | None, taps: int) -> list[tuple[int, int]]:
    """The pairs of `taps` taps that there is a loss for; a ValueError unless there are some, of taps that exist."""
    if pairs is None:
        if taps < 2:
            raise ValueError("one tap; the flow is that between two, tap at least two")
        return list(pairwise(range(taps)))
    chosen = [(first, second) for first, second in pairs]
    if not chosen:
        raise ValueError(
            "pairs is empty; name at least one pair of taps, or leave it out for those that follow each other"
        )
    for pair in chosen:
        if not all(0 <= tap < taps for tap in pair):
            raise ValueError(f"pairs holds {pair}, but the taps are 0 to {taps - 1}")
    return chosen


def _check_statistics(
    student: Sequence[Tensor], statistics: list[Tensor], pairs: Sequence[tuple[int, int]]
) -> list[Tensor]:
    if len(statistics) != len(pairs):
        raise ValueError(f"{len(statistics)} statistics for {len(pairs)} pairs of taps; flow_statistics() makes them")
    for index, (g, (i, j)) in enumerate(zip(statistics, pairs, strict=True)):
        shape = (len(student[0]), student[i].shape[1], student[j].shape[1])
        if g.shape != shape or not g.is_floating_point() or g.device != student[0].device:
            raise ValueError(
                f"statistics {index} is {g.dtype} {list(g.shape)} on {g.device}; expected floats {list(shape)} on "
                f"{student[0].device}, as flow_statistics() makes them of the teacher's maps of the same images"
            )
    return [g.detach() for g in statistics]


def _maps_of_pairs(
    networks: Sequence[Sequence[Tensor]], pairs: Sequence[tuple[int, int]], pool: str
) -> tuple[list[list[Tensor]], list[int]]:
    """The maps that are multiplied, of every network, and the pairs of them, flat.

    A tap is there once as it is, and once more for each pair in which one of the networks has to pool it.
    """
    slots: dict[tuple[int, int | None], int] = {}
    flat = []
    for i, j in pairs:
        sizes = [_common_size(maps, i, j) for maps in networks]
        for tap, other in ((i, j), (j, i)):
            as_it_is = all(list(maps[tap].shape[2:]) == size for maps, size in zip(networks, sizes, strict=True))
            flat.append(slots.setdefault((tap, None if as_it_is else other), len(slots)))
    return [
        [
            maps[tap] if other is None else pooled(maps[tap], _common_size(maps, tap, other), pool)
            for tap, other in slots
        ]
        for maps in networks
    ], flat


def _common_size(maps: Sequence[Tensor], i: int, j: int) -> list[int]:
    if maps[i].ndim != maps[j].ndim:
        raise ValueError(
            f"taps {i} and {j}: maps {list(maps[i].shape)} and {list(maps[j].shape)} cannot be matched by pooling"
        )
    return [min(a, b) for a, b in zip(maps[i].shape[2:], maps[j].shape[2:], strict=True)]
