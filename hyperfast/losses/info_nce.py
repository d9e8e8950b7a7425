"""InfoNCE between the pooled features of two networks (arXiv 1807.03748)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from hyperfast.losses.base import Weights
from hyperfast.losses.plain import PlainFeatureLoss, as_vectors, cosines

if TYPE_CHECKING:
    from torch import Tensor


class InfoNCE(PlainFeatureLoss):
    r"""The student's answer to an image is nearer to the teacher's for that image than to those for the others.

    With pooled features s and t of the B images of a batch and :math:`c_{ij} = \cos(s_i, t_j)`:

    .. math::
        L = -\frac{1}{B} \sum_i \log \frac{\exp(c_{ii} / \tau)}{\sum_j \exp(c_{ij} / \tau)}

    Args:
        temperature: :math:`\tau` > 0, or where it starts.
        learnable: train :math:`\log 1 / \tau` along, as one parameter of the loss for all taps, which belongs into the
            optimizer.
        weights: of the taps, see `FeatureLoss`; default 1 / L.
        beta: of the whole loss, see there.

    Shape:
        `[B, D]`, maps `[B, D, H, W]` or tokens `[B, N, D]`, which are averaged over their positions; D is the same in
        both networks, or a connector makes it so. Any floating dtype. Result: a scalar, float32 (float64 for float64).

    Raises:
        ValueError: a temperature that is not positive; (in the forward) features of different widths.

    Notes:
        Runs as torch operations. With P the softmax of each row of :math:`c / \tau`, the gradient by c is
        :math:`(P - I) / (B \tau)`. Zero for a batch of one: without other images there is nothing to tell apart. Who is
        in the batch matters, as for `SimilarityPreserving`.

        Fuse Before Transfer adds it, with a learnable temperature, between each two of student, assistant and teacher.
        Here it is between student and teacher: the assistant, a network of parts of both, is no loss. Its initial
        temperature and its weight are not known to us: 0.07 and 1 are the usual ones of contrastive learning.

    Source: van den Oord et al., arXiv 1807.03748; its use in distillation: Fuse Before Transfer, arXiv 2410.12342.
    """

    def __init__(
        self, temperature: float = 0.07, learnable: bool = True, weights: Weights | None = None, beta: float = 1.0
    ) -> None:
        super().__init__(weights, beta)
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; expected a positive number")
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)), requires_grad=learnable)

    @property
    def temperature(self) -> float:
        """What it is now; reading it waits for the device."""
        return math.exp(-float(self.log_scale.detach()))

    def of_pair(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one tap."""
        s, t = as_vectors(student), as_vectors(teacher)
        if s.shape != t.shape:
            raise ValueError(
                f"student features {list(student.shape)}, teacher features {list(teacher.shape)}; pooled, they are to "
                "be of one width: bring the student's there, for instance with a linear layer"
            )
        chances = (cosines(s, t) * self.log_scale.to(s.dtype).exp()).log_softmax(1)
        return -chances.diagonal().sum() / max(len(s), 1)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:.3g}, learnable={self.log_scale.requires_grad}"
