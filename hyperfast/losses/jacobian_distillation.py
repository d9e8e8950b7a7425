"""Jacobian matching (arXiv 1803.00443): how a network's answer changes with its input."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperfast.losses.attention_transfer import AttentionTransfer
from hyperfast.losses.base import FeatureLoss, Weights
from hyperfast.surgery import taps

if TYPE_CHECKING:
    from hyperfast.surgery.taps import At, TapRecord

_EPS = 1e-12  # below the gradients of an untrained network, about 1e-8
_REDUCTIONS = ("mean", "batchmean")
_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class JacobianStep(NamedTuple):
    """What a call of `JacobianDistillation` found.

    Attributes:
        loss: a scalar, to be added to the total.
        student_logits: of the images that both networks were shown, with their graph, for the other losses of the step.
        teacher_logits: the same, detached.
    """

    loss: Tensor
    student_logits: Tensor
    teacher_logits: Tensor


class JacobianDistillation(nn.Module):
    r"""The student's input gradients point where the teacher's do: what a change of the image would do to the answer.

    For a sample x, y its class, F a tapped feature map of both networks, :math:`z = \sum_c F_c^2` its attention map
    and :math:`i^*` the position where the teacher's is largest:

    .. math::
        J = \frac{\partial f_y(x)}{\partial x} \;\text{(logits)} \quad \text{or} \quad
        J_l = \frac{\partial z_{i^*}(x)}{\partial x} \;\text{(taps)}, \qquad
        L = \frac{1}{B D} \sum_b \left\| \frac{J_s}{\|J_s\|_2} - \frac{J_t}{\|J_t\|_2} \right\|_2^2

    over the D elements of an image. With `noise` no gradient of a gradient is needed: both networks see
    :math:`x + \sigma \xi`, :math:`\xi \sim N(0, 1)`, and their logits (mean squared difference) or attention maps
    (`AttentionTransfer`) are compared. To first order in :math:`\sigma` its expectation is that of the clean images
    plus :math:`\sigma^2` times the squared difference of all Jacobians, not normalised.

    Args:
        at: feature maps to match at, as `hyperfast.taps` has it, for instance `"stages"`; None: the logits.
        teacher_at: the same for a teacher with other module names; None: as `at`.
        noise: :math:`\sigma`, in units of the images as the networks see them; None: gradients themselves.
        reduction: of the gradients: `"mean"` over samples and elements, as above, or `"batchmean"`, D times that, which
            does not shrink with larger images.
        weights: of the taps, see `FeatureLoss`; default 1 / L.
        beta: of the whole loss.

    Attributes:
        last: the unweighted losses `[L]` of the last forward, detached and still on the device.
        last_names: the taps they belong to, or `["logits"]`.

    Notes:
        Invariant to the scale of either network's logits or maps, but for `noise`. Knowledge-Distillation-Zoo gives
        the form over logits the weight 20, and calls it unstable on its own. A step costs twice that of logit
        distillation, and each tap adds about four times its part of a forward; with `noise` it costs the same.

        Everything of the student gets its gradient, also a hypernetwork behind generated weights. All layers of the
        student must have a second derivative: its ReLUs have none but their masks, batch norm in train mode has. A
        student compiled by torch.compile has none at all. The teacher's parameters get no gradient; keep it in eval
        mode. Dropout gives every pass a network of its own and is refused where it is a module in train mode; a
        functional one is not seen.

    Example:
        >>> jacobian = JacobianDistillation(beta=20)
        >>> step = jacobian(student, teacher, images, labels)  # the only forward of either network
        >>> (F.cross_entropy(step.student_logits, labels) + step.loss).backward()

    Source: Srinivas and Fleuret, arXiv 1803.00443. No code of theirs is known: the form over logits is that of
    Knowledge-Distillation-Zoo (`Sobolev`), the one over maps follows the paper's text. Implementations that take the
    largest position without `create_graph` give the student no gradient.
    """

    def __init__(
        self,
        at: At | None = None,
        teacher_at: At | None = None,
        *,
        noise: float | None = None,
        reduction: str = "mean",
        weights: Weights | None = None,
        beta: float = 1.0,
    ) -> None:
        super().__init__()
        if noise is not None and not noise > 0:
            raise ValueError(f"noise is {noise}; expected a positive standard deviation, or None for gradients")
        if reduction not in _REDUCTIONS:
            raise ValueError(f"reduction is {reduction!r}; choose one of {', '.join(map(repr, _REDUCTIONS))}")
        if at is None and teacher_at is not None:
            raise ValueError(f"teacher_at is {teacher_at!r} but at is None; give both, or neither for the logits")
        self.at, self.teacher_at, self.noise, self.reduction = at, teacher_at, noise, reduction
        self.distance: FeatureLoss
        if noise is None:
            self.distance = _DirectionDistance(weights, beta, reduction)
        elif at is None:
            self.distance = _SquaredDistance(weights, beta)
        else:
            self.distance = AttentionTransfer(weights=weights, beta=beta)

    @property
    def last(self) -> Tensor | None:
        """The unweighted losses of the last forward."""
        return self.distance.last

    @property
    def last_names(self) -> list[str]:
        """What they belong to."""
        return self.distance.last_names

    def forward(
        self, student: nn.Module, teacher: nn.Module, images: Tensor, labels: Tensor | None = None
    ) -> JacobianStep:
        """Run both networks and compare them.

        Args:
            student: maps images to logits `[B, classes]`; also a `Hypernetwork`.
            teacher: the same, in eval mode.
            images: `[B, ...]`, floats; they get no gradient.
            labels: int64 `[B]`, the class whose logit is differentiated; None: the teacher's answer.

        Raises:
            RuntimeError: a network has active dropout.
            ValueError: labels, logits or maps that do not fit together; taps that match nothing or do not pair up.
        """
        for name, network in (("student", student), ("teacher", teacher)):
            _refuse_dropout(name, network)
        if self.noise is not None:
            return self._with_noise(student, teacher, images + self.noise * torch.randn_like(images))
        # The teacher's gradients need a graph in evaluation too; the student's need one of themselves to be trained.
        trained = torch.is_grad_enabled()
        with torch.enable_grad(), self._open(student, teacher) as records:
            inputs, teacher_inputs = (images.detach().requires_grad_() for _ in range(2))
            logits, teacher_logits = student(inputs), teacher(teacher_inputs)
            if self.at is None:
                names = ["logits"]
                chosen, teacher_chosen = _class_logits(logits, teacher_logits, labels)
            else:
                names, chosen, teacher_chosen = _largest_positions(*records)
            jacobians = [_gradient(c, inputs, create_graph=trained) for c in chosen]
            teacher_jacobians = [_gradient(c, teacher_inputs, create_graph=False) for c in teacher_chosen]
        with torch.set_grad_enabled(trained):
            loss = self.distance(_by_name(names, jacobians), _by_name(names, teacher_jacobians))
        return JacobianStep(loss, logits if trained else logits.detach(), teacher_logits.detach())

    def _with_noise(self, student: nn.Module, teacher: nn.Module, images: Tensor) -> JacobianStep:
        with self._open(student, teacher) as records:
            logits = student(images)
            with torch.no_grad():
                teacher_logits = teacher(images)
        if self.at is None:
            _check_logits(logits, teacher_logits)
            return JacobianStep(self.distance({"logits": logits}, {"logits": teacher_logits}), logits, teacher_logits)
        return JacobianStep(self.distance(*records), logits, teacher_logits)

    @contextlib.contextmanager
    def _open(self, student: nn.Module, teacher: nn.Module) -> Iterator[list[TapRecord]]:
        """The records of both networks' maps, where maps are compared."""
        if self.at is None:
            yield []
            return
        with taps(student, teacher, at=self.at, teacher_at=self.teacher_at, detach_teacher=False) as found:
            yield [found.student, found.teacher]

    def extra_repr(self) -> str:
        return f"at={self.at!r}, noise={self.noise}, reduction={self.reduction!r}"


class _DirectionDistance(FeatureLoss):
    """Squared difference of unit vectors, one per sample."""

    def __init__(self, weights: Weights | None, beta: float, reduction: str) -> None:
        super().__init__(weights, beta)
        self.reduction = reduction

    def per_tap(self, student: Sequence[Tensor], teacher: Sequence[Tensor], expected_grad: Tensor) -> Tensor:
        losses = []
        for s, t in zip(student, teacher, strict=True):
            difference = _unit(s) - _unit(t)
            count = difference.numel() if self.reduction == "mean" else len(difference)
            losses.append(difference.square().sum() / max(count, 1))
        return torch.stack(losses)


class _SquaredDistance(FeatureLoss):
    """Mean squared difference."""

    def per_tap(self, student: Sequence[Tensor], teacher: Sequence[Tensor], expected_grad: Tensor) -> Tensor:
        pairs = zip(student, teacher, strict=True)
        differences = [_wide(s) - _wide(t) for s, t in pairs]
        return torch.stack([d.square().sum() / max(d.numel(), 1) for d in differences])


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(torch.float32, x.dtype))


def _unit(jacobian: Tensor) -> Tensor:
    # In float16 the bound would be 0, and the squares too.
    return F.normalize(_wide(jacobian).flatten(1), eps=_EPS)


def _by_name(names: Sequence[str], jacobians: Sequence[Tensor]) -> dict[str, Tensor]:
    return dict(zip(names, jacobians, strict=True))


def _gradient(chosen: Tensor, inputs: Tensor, create_graph: bool) -> Tensor:
    """d chosen[b] / d inputs[b], all samples at once; another may follow on the same graph."""
    if not chosen.requires_grad:  # what was chosen does not depend on the images
        return torch.zeros_like(inputs)
    return torch.autograd.grad(
        chosen.sum(), inputs, create_graph=create_graph, retain_graph=True, materialize_grads=True
    )[0]


def _check_logits(logits: Tensor, teacher_logits: Tensor) -> None:
    if logits.ndim != 2 or logits.shape != teacher_logits.shape:
        raise ValueError(
            f"the student returned {list(logits.shape)} and the teacher {list(teacher_logits.shape)}; expected logits "
            "[B, classes] of the same classes, or give at= to match at feature maps"
        )


def _class_logits(logits: Tensor, teacher_logits: Tensor, labels: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
    """The logit of each sample's class, for both networks."""
    _check_logits(logits, teacher_logits)
    if labels is None:
        labels = teacher_logits.argmax(1)
    if labels.dtype != torch.int64 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"labels are {labels.dtype} {list(labels.shape)}; expected torch.int64 [{len(logits)}], or None for the "
            "teacher's answers"
        )
    return [logits.gather(1, labels[:, None])], [teacher_logits.gather(1, labels[:, None])]


def _largest_positions(student: TapRecord, teacher: TapRecord) -> tuple[list[str], list[Tensor], list[Tensor]]:
    """Attention of both networks where the teacher's is largest, for every tap."""
    names = [str(key) for key in student]
    if len(names) != len(teacher):
        raise ValueError(
            f"{len(names)} student taps but {len(teacher)} teacher taps; they are compared in pairs, in call order. "
            f"Student: {', '.join(names)}. Teacher: {', '.join(map(str, teacher))}"
        )
    chosen, teacher_chosen = [], []
    for name, s, t in zip(names, student.values(), teacher.values(), strict=True):
        if s.ndim < 3 or s.shape[2:] != t.shape[2:]:
            raise ValueError(
                f"tap {name!r}: student map {list(s.shape)}, teacher map {list(t.shape)}; expected [B, C, *spatial] "
                "with equal spatial sizes, since one position is compared"
            )
        attention, teacher_attention = (_wide(x).square().sum(1).flatten(1) for x in (s, t))
        largest = teacher_attention.argmax(1, keepdim=True)
        chosen.append(attention.gather(1, largest))
        teacher_chosen.append(teacher_attention.gather(1, largest))
    return names, chosen, teacher_chosen


def _refuse_dropout(name: str, network: nn.Module) -> None:
    active = [
        path or "itself"
        for path, module in network.named_modules()
        if isinstance(module, _DROPOUT) and module.training and module.p > 0
    ]
    if active:
        raise RuntimeError(
            f"the {name} has active dropout ({', '.join(active[:5])}{', ...' if len(active) > 5 else ''}): its input "
            "gradient would be that of another random network at every call. Call .eval() on these modules after "
            "network.train(), or set their p to 0"
        )
