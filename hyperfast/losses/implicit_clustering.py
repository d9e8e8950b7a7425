"""The structural term of iCD, implicit clustering distillation (arXiv 2509.12553)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from hyperfast.losses.base import Weights
from hyperfast.losses.plain import PlainFeatureLoss, as_map, cosines

if TYPE_CHECKING:
    from torch import Tensor

    Classifier = Callable[[Tensor], Tensor]


class ImplicitClustering(PlainFeatureLoss):
    r"""Cells of an image that are alike to the teacher are alike to the student, at several scales.

    A map is pooled to m x m cells for each scale m, and each cell classified: :math:`z \in R^{m^2 \times C}`. With
    :math:`A = \cos(z, z)`, the cosines between the cells of one image, and rows
    :math:`p = \mathrm{softmax}(A / \gamma)`:

    .. math::
        L = \sum_m \lambda_m \frac{1}{B} \sum_b \sum_{i \le m^2} \mathrm{KL}(p^t_{bi} \,\|\, p^s_{bi})

    Args:
        scales: m; cells per side.
        scale_weights: :math:`\lambda_m`; None: 1, 2, 3, ... divided by their sum.
        gamma: :math:`\gamma` > 0.
        student_classifier: cells `[B, P, D]` to logits `[B, P, C]`, usually the student's last linear layer; None: the
            pooled features are compared as they are. Not a part of the loss: the student's own is trained with it.
        teacher_classifier: the same of the teacher.
        weights: of the taps, see `FeatureLoss`; default 1 / L.
        beta: of the whole loss, see there.

    Shape:
        Maps `[B, D, H, W]` or tokens `[B, N, D]` (`as_map`), any floating dtype; all axes but the first may differ
        between the networks. Result: a scalar, float32 (float64 for float64 maps).

    Raises:
        ValueError: scales or weights that are no positive numbers or do not fit together; gamma that is not positive.

    Notes:
        Runs as torch operations. A row of :math:`A_s` has the gradient :math:`\lambda_m (p^s - p^t) / (B \gamma)`. One
        cell alone is always like itself: the scale 1, which the authors have, is 0, and only takes its share of the
        weights.

        iCD adds this to scale-decoupled distillation, in which each cell's logits are distilled too, twice as much
        where cell and image are classified differently; that part is not here, and no values of the authors' code are
        pinned. In the recipe (`icd`) there are no classifiers, so that features are compared instead of logits.

    Source: arXiv 2509.12553; maomaochongaa/iCD. Scale-decoupled distillation: shicaiwei123/SDD-CVPR2024.
    """

    def __init__(
        self,
        scales: Sequence[int] = (1, 2, 4),
        scale_weights: Sequence[float] | None = None,
        gamma: float = 2.0,
        student_classifier: Classifier | None = None,
        teacher_classifier: Classifier | None = None,
        weights: Weights | None = None,
        beta: float = 1.0,
    ) -> None:
        super().__init__(weights, beta)
        if not scales or any(scale < 1 for scale in scales):
            raise ValueError(f"scales is {tuple(scales)}; expected numbers of cells per side, at least 1 each")
        if scale_weights is None:
            total = len(scales) * (len(scales) + 1) / 2
            scale_weights = [(index + 1) / total for index in range(len(scales))]
        if len(scale_weights) != len(scales):
            raise ValueError(f"{len(scale_weights)} scale_weights for {len(scales)} scales: {tuple(scales)}")
        if not gamma > 0:
            raise ValueError(f"gamma is {gamma}; expected a positive number")
        self.scales, self.scale_weights, self.gamma = tuple(scales), tuple(scale_weights), float(gamma)
        # In a tuple, so that they are no modules of the loss.
        self._classifiers = (student_classifier, teacher_classifier)

    def of_pair(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one tap."""
        s, t = as_map(student), as_map(teacher)
        total = s.new_zeros(())
        for scale, weight in zip(self.scales, self.scale_weights, strict=True):
            if scale > 1:
                log_q = self._likeness(s, scale, self._classifiers[0])
                with torch.no_grad():
                    log_p = self._likeness(t, scale, self._classifiers[1])
                total = total + weight * F.kl_div(log_q, log_p, reduction="sum", log_target=True)
        return total / max(len(s), 1)

    def _likeness(self, features: Tensor, scale: int, classifier: Classifier | None) -> Tensor:
        """log p `[B, m^2, m^2]`."""
        cells = F.adaptive_avg_pool2d(features, scale).flatten(2).mT
        if classifier is not None:
            cells = classifier(cells).to(features.dtype)
        return (cosines(cells, cells) / self.gamma).log_softmax(2)

    def extra_repr(self) -> str:
        return f"scales={self.scales}, scale_weights={self.scale_weights}, gamma={self.gamma}"
