"""Distillation: a student learns from labels, from a teacher's feature maps and from its logits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hyperfast import losses, surgery
from hyperfast.data import DeviceLoader, Splits
from hyperfast.recipes.checkpoint import JSON
from hyperfast.recipes.config import TrainConfig
from hyperfast.recipes.distill_config import METHODS, DistillConfig
from hyperfast.recipes.feature_term import FeatureTerm, branch_term, build_term
from hyperfast.recipes.objective import StepLosses
from hyperfast.recipes.paraphraser import pretrain_paraphrasers
from hyperfast.recipes.progress import progress_bar
from hyperfast.recipes.result import TrainResult
from hyperfast.recipes.teacher_cache import TeacherCache, check_cacheable
from hyperfast.recipes.trainer import to_device
from hyperfast.recipes.training import RunOptions, fit
from hyperfast.surgery.modes import eval_mode

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from hyperfast.surgery.taps import At

# Epochs of the loader that no training comes to, so that a paraphraser meets the images in an order of its own.
_PARAPHRASER_EPOCH = 1_000_000


class Distillation:
    """The objective of `distill`.

    Args:
        student: on the device of the run.
        teacher: likewise; a frozen copy of it is used (`surgery.freeze`).
        config: the terms and their weights.
        images: some training images, `[B, C, H, W]` with B at least 2. Both networks are shown them once: the shapes of
            their maps say which connectors there must be.
        label_smoothing: of the cross-entropy.
        seed: of the connectors, and of what else is trained along with the student.

    Attributes:
        modules: the losses, by name, with what is trained along.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        config: DistillConfig,
        images: Tensor,
        label_smoothing: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.teacher, self.config = _frozen(teacher, config), config
        betas = config.betas()
        self.settings: Mapping[str, JSON] = {"distillation": {**_plain(asdict(config)), "betas": betas}}
        self.logits = losses.CrossEntropyDistillation(
            config.cross_entropy_weight, config.kd_weight, config.temperature, label_smoothing=label_smoothing
        )
        self.jacobian: losses.JacobianDistillation | None = None
        self.modules = nn.ModuleDict()
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            for name, beta in betas.items():
                self._add(name, beta, student, images)
        self._student = student
        self._taps: list[tuple[tuple[At | None, At | None], surgery.Taps]] = []
        self._cache: TeacherCache | None = None

    def prepare(self, loader: DeviceLoader, *, resumed: bool, progress: bool) -> bool:
        """Pretrain paraphrasers, unless they come from a checkpoint; run the teacher ahead, where it is cached."""
        pretrained = self.config.paraphraser_epochs > 0 and not resumed
        if pretrained:
            self._pretrain(loader, progress)
        if self.config.cache_teacher:
            check_cacheable(loader, [*self._terms().items()])
            with torch.no_grad(), self.watch(self._student):
                self._cache = TeacherCache.of(self._ask, loader, progress)
        return pretrained

    @contextlib.contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        """Open the taps: one set for all losses that read at the same places."""
        config = self.config
        self._student = model
        with contextlib.ExitStack() as stack:
            for name in self._terms():
                at, teacher_at = points = config.points(name)
                assert at is not None
                if not any(points == known for known, _ in self._taps):
                    opened = surgery.taps(model, self.teacher, at=at, teacher_at=teacher_at, clone=config.clone_taps)
                    self._taps.append((points, stack.enter_context(opened)))
            try:
                yield
            finally:
                self._taps = []

    def __call__(
        self,
        forward: Callable[[Tensor], Tensor],
        images: Tensor,
        labels: Tensor,
        progress: float,
        *,
        indices: Tensor | None = None,
        measure: bool = False,
    ) -> StepLosses:
        """The weighted sum; `terms` holds every term that counts now, without its weight."""
        terms = {name: term for name, term in self._terms().items() if self._counts(name, progress)}
        total: Tensor | None = None
        found: dict[str, Tensor] = {}
        cached = None if self._cache is None or indices is None else self._cache.at(indices)
        if self.jacobian is not None and self._counts("jacobian", progress):
            step = self.jacobian(self._student, self.teacher, images, labels)
            total, logits, teacher_logits = step.loss, step.student_logits, step.teacher_logits
            assert self.jacobian.last is not None
            found["jacobian"] = self.jacobian.last
        else:
            logits = forward(images)
            teacher_logits = self._teacher_logits(images, needed=bool(terms)) if cached is None else cached.logits
        with_labels = progress >= self.config.labels_from and not any(METHODS[name].labels for name in terms)
        self.logits.cross_entropy_weight = self.config.cross_entropy_weight if with_labels else 0.0
        answers = self.logits(logits, labels, teacher_logits if self.config.kd_weight else None)
        total = answers if total is None else total + answers
        assert self.logits.last is not None
        found["cross_entropy"] = self.logits.last[0]
        for name, term in terms.items():
            taps = self._taps_of(name)
            teacher, statistics = (taps.teacher, None) if cached is None else (None, cached.statistics[name])
            answers = (logits, teacher_logits, labels)
            total = total + term(
                taps.student, teacher, progress, answers=answers, statistics=statistics, measure=measure
            )
            assert term.loss.last is not None
            found[name] = term.loss.last
            if isinstance(term.loss, losses.BranchLoss):
                found |= {f"{name}_{what}": value for what, value in term.loss.diagnostics().items()}
        if self.config.kd_weight:
            found["kd"] = self.logits.last[1]
        return StepLosses(total, logits, found)

    def gradient_norms(self, scale: float, step: int) -> Mapping[str, Mapping[str, float]]:
        """Of the weighted losses by the student's maps; warns of taps that contribute nothing."""
        return {name: norms for name, term in self._terms().items() if (norms := term.read_gradient_norms(scale, step))}

    def tap_names(self, term: str) -> list[str] | None:
        """The taps of a loss."""
        if term == "jacobian" and self.jacobian is not None:
            return self.jacobian.last_names
        return self._terms()[term].loss.last_names if term in self.modules else None

    def _add(self, name: str, beta: float, student: nn.Module, images: Tensor) -> None:
        config, method, term = self.config, METHODS[name], self.config.losses[name]
        at, teacher_at = config.points(name)
        if method.at is None:
            loss = method.build(**term.options, at=at, teacher_at=teacher_at, beta=beta)
            assert isinstance(loss, losses.JacobianDistillation)
            self.jacobian = loss
            return
        assert at is not None
        with surgery.taps(student, self.teacher, at=at, teacher_at=teacher_at, clone=config.clone_taps) as taps:
            logits = _show(student, self.teacher, images)
        if method.branches:
            branches = method.build(taps.student, taps.teacher, logits.shape[1], **term.options, beta=beta)
            assert isinstance(branches, losses.BranchLoss)
            made = branch_term(name, branches, taps.student, taps.teacher, config.schedule(name))
            self.modules[name] = made.to(images.device)
            return
        loss = method.build(**term.options, beta=beta)
        assert isinstance(loss, losses.FeatureLoss)
        k = config.paraphraser_k if name == "ft" and config.paraphraser_epochs else None
        built = build_term(
            name, method, loss, taps.student, taps.teacher, term.connector, config.schedule(name), k
        )
        self.modules[name] = built.to(images.device)

    def _terms(self) -> dict[str, FeatureTerm]:
        return {name: term for name, term in self.modules.items() if isinstance(term, FeatureTerm)}

    def _counts(self, name: str, progress: float) -> bool:
        start, end = self.config.losses[name].span
        return start <= progress < end or progress == end == 1

    def _taps_of(self, name: str) -> surgery.Taps:
        points = self.config.points(name)
        for known, taps in self._taps:
            if known == points:
                return taps
        raise RuntimeError("the objective must be called inside its watch() block: the taps are not open")

    @torch.no_grad()
    def _teacher_logits(self, images: Tensor, needed: bool) -> Tensor | None:
        """The teacher's forward, which fills its taps; None where nothing asks for it."""
        if not needed and not self.config.kd_weight:
            return None
        logits: Tensor = self.teacher(images)
        return logits

    def _ask(self, images: Tensor) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """The teacher's logits, and what each loss needs of its maps."""
        logits, found = self.teacher(images), {}
        for name, term in self._terms().items():
            assert isinstance(term.loss, losses.CompressedTeacherLoss)
            found[name] = term.loss.compress(term.factors(self._taps_of(name).teacher))
        return logits, found

    def _pretrain(self, loader: DeviceLoader, progress: bool) -> None:
        term = self._terms()["ft"]
        paraphrasers = [module for module in term.teacher_side if isinstance(module, losses.Paraphraser)]
        steps = max(1, round(self.config.paraphraser_epochs * len(loader)))
        epochs = -(-steps // len(loader))

        def maps() -> Iterator[list[Tensor]]:
            for epoch in range(epochs):
                for images, _ in loader.epoch(_PARAPHRASER_EPOCH + epoch):
                    with torch.no_grad():
                        self.teacher(images)
                    yield list(self._taps_of("ft").teacher.values())

        with self.watch(self._student), progress_bar(progress, steps) as show:
            pretrain_paraphrasers(paraphrasers, maps(), steps, on_step=lambda made: show(made, "paraphrasers"))


def _frozen(teacher: nn.Module, config: DistillConfig) -> nn.Module:
    """A copy that answers fast, with batch norm folded wherever no tap looks."""
    tapped: set[str] = set()
    for name in config.losses:
        at, teacher_at = config.points(name)
        if at is not None:
            tapped |= {tap.path for tap in surgery.find_taps(teacher, at if teacher_at is None else teacher_at)}
    return surgery.freeze(teacher, keep=tapped)


@torch.no_grad()
def _show(student: nn.Module, teacher: nn.Module, images: Tensor) -> Tensor:
    """A forward of both networks that leaves them as they were; the student's logits."""
    with eval_mode(student):
        logits: Tensor = student(images)
    teacher(images)
    return logits


def distill(
    student: nn.Module,
    teacher: nn.Module,
    data: Splits,
    config: TrainConfig | None = None,
    distillation: DistillConfig | None = None,
    **run: Unpack[RunOptions],
) -> TrainResult:
    """Train a student with the help of a teacher.

    Args:
        student: maps images to logits; any module, also a `Hypernetwork`. Trained in place, moved to `config.device`.
        teacher: a trained network; of another architecture too, as long as the numbers of taps agree. It is moved to
            `config.device` and not changed otherwise: what runs is a frozen copy (`surgery.freeze`).
        data: as in `train`; the images must be normalised as the teacher expects.
        config: settings of the training; default `TrainConfig()`.
        distillation: the losses and their weights; default attention transfer at the stages with weight 1000.
        run: `RunOptions`.

    Returns:
        As `train`. `metrics.jsonl` has every term without its weight, losses over taps tap by tap, and beside them the
        L2 norm of the weighted term's gradient by each of the student's maps (`at_grad_norm`), of the logged step.

    Raises:
        ValueError: as `train`; taps that match nothing or do not pair up; maps of other shapes where no connector is
            allowed or known; logits of different widths for logit distillation; a cached teacher of augmented images,
            or for losses that need more of it than can be kept.

    Warns:
        UserWarning: once, of a tap that contributes nothing to a loss.

    Example:
        >>> student = hyperfast.hypernetize(models.create("resnet20"))
        >>> distill(student, teacher, data.load("cifar10", "cifar"), folder="runs/student")
    """
    config, distillation = config or TrainConfig(), distillation or DistillConfig()
    if config.compile and "jacobian" in distillation.losses:
        raise ValueError(
            "the loss 'jacobian' takes gradients of gradients, which a compiled student has none of; set compile=False"
        )
    to_device(student, config)
    to_device(teacher, config)
    some = data.train.subset(torch.arange(min(2, len(data.train))))
    images, _ = next(iter(DeviceLoader(some, len(some), device=config.torch_device(), train=False).epoch()))
    objective = Distillation(student, teacher, distillation, images, config.label_smoothing, config.seed)
    return fit(student, objective, data, config, **run)


def _plain(value: Any) -> Any:
    """`value` in terms of JSON; what JSON has no word for, such as a predicate, by its name."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)
