"""One for all, OFA-KD (arXiv 2310.19444): distillation between architectures in the space of logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hyperfast.losses.base import BranchLoss, Features, Weights, feature_maps, tap_names
from hyperfast.losses.projectors import StageProjector

_STD = 0.02  # of the initial classifiers


def one_for_all(
    exits: Tensor, teacher_logits: Tensor, labels: Tensor, gamma: float = 1.0, temperature: float = 1.0
) -> Tensor:
    r"""The loss of OFA-KD of every exit, in one pass over all.

    With :math:`p = \mathrm{softmax}(z / \tau)` of an exit, :math:`t = \mathrm{softmax}(z_t / \tau)`, and the label y:

    .. math::
        L = -\frac{1}{B} \sum_b \sum_c w_c \log p_c, \qquad
        w_c = t_c^\gamma \; (c \ne y), \quad w_y = (1 + t_y)^\gamma - 1

    Args:
        exits: z `[E, B, C]`, any floating dtype.
        teacher_logits: :math:`z_t` `[B, C]`; no gradient flows there.
        labels: int64 `[B]`.
        gamma: how much the label counts beyond what the teacher gives it; 1: not at all, cross-entropy with the
            teacher's probabilities.
        temperature: :math:`\tau` > 0. There is no factor :math:`\tau^2`.

    Returns:
        float32 `[E]` (float64 for float64 exits).

    Notes:
        Runs as torch operations, once for all exits. The gradient by z is
        :math:`(p \sum_c w_c - w) / (B \tau)`; :math:`\sum_c w_c` is 1 for gamma = 1 only.
    """
    dtype = torch.promote_types(torch.float32, exits.dtype)
    with torch.autocast(exits.device.type, enabled=False):
        t = (teacher_logits.detach().to(dtype) / temperature).softmax(1)
        w = t.pow(gamma)
        index = labels[:, None]
        w = w.scatter(1, index, (1 + t.gather(1, index)).pow(gamma) - 1)
        log_p = (exits.to(dtype) / temperature).log_softmax(2)
        return -(w * log_p).sum((1, 2)) / max(len(t), 1)


class OneForAll(BranchLoss):
    r"""Every stage of the student, continued by a branch of its own, answers as the teacher does.

    A `StageProjector` and a linear layer behind each tap give logits; with the student's own that is one exit more than
    taps. The loss is the sum over the exits e, each as in `one_for_all`:

    .. math::
        L = \beta \sum_e \lambda_e \left( -\frac{1}{B} \sum_b \sum_c w_{bc} \log p^e_{bc} \right)

    Args:
        shapes: of the student's maps without the batch, `(C, H, W)` or tokens `(N, D)`, in the order of the stages.
        classes: C, width of the logits.
        width: D, of the projectors of maps; the authors take the larger of the widths that the two classifiers read.
        gamma: :math:`\gamma`.
        temperature: :math:`\tau`.
        weights: :math:`\lambda_e` of the exits: the names of the taps, and `"logits"` for the student's own. Default 1.
        beta: of the whole loss.

    Shape:
        `loss(student, teacher, student_logits, teacher_logits, labels)`: maps `[B, ...]`, the teacher's are not read;
        logits `[B, C]`, labels int64 `[B]`. The loss is float32 (float64 for float64 logits), also under autocast.

    Raises:
        ValueError: no stages; gamma or temperature that are not positive; maps that no projector is for; (in the
            forward) another number of maps, logits of other shapes or labels of another dtype.

    Notes:
        `loss.parameters()` are projectors and classifiers: they belong into the optimizer with the student's, and are
        of no use afterwards. gamma is 1 for CIFAR-100 in the authors' commands, 1.5 for ImageNet; weights and
        temperature are 1, and cross-entropy is added.

        Known not to match: their images are 224x224 for CIFAR as well, their batch is 128 for each of eight devices,
        and their accuracies have not been reproduced by several users (issues 6, 22, 33 and 44 of the repository). They
        take the logarithm of a softmax, which may be -inf where this is not. Labels are class indices; they reduce soft
        labels to their largest. No values of their code are pinned.

    Source: Hao et al., NeurIPS 2023, arXiv 2310.19444; Hao840/OFAKD.
    """

    def __init__(
        self,
        shapes: Sequence[Sequence[int]],
        classes: int,
        width: int,
        gamma: float = 1.0,
        temperature: float = 1.0,
        weights: Weights | None = None,
        beta: float = 1.0,
    ) -> None:
        super().__init__(weights, beta)
        if not shapes:
            raise ValueError("shapes is empty; give the shape of the student's map at one stage at least")
        for name, value in (("gamma", gamma), ("temperature", temperature)):
            if not value > 0:
                raise ValueError(f"{name} is {value}; expected a positive number")
        self.gamma, self.temperature, self.classes = float(gamma), float(temperature), classes
        last = len(shapes) - 1
        self.projectors = nn.ModuleList(StageProjector(shape, last - i, width) for i, shape in enumerate(shapes))
        self.classifiers = nn.ModuleList()
        for projector in self.projectors:
            assert isinstance(projector, StageProjector)
            classifier = nn.Linear(projector.width, classes)
            nn.init.trunc_normal_(classifier.weight, std=_STD, a=-2 * _STD, b=2 * _STD)
            nn.init.zeros_(classifier.bias)
            self.classifiers.append(classifier)

    @classmethod
    def for_maps(cls, student: Features, teacher: Features, classes: int, **options: Any) -> OneForAll:
        """The loss for maps like these; the teacher's is the vector that its classifier reads.

        The width is the larger of the channels of the student's last map and of the teacher's vector, unless it is
        among the options.
        """
        shapes = [tuple(features.shape[1:]) for features in feature_maps(student)]
        if "width" not in options:
            read = [features.shape[-1] for features in feature_maps(teacher) if features.ndim == 2]
            own = shapes[-1][0 if len(shapes[-1]) == 3 else -1]
            options["width"] = max(own, *read, 1)
        return cls(shapes, classes, **options)

    def loss_names(self, taps: list[str]) -> list[str]:
        """The exits."""
        return [*taps, "logits"]

    def default_weights(self, count: int) -> list[float]:
        """The sum over the exits."""
        return [1.0] * count

    def exits(self, student: Features) -> list[Tensor]:
        """Logits `[B, C]` of the branches."""
        maps = feature_maps(student)
        if len(maps) != len(self.projectors):
            raise ValueError(
                f"{len(maps)} student taps: {', '.join(tap_names(student))}; the loss has branches for "
                f"{len(self.projectors)}"
            )
        branches = zip(self.projectors, self.classifiers, maps, strict=True)
        return [classifier(projector(features)) for projector, classifier, features in branches]

    def forward(
        self, student: Features, teacher: Features, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor
    ) -> Tensor:
        """The weighted sum, a scalar; gradients flow to the student's maps and logits, and to the branches."""
        self._check(student_logits, teacher_logits, labels)
        exits = torch.stack([*(z.to(student_logits.dtype) for z in self.exits(student)), student_logits])
        return self._weighted(
            tap_names(student),
            student_logits,
            lambda _: one_for_all(exits, teacher_logits, labels, self.gamma, self.temperature),
        )

    def _check(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> None:
        expected = (len(labels), self.classes)
        for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
            if logits.shape != expected:
                raise ValueError(f"{name} are {list(logits.shape)}; expected [B, classes] = {list(expected)}")
        if labels.dtype != torch.int64 or labels.ndim != 1:
            raise ValueError(f"labels are {labels.dtype} {list(labels.shape)}; expected torch.int64 [B], class indices")

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, temperature={self.temperature}"
