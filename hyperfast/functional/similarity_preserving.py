"""Similarity preserving: which samples of a batch are alike."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hyperfast import reference
from hyperfast.backends import Backend, current_backend
from hyperfast.functional._maps import check_gram_statistics, check_maps, choose_teacher
from hyperfast.ops import similarity_preserving as _op
from hyperfast.ops._library import without_autocast

_SHAPE = "[B, ...]"


def similarity_preserving(
    student: Sequence[Tensor], teacher: Sequence[Tensor] | None = None, *, statistics: Tensor | None = None
) -> Tensor:
    r"""Similarity preserving of all taps in one call: one loss per tap.

    With the samples of a map flattened to the rows of X, :math:`G = X X^T`, and U that with every row divided by
    :math:`\max(\|G_i\|_2, 10^{-12})`:

    .. math::
        L = \frac{1}{B^2} \| U_s - U_t \|_F^2

    Args:
        student: feature maps `[B, ...]` of at least two axes, float16, bfloat16, float32 or float64, of one batch.
            Gradients flow here only.
        teacher: as many maps of the same batch; the other axes may differ.
        statistics: in place of the teacher's maps, what `similarity_statistics` made of them.

    Returns:
        float32 `[L]` (float64 for float64 maps), unweighted. Products are summed in float32 whatever the maps are.

    Raises:
        ValueError: unequal numbers of maps, batch sizes or devices; statistics of another shape; both or neither of
            teacher and statistics.

    Notes:
        Invariant to the scale of either map, not to a shift. Depends on who else is in the batch; a batch of one has
        loss 0. A dead sample, whose row of G has a norm up to 1e-12, has a row of zeros without gradient in U, where
        the gradient of the project named below is up to 1e12 times too large. The backward pass needs the student's
        maps and one `[B, B]` matrix per tap.

    Source: Tung and Mori, arXiv 1907.09682; RepDistiller's code, which the authors confirmed.
    """
    teachers = choose_teacher(student, teacher, statistics, "similarity_statistics")
    check_maps(student, teachers, 2, _SHAPE)
    statistics = check_gram_statistics(student, statistics, "similarity_statistics")
    if current_backend() is Backend.REFERENCE:
        exact: Tensor = without_autocast(reference.similarity_preserving)(student, teachers, statistics)
        return exact
    losses: Tensor = _op.similarity_preserving(list(student), teachers, statistics)[0]
    return losses


def similarity_statistics(teacher: Sequence[Tensor]) -> Tensor:
    """U of all maps of a teacher, `[L, B, B]` in float32 (float64 for float64 maps): all that the loss needs of them.

    Args:
        teacher: feature maps `[B, ...]` of one batch.

    Raises:
        ValueError: as `similarity_preserving`.
    """
    maps = [t.detach() for t in teacher]
    check_maps(maps, [], 2, _SHAPE)
    statistics: Tensor = _op.similarity_statistics(maps)
    return statistics
