"""Entropic optimal transport: its core, and the two losses over it (arXiv 2402.17110, 2012.08674)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hyperfast.losses.base import Weights
from hyperfast.losses.plain import PlainFeatureLoss, as_vectors, cosines

if TYPE_CHECKING:
    from torch import Tensor

_GRADIENTS = ("unrolled", "envelope")


def transport_cost(cost: Tensor, epsilon: float, iterations: int, gradient: str = "unrolled") -> Tensor:
    r"""What it costs to carry the rows to the columns: :math:`\langle P, W \rangle` of the plan of Sinkhorn's
    iteration.

    From :math:`P = \exp(-W / \epsilon)`, the rows and then the columns are divided by their sums, so many times. It is
    done to :math:`\log P`, where the division of rows and columns by their sums is a `log_softmax` of each.

    Args:
        cost: W `[N, M]`, float32 or float64.
        epsilon: the smaller, the sharper the plan, and the more iterations it takes.
        iterations: of rows and columns.
        gradient: `"unrolled"`, through all iterations, exact for the value that is returned; `"envelope"`, P as a
            constant, :math:`\partial L / \partial W = P`: no iteration is kept, but the entropy is left out.

    Returns:
        A scalar: the columns of P sum to 1, not to 1 / M. 0 for no rows or columns.
    """
    plan = -cost / epsilon
    if gradient == "envelope":
        plan = plan.detach()
    if cost.numel():
        for _ in range(iterations):
            plan = plan.log_softmax(1).log_softmax(0)
    return (plan.exp() * cost).sum()


class _Transport(PlainFeatureLoss):
    """What the losses over a plan have in common: its options."""

    def __init__(
        self,
        epsilon: float = 0.1,
        iterations: int = 20,
        gradient: str = "unrolled",
        weights: Weights | None = None,
        beta: float = 1.0,
    ) -> None:
        super().__init__(weights, beta)
        if not epsilon > 0:
            raise ValueError(f"epsilon is {epsilon}; expected a positive number")
        if iterations < 1:
            raise ValueError(f"iterations is {iterations}; it must be at least 1")
        if gradient not in _GRADIENTS:
            raise ValueError(f"gradient is {gradient!r}; choose one of {', '.join(map(repr, _GRADIENTS))}")
        self.epsilon, self.iterations, self.gradient = float(epsilon), iterations, gradient

    def _cost(self, cost: Tensor) -> Tensor:
        return transport_cost(cost, self.epsilon, self.iterations, self.gradient)

    def extra_repr(self) -> str:
        return f"epsilon={self.epsilon}, iterations={self.iterations}, gradient={self.gradient!r}"


class SinkhornDistillation(_Transport):
    r"""The answers of a batch, as a cloud of points, are carried to the teacher's at the least cost.

    With :math:`p = \mathrm{softmax}(z_s / T)` and :math:`q = \mathrm{softmax}(z_t / T)` of the B images:

    .. math::
        W_{ij} = \| p_i - q_j \|_1, \qquad L = \langle P, W \rangle

    and P the plan of `transport_cost`.

    Args:
        temperature: T > 0.
        epsilon: of the plan.
        iterations: of the plan.
        gradient: `"unrolled"`, as the authors' code; `"envelope"`, cheaper, and another gradient (see
            `transport_cost`).
        weights: of the taps, see `FeatureLoss`; default 1 / L.
        beta: of the whole loss, see there. The authors' is 0.0008 (T0) or 0.001 (BERT).

    Shape:
        Logits `[B, classes]` as maps, any floating dtype: `loss([student_logits], [teacher_logits])`, or taps
        `at="logits"`. Result: a scalar, float32 (float64 for float64 logits).

    Raises:
        ValueError: options out of range; (in the forward) logits of different shapes.

    Notes:
        Runs as torch operations. The loss is a sum and grows with the batch. It is meant next to cross-entropy and
        a divergence of each row. Where the authors multiply and divide kernels, logarithms are added here, which agrees
        to rounding and does not underflow. The pairing of images is no constraint: a batch in another order costs the
        same.

    Source: Cui et al., arXiv 2402.17110; 2018cx/SinKD. No values of that code are pinned.
    """

    def __init__(
        self,
        temperature: float = 2.0,
        epsilon: float = 0.1,
        iterations: int = 20,
        gradient: str = "unrolled",
        weights: Weights | None = None,
        beta: float = 1.0,
    ) -> None:
        super().__init__(epsilon, iterations, gradient, weights, beta)
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; expected a positive number")
        self.temperature = float(temperature)

    def of_pair(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one pair of logits."""
        if student.ndim != 2 or student.shape != teacher.shape:
            raise ValueError(
                f"student logits {list(student.shape)}, teacher logits {list(teacher.shape)}; expected [B, classes] "
                "for both: the same images and the same classes"
            )
        p, q = ((logits / self.temperature).softmax(1) for logits in (student, teacher))
        return self._cost(torch.cdist(p, q, p=1))

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, {super().extra_repr()}"


class LocalWasserstein(_Transport):
    r"""The pooled features of a batch are carried to the teacher's at the least cost: WCoRD's local term.

    With pooled features s and t of B images, :math:`W_{ij} = 1 - \cos(s_i, t_j)`, and P the plan of `transport_cost`:

    .. math::
        L = \frac{1}{B} \langle P, W \rangle

    Args:
        epsilon: of the plan.
        iterations: of the plan.
        gradient: `"unrolled"` or `"envelope"`, see `transport_cost`.
        weights: of the taps, see `FeatureLoss`; default 1 / L.
        beta: of the whole loss, see there.

    Shape:
        `[B, D]`, maps `[B, D, H, W]` or tokens `[B, N, D]`, which are averaged over their positions; D is the same in
        both networks, or a connector makes it so. Any floating dtype. Result: a scalar, float32 (float64 for float64).

    Raises:
        ValueError: options out of range; (in the forward) features of different widths.

    Notes:
        Runs as torch operations. The marginals are uniform, 1 / B each. The global term of WCoRD, a critic with a
        memory of other images, is not here, so that its accuracies do not apply. The formula is that of the paper;
        epsilon and iterations are those of `SinkhornDistillation`, since the authors' are not known to us. As there,
        the pairing of images is not a constraint: use it next to a loss that knows it.

    Source: Chen et al., CVPR 2021, arXiv 2012.08674.
    """

    def of_pair(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one tap."""
        s, t = as_vectors(student), as_vectors(teacher)
        if s.shape != t.shape:
            raise ValueError(
                f"student features {list(student.shape)}, teacher features {list(teacher.shape)}; pooled, they are to "
                "be of one width: bring the student's there, for instance with a linear layer"
            )
        return self._cost(1 - cosines(s, t)) / max(len(s), 1)
