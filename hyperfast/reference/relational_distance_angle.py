"""Relational knowledge distillation (arXiv 1904.05068): distances and angles between the samples of a batch.

Both follow from the Gram matrix of the samples, so that no tensor of B x B x D is made. The samples are centred first,
which changes neither: with a large common mean the differences of the Gram matrix's elements would cancel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperfast.reference.gram import gram

NEAREST = 1e-12
"""Smaller squared distances are taken as this, without gradient."""
NEAREST_OF_ANGLES = 1e-24
"""An arm of a smaller squared length has no direction: its angles have cosine 0, without gradient."""
NOISE = 8
"""Squared distances of so many units in the last place of ||x_i||^2 + ||x_j||^2 are those of equal samples."""


def relational_statistics(features: Sequence[Tensor]) -> Tensor:
    """Gram matrices `[L, B, B]` of the centred samples of every map."""
    return torch.stack([gram(f, centred=True) for f in features])


@dataclass(frozen=True)
class _Samples:
    """What is known of one network's samples at one tap.

    Attributes:
        gram: G, centred, `[B, B]`.
        distance: d, 0 on the diagonal.
        moves: whether d follows the samples: not on the diagonal, and not below `NEAREST`.
        inverse: 1 / d as angles see it, 0 for samples without a direction between them.
    """

    gram: Tensor
    distance: Tensor
    moves: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, g: Tensor) -> _Samples:
        diagonal = g.diagonal()
        total = diagonal[:, None] + diagonal[None, :]
        squared = total - 2 * g
        noise = (NOISE * torch.finfo(g.dtype).eps * total).detach()
        own = torch.eye(len(g), dtype=torch.bool, device=g.device)
        near, without = (
            (squared.detach() <= least) | (squared.detach() <= noise) for least in (NEAREST, NEAREST_OF_ANGLES)
        )
        distance = torch.where(near, NEAREST, squared).sqrt().masked_fill(own, 0)
        inverse = torch.where(without | own, 1, squared).rsqrt().masked_fill(without | own, 0)
        return cls(g, distance, ~(near | own), inverse)

    @property
    def mean(self) -> Tensor:
        """Mean of the distances that are not a sample's to itself."""
        count = len(self.gram)
        return self.distance.sum() / (count * (count - 1))

    def cosines(self, vertex: int) -> Tensor:
        """psi `[B, B]`: cosines between the arms from the vertex to two samples."""
        g, arm = self.gram, self.inverse[vertex]
        corner = g[vertex, vertex] - g[vertex]
        return (g - g[vertex][:, None] + corner[None, :]) * (arm[:, None] * arm[None, :])


def relational_distance_angle(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    statistics: Tensor | None,
    distance: float,
    angle: float,
) -> Tensor:
    """Losses `[L]` of all taps: distance L_D + angle L_A.

    `statistics` are the teacher's centred Gram matrices, in place of its maps.
    """
    losses = []
    for s, gram_t in zip(student, _teacher(teacher, statistics), strict=True):
        own, other = _Samples.of(gram(s, centred=True)), _Samples.of(gram_t)
        count = len(own.gram)
        loss = distance * _huber(own.distance / own.mean, other.distance / other.mean) / count**2
        if angle:
            angles = [_huber(own.cosines(j), other.cosines(j)) for j in range(count)]
            loss = loss + angle * torch.stack(angles).sum() / count**3
        losses.append(loss)
    return torch.stack(losses)


def relational_distance_angle_forward(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    statistics: Tensor | None,
    distance: float,
    angle: float,
) -> tuple[Tensor, Tensor]:
    """Losses `[L]` and, for the backward pass, M = dL/dG `[L, B, B]`, symmetric, with rows that sum to 0."""
    losses, coefficients = [], []
    for s, gram_t in zip(student, _teacher(teacher, statistics), strict=True):
        own, other = _Samples.of(gram(s, centred=True)), _Samples.of(gram_t)
        count = len(own.gram)
        loss, m = _of_distances(own, other)
        loss, m = distance * loss / count**2, distance * m / count**2
        if angle:
            of_angles, m_of_angles = _of_angles(own, other)
            loss, m = loss + angle * of_angles / count**3, m + angle * m_of_angles / count**3
        # All distances and angles stay when the batch is moved as a whole.
        m = m.fill_diagonal_(0)
        losses.append(loss)
        coefficients.append(m - m.sum(1).diag())
    return torch.stack(losses), torch.stack(coefficients)


def _of_distances(own: _Samples, other: _Samples) -> tuple[Tensor, Tensor]:
    """Sum of the Huber losses, and M off its diagonal.

    With delta = clamp(d_s / mu_s - d_t / mu_t, -1, 1): M_ij = -(delta_ij - sum(delta d) / (mu B (B - 1))) / (mu d_ij).
    The second term is the way through the mean.
    """
    d, mean, count = own.distance, own.mean, len(own.gram)
    delta = (d / mean - other.distance / other.mean).clamp(-1, 1)
    through_mean = (delta * d).sum() / (mean * count * (count - 1))
    m = torch.where(own.moves, -(delta - through_mean) / (mean * torch.where(own.moves, d, 1)), 0)
    return _huber(d / mean, other.distance / other.mean), m


def _of_angles(own: _Samples, other: _Samples) -> tuple[Tensor, Tensor]:
    """Sum of the Huber losses, and M off its diagonal.

    With delta = clamp(psi_s - psi_t, -1, 1) at the vertex j and P_j(i, k) = delta / (d_ij d_kj), R_ij = sum_k P_j(i, k)
    and T_ij = sum_k delta psi_s: M_ik = sum_j P_j(i, k) - R_ik - R_ki + (T_ik + T_ki) / d_ik^2.
    """
    count = len(own.gram)
    loss, m = own.gram.new_zeros(()), torch.zeros_like(own.gram)
    arms, lengths = torch.empty_like(m), torch.empty_like(m)
    for j in range(count):
        psi, psi_t = own.cosines(j), other.cosines(j)
        delta = (psi - psi_t).clamp(-1, 1)
        pairs = delta * (own.inverse[j][:, None] * own.inverse[j][None, :])
        m += pairs
        arms[:, j] = pairs.sum(1)
        lengths[:, j] = (delta * psi).sum(1)
        loss += _huber(psi, psi_t)
    m += (lengths + lengths.t()) * own.inverse.square() - arms - arms.t()
    return loss, m


def _huber(a: Tensor, b: Tensor) -> Tensor:
    return F.smooth_l1_loss(a, b, reduction="sum")


def _teacher(teacher: Sequence[Tensor], statistics: Tensor | None) -> list[Tensor]:
    if statistics is not None:
        return list(statistics.detach())
    return [gram(t.detach(), centred=True) for t in teacher]
