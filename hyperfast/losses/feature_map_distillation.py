"""Feature-map distillation of NeRN (arXiv 2212.13554)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.linalg import vector_norm

from hyperfast import functional
from hyperfast.losses.base import FeatureLoss, Weights

if TYPE_CHECKING:
    from collections.abc import Callable

_MODES = ("l2_batched", "l2", "sp")
_EPS = 1e-3


class FeatureMapDistillation(FeatureLoss):
    r"""The student's feature maps follow the teacher's, each scaled to norm 1: what a network sees, not only where.

    For a tap with maps a (student) and t (teacher) of a batch of B, :math:`\epsilon = 10^{-3}`, G the `[B, B]` matrix
    of inner products between the samples of a map, and :math:`\bar G` that with every row divided by its norm
    :math:`+ \epsilon`:

    .. math::
        L_{l2\_batched} = \frac{1}{B} \sum_b \left\| \frac{a_b}{\|a_b\|_2 + \epsilon} -
            \frac{t_b}{\|t_b\|_2 + \epsilon} \right\|_2^2, \quad
        L_{l2} = \left\| \frac{a}{\|a\|_2 + \epsilon} - \frac{t}{\|t\|_2} \right\|_2^2, \quad
        L_{sp} = \frac{1}{B^2} \| \bar G_a - \bar G_t \|_F^2

    Args:
        mode: `"l2_batched"`, norms per sample; `"l2"`, one norm for the whole batch; `"sp"`, similarity-preserving,
            which also compares maps of different sizes.
        weights: of the taps, see `FeatureLoss`; default 1 each. The taps are summed, not averaged, as NeRN does.
        beta: of the whole loss, see there.
        count_duplicates: a tap whose two maps are the very tensors of an earlier tap has loss 0, unless this is True.
            NeRN counts it each time: an in-place sum makes two of its list entries one tensor, in every block.

    Shape:
        Maps `[B, ...]`, any floating dtype; the arithmetic is float32 (float64 for float64), also under autocast.
        Student and teacher maps have equal shapes, but for `"sp"`. Result: a scalar.

    Notes:
        Duplicates are recognised by their memory, so copies (`taps(..., clone=True)`) are not; in compiled code only
        one and the same Python tensor is. An all-zero map has a finite gradient, but for the teacher's in `"l2"`,
        which has no :math:`\epsilon`: the loss is then NaN, as it is in NeRN.

    Source: the code of NeRN, arXiv 2212.13554 (maorash/NeRN): `L2BatchedAttentionLoss`, `L2AttentionLoss` and
    `SPAttentionLoss`. The last one is Tung and Mori's, arXiv 1907.09682; RepDistiller's, which is
    `SimilarityPreserving`, has :math:`\max(\|\cdot\|, 10^{-12})` for its :math:`\epsilon`.
    """

    def __init__(
        self,
        mode: str = "l2_batched",
        weights: Weights | None = None,
        beta: float = 1.0,
        *,
        count_duplicates: bool = False,
    ) -> None:
        super().__init__(weights, beta)
        if mode not in _MODES:
            raise ValueError(f"mode is {mode!r}; choose one of {', '.join(map(repr, _MODES))}")
        self.mode, self.count_duplicates = mode, count_duplicates

    def per_tap(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], expected_grad: Tensor | None = None
    ) -> Tensor:
        """Losses `[L]` of all taps; 0 for a tap that repeats an earlier one.

        Raises:
            ValueError: student and teacher maps of different shapes, where the mode needs equal ones.
        """
        pairs = list(zip(student, teacher, strict=True))
        first = [
            index
            for index, (s, t) in enumerate(pairs)
            if self.count_duplicates or not any(_same(s, a) and _same(t, b) for a, b in pairs[:index])
        ]
        self._check_shapes(pairs)
        if self.mode == "l2_batched":
            losses = self._batched(pairs, first, expected_grad)
        else:
            losses = torch.stack([self._plain(*pairs[index]) for index in first])
        if len(first) == len(pairs):
            return losses
        found = dict(zip(first, losses.unbind(), strict=True))
        none = torch.zeros_like(found[0])
        return torch.stack([found.get(index, none) for index in range(len(pairs))])

    def _check_shapes(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        for index, (s, t) in enumerate(pairs):
            if self.mode != "sp" and s.shape != t.shape:
                raise ValueError(
                    f"tap {index}: student map {list(s.shape)}, teacher map {list(t.shape)}; mode {self.mode!r} needs "
                    "equal shapes, mode='sp' does not"
                )

    def _batched(
        self, pairs: Sequence[tuple[Tensor, Tensor]], first: Sequence[int], expected_grad: Tensor | None
    ) -> Tensor:
        """Losses of the taps `first`, in one launch."""
        if expected_grad is not None and len(first) < len(pairs):
            expected_grad = torch.stack([expected_grad[index] for index in first])
        students, teachers = [pairs[index][0] for index in first], [pairs[index][1] for index in first]
        return functional.unit_distance(
            students, teachers, p=2, eps=_EPS, added=True, reduction="batch", expected_grad=expected_grad
        )

    def _plain(self, student: Tensor, teacher: Tensor) -> Tensor:
        dtype = torch.promote_types(torch.float32, student.dtype)
        with torch.autocast(student.device.type, enabled=False):
            return _LOSSES[self.mode](student.to(dtype).flatten(1), teacher.to(dtype).flatten(1))

    def default_weights(self, count: int) -> list[float]:
        """The sum over the taps."""
        return [1.0] * count

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}" + (", count_duplicates=True" if self.count_duplicates else "")


def _same(a: Tensor, b: Tensor) -> bool:
    # A compiler knows no memory, only tensors.
    return a is b if torch.compiler.is_compiling() else a.is_set_to(b)


def _l2(student: Tensor, teacher: Tensor) -> Tensor:
    # The norm of no element is 0, and would make an empty batch NaN.
    unit = teacher / vector_norm(teacher) if teacher.numel() else teacher
    difference: Tensor = student / (vector_norm(student) + _EPS) - unit
    return difference.square().sum()


def _sp(student: Tensor, teacher: Tensor) -> Tensor:
    difference = _rows_to_unit(student @ student.t()) - _rows_to_unit(teacher @ teacher.t())
    return difference.square().sum() / max(len(student), 1) ** 2


def _rows_to_unit(matrix: Tensor) -> Tensor:
    unit: Tensor = matrix / (vector_norm(matrix, dim=1, keepdim=True) + _EPS)
    return unit


_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l2": _l2, "sp": _sp}
