"""Relational knowledge distillation: distances and angles between the samples of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hyperfast import reference
from hyperfast.backends import Backend, current_backend
from hyperfast.functional._maps import check_gram_statistics, check_maps, choose_teacher
from hyperfast.ops import relational_distance_angle as _op
from hyperfast.ops._library import without_autocast

_SHAPE, _EPS = "[B, ...]", 1e-12


def relational_distance_angle(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor] | None = None,
    *,
    statistics: Tensor | None = None,
    distance: float = 25.0,
    angle: float = 50.0,
    normalize: bool = False,
) -> Tensor:
    r"""Relational knowledge distillation of all taps in one call: one loss per tap.

    With the samples x of a map flattened, :math:`d_{ij} = \|x_i - x_j\|_2`, :math:`\mu` its mean over all
    :math:`i \neq j`, :math:`\psi_{ijk}` the cosine of the angle at :math:`x_j` between :math:`x_i` and :math:`x_k`,
    and h the Huber loss (smooth L1, beta 1):

    .. math::
        L = \frac{w_d}{B^2} \sum_{ij} h\left( \frac{d^s_{ij}}{\mu_s} - \frac{d^t_{ij}}{\mu_t} \right) +
            \frac{w_a}{B^3} \sum_{ijk} h\left( \psi^s_{ijk} - \psi^t_{ijk} \right)

    Args:
        student: feature maps `[B, ...]` of at least two axes, float16, bfloat16, float32 or float64, of one batch of
            at least two. Gradients flow here only, also through :math:`\mu`.
        teacher: as many maps of the same batch; the other axes may differ.
        statistics: in place of the teacher's maps, what `relational_statistics` made of them.
        distance: :math:`w_d`; 0 leaves the term out.
        angle: :math:`w_a`; 0 leaves the term out, and its :math:`B^3` angles.
        normalize: divide every sample by its L2 norm first, as the authors' classification script does and
            RepDistiller, mdistiller and Knowledge-Distillation-Zoo do not. It copies the maps in float32.

    Returns:
        float32 `[L]` (float64 for float64 maps). Products are summed in float32 whatever the maps are.

    Raises:
        ValueError: a batch of less than two samples, whose mean distance is that of no pair; unequal numbers of maps,
            batch sizes or devices; statistics of another shape; both or neither of teacher and statistics.

    Notes:
        Invariant to scale and shift of either map; with `normalize` to the scale of every single sample, but to no
        shift. Two samples have one distance, its own mean, and no angle that could differ: their loss is 0. Means
        include i = j and degenerate angles, which contribute 0. Everything follows from the Gram matrix of the samples
        less their mean; no tensor of B x B x D or B x B x B is made. Squared distances below 1e-12, and those below 8
        units in the last place of what they are the difference of, are taken as 1e-12 without gradient: equal samples,
        whose angles have cosine 0 (below 1e-24).

    Source: Park et al., arXiv 1904.05068; lenscloth/RKD, its metric learning uses the weights 1 and 2.
    """
    teachers = choose_teacher(student, teacher, statistics, "relational_statistics")
    _check(student, teachers)
    statistics = check_gram_statistics(student, statistics, "relational_statistics")
    students = list(student)
    if normalize:
        students, teachers = _unit(students), _unit(teachers)
    arguments = (students, teachers, statistics, float(distance), float(angle))
    if current_backend() is Backend.REFERENCE:
        exact: Tensor = without_autocast(reference.relational_distance_angle)(*arguments)
        return exact
    losses: Tensor = _op.relational_distance_angle(*arguments)[0]
    return losses


def relational_statistics(teacher: Sequence[Tensor], *, normalize: bool = False) -> Tensor:
    """Gram matrices of the samples of a teacher less their mean, `[L, B, B]` in float32 (float64 for float64 maps).

    They are all that `relational_distance_angle` needs of the maps.

    Args:
        teacher: feature maps `[B, ...]` of one batch.
        normalize: as it will be for the loss.

    Raises:
        ValueError: as `relational_distance_angle`.
    """
    maps = [t.detach() for t in teacher]
    _check(maps, [])
    statistics: Tensor = _op.relational_statistics(_unit(maps) if normalize else maps)
    return statistics


def _check(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    check_maps(student, teacher, 2, _SHAPE)
    if len(student[0]) < 2:
        raise ValueError(
            f"a batch of {len(student[0])}; relations need at least two samples, and three to have a loss: "
            "use drop_last=True"
        )


def _unit(maps: Sequence[Tensor]) -> list[Tensor]:
    """Samples of norm 1; a zero sample stays zero, without gradient."""
    found = []
    for features in maps:
        rows = features.flatten(1).to(torch.promote_types(torch.float32, features.dtype))
        squared = rows.square().sum(1, keepdim=True)
        dead = squared <= _EPS**2
        found.append(torch.where(dead, 0, rows / torch.where(dead, 1, squared).sqrt()))
    return found
