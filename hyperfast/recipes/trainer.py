"""The training loop, whatever is minimised."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hyperfast.data import DeviceLoader, ImageSet, Splits
from hyperfast.optim import clip_grad_norm_, total_grad_norm
from hyperfast.recipes import checkpoint
from hyperfast.recipes.config import TrainConfig
from hyperfast.recipes.cost import Stopwatch, peak_memory, reset_peak_memory
from hyperfast.recipes.ema import AveragedWeights
from hyperfast.recipes.evaluation import Evaluation, autocast, evaluate
from hyperfast.recipes.interrupt import deferred_interrupt
from hyperfast.recipes.meter import Meter
from hyperfast.recipes.metrics import MetricsWriter
from hyperfast.recipes.objective import Objective
from hyperfast.recipes.optim import (
    base_lrs,
    build_optimizer,
    check_all_trained,
    optimizer_state,
    restore_optimizer_state,
    set_lr,
    trainable,
)
from hyperfast.recipes.progress import Update, progress_bar
from hyperfast.recipes.result import EpochRecord, TrainResult
from hyperfast.recipes.schedules import cosine_with_warmup, steps_with_warmup

CHECKPOINT = "checkpoint.safetensors"
BEST, LAST = "best.safetensors", "last.safetensors"

# A run may be resumed with other values of these: they do not change what it computes.
_FREE_SETTINGS = ("checkpoint_every", "device", "compile")


@dataclass
class _State:
    """Where a run stands; JSON in the checkpoint.

    Attributes:
        epoch: finished epochs.
        batch: steps made in the current one.
        step: steps made in all.
        sums: of the train metrics of the current epoch, over the steps that were already logged.
        history: the finished epochs.
        best_epoch: the one whose weights are kept; 0 before the first.
        lap_ms: milliseconds per step of each logged interval.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=lambda: {"loss": 0.0, "accuracy": 0.0})
    history: list[EpochRecord] = field(default_factory=list)
    best_epoch: int = 0
    lap_ms: list[float] = field(default_factory=list)

    @classmethod
    def from_json(cls, values: Any) -> _State:
        return cls(**{**values, "history": [EpochRecord(**record) for record in values["history"]]})


class Trainer:
    """One run: the model, what it is trained with, and where it stands.

    Args:
        model: maps images to logits; moved to `config.device`.
        objective: what is minimised.
        data: the images; an empty `val` or `test` is left out.
        config: settings.
        folder: where checkpoints, weights and metrics go; None: nowhere.
        on_step: called after each step with the number of steps made.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        data: Splits,
        config: TrainConfig,
        folder: Path | None = None,
        on_step: Callable[[int], object] | None = None,
    ) -> None:
        self.model, self.objective, self.config = model, objective, config
        self.folder, self.on_step = folder, on_step
        self.device = config.torch_device()
        self.train_loader = self._loader(data.train, train=True)
        self.val_loader = self._loader(data.val) if len(data.val) else None
        self.test_loader = self._loader(data.test) if len(data.test) else None
        self.classes = len(data.train.classes)
        # One container, so that the model's parameters and the objective's have distinct names.
        self.trained = nn.ModuleDict({"model": model, "objective": objective.modules})
        to_device(self.trained, config)
        self.optimizer = build_optimizer(self.trained, config)
        self.parameters = list(trainable(self.trained).values())
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        self.average = None if config.ema is None else AveragedWeights(model, config.ema)
        self.forward: Callable[[Tensor], Tensor] = torch.compile(model) if config.compile else model
        self.total_steps = config.epochs * len(self.train_loader)
        self.warmup_steps = round(config.warmup_epochs * len(self.train_loader))
        self.state = _State()
        self.best: dict[str, Tensor] = {}
        self.meter = Meter()
        self.grad_norm: Tensor | None = None
        self.stopwatch = Stopwatch(self.device)
        self.metrics: MetricsWriter | None = None
        self._metrics_position = 0

    @property
    def evaluated(self) -> nn.Module:
        """The model that is validated, selected, tested and saved: the average where there is one."""
        return self.model if self.average is None else self.average.module

    def prepare(self, *, resumed: bool, progress: bool = False) -> None:
        """Let the objective learn and compute ahead what it has to; what it learned is saved at once."""
        self.trained.train()
        if self.objective.prepare(self.train_loader, resumed=resumed, progress=progress):
            self.save()
        check_all_trained(self.optimizer, self.trained)

    def run(self, progress: bool = False, tensorboard: bool = False) -> TrainResult:
        """Train from where the run stands to its end."""
        with ExitStack() as stack:
            if self.folder is not None:
                position, step = self._metrics_position, self.state.step
                writer = MetricsWriter(self.folder, position=position, step=step, tensorboard=tensorboard)
                self.metrics = stack.enter_context(writer)
            show = stack.enter_context(progress_bar(progress, self.total_steps))
            stack.enter_context(self.objective.watch(self.model))
            reset_peak_memory(self.device)
            self.stopwatch = Stopwatch(self.device)
            with deferred_interrupt() as interrupted:
                while self.state.epoch < self.config.epochs:
                    self._train_epoch(show, interrupted)
                    with self.stopwatch.paused():
                        self._finish_epoch()
                        self._stop_if(interrupted)
            return self._result()

    def _train_epoch(self, show: Update, interrupted: Callable[[], bool]) -> None:
        state, config = self.state, self.config
        self.trained.train()
        for images, labels in self.train_loader.epoch(state.epoch, state.batch):
            step = state.step + 1
            logged = step % config.log_every == 0 or state.batch + 1 == len(self.train_loader)
            self._step(images, labels, self.train_loader.indices(state.epoch, state.batch), logged)
            state.step, state.batch = step, state.batch + 1
            if logged:
                self._log()
            show(step, self._headline())
            if self.on_step is not None:
                self.on_step(step)
            if interrupted():
                self.save()
                self._stop_if(interrupted)
            if config.checkpoint_every is not None and step % config.checkpoint_every == 0:
                with self.stopwatch.paused():
                    self.save()

    def _step(self, images: Tensor, labels: Tensor, indices: Tensor, logged: bool) -> None:
        """One optimiser step. Nothing here waits for the device (but fp16's loss scaling may)."""
        set_lr(self.optimizer, self._lr_factor(self.state.step))
        with autocast(self.device, self.config.amp):
            progress = self.state.step / max(1, self.total_steps - 1)
            losses = self.objective(self._logits, images, labels, progress, indices=indices, measure=logged)
        torch.autograd.backward(self.scaler.scale(losses.total))
        self.scaler.unscale_(self.optimizer)
        self._clip(logged)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.model)
        accuracy = (losses.logits.detach().argmax(1) == labels).float().mean()
        self.meter.add({"loss": losses.total, "accuracy": accuracy, **losses.terms})
        self.stopwatch.tick()

    def _logits(self, images: Tensor) -> Tensor:
        logits = self.forward(images)
        if logits.ndim != 2 or logits.shape[1] < self.classes:
            raise ValueError(
                f"the model returned {list(logits.shape)}; expected logits [{len(images)}, {self.classes}] or wider, "
                f"for the {self.classes} classes of the data"
            )
        return logits

    def _clip(self, logged: bool) -> None:
        """Clip the gradient, and keep its L2 norm from before where it will be logged."""
        if self.config.clip_grad_norm is not None:
            self.grad_norm = clip_grad_norm_(self.trained, self.config.clip_grad_norm)
        elif logged:
            self.grad_norm = total_grad_norm(self.trained)

    def _lr_factor(self, step: int) -> float:
        if self.config.lr_steps is not None:
            return steps_with_warmup(step, self.total_steps, self.warmup_steps, self.config.lr_steps)
        return cosine_with_warmup(step, self.total_steps, self.warmup_steps)

    def _log(self) -> None:
        """Read the means of the interval (the device is waited for here) and write a line."""
        state, steps, means = self.state, self.meter.steps.get("loss", 0), self.meter.read()
        self._require_finite("loss", math.isfinite(means["loss"][0]))
        for name in state.sums:
            state.sums[name] += means[name][0] * steps
        lap = self.stopwatch.lap()
        if lap is not None:
            state.lap_ms.append(lap)
        if self.metrics is not None:
            terms = {name: self._named(name, numbers) for name, numbers in means.items()}
            line = {
                "epoch": state.epoch + 1,
                "lr": self.config.lr * self._lr_factor(state.step - 1),
                "grad_norm": None if self.grad_norm is None else float(self.grad_norm),
                "ms_per_step": lap,
                **terms,
                **{f"{name}_grad_norm": norms for name, norms in self._gradient_norms().items()},
            }
            self.metrics.write("train", state.step, line)

    def _gradient_norms(self) -> Mapping[str, Mapping[str, float]]:
        scale = self.scaler.get_scale() if self.scaler.is_enabled() else 1.0
        return self.objective.gradient_norms(scale, self.state.step)

    def _named(self, term: str, numbers: list[float]) -> Any:
        names = self.objective.tap_names(term)
        return numbers[0] if names is None else dict(zip(names, numbers, strict=True))

    def _require_finite_weights(self) -> None:
        """What is not finite must not replace the weights that were saved before."""
        norm = nn.utils.get_total_norm([parameter.detach() for parameter in self.parameters])
        self._require_finite("norm of the weights", math.isfinite(norm))

    def _require_finite(self, what: str, finite: bool) -> None:
        if not finite:
            kept = f" {self.folder / CHECKPOINT}, if there is one, is from before." if self.folder else ""
            raise FloatingPointError(
                f"the {what} is not finite any more after step {self.state.step}. A lower lr, warmup_epochs or "
                f"clip_grad_norm may help; where amp is 'fp16', so may 'bf16'.{kept}"
            )

    def _finish_epoch(self) -> None:
        """Validate, remember the best weights, write the epoch's line and a checkpoint."""
        state = self.state
        self._require_finite_weights()
        measured = self._evaluate(self.val_loader)
        record = EpochRecord(
            epoch=state.epoch + 1,
            train_loss=state.sums["loss"] / state.batch,
            train_accuracy=state.sums["accuracy"] / state.batch,
            val_loss=None if measured is None else measured.loss,
            val_accuracy=None if measured is None else measured.accuracy,
        )
        best = self._is_best(record)
        if best:
            state.best_epoch, self.best = record.epoch, self._weights()
        state.history.append(record)
        state.epoch, state.batch, state.sums = state.epoch + 1, 0, _State().sums
        if self.metrics is not None:
            self.metrics.write("epoch", state.step, asdict(record))
        self.save()
        if best:
            self._save_weights(BEST, self.best)

    def _is_best(self, record: EpochRecord) -> bool:
        best = self.state.history[self.state.best_epoch - 1].val_accuracy if self.state.best_epoch else None
        return record.val_accuracy is None or best is None or record.val_accuracy > best

    def _evaluate(self, loader: DeviceLoader | None) -> Evaluation | None:
        return None if loader is None else evaluate(self.evaluated, loader.epoch(), self.device, self.config.amp)

    def _result(self) -> TrainResult:
        memory = peak_memory(self.device)
        last = self._evaluate(self.test_loader)
        best = last if self.state.best_epoch == self.state.epoch else self._evaluate_best()
        # The best ones again: the run may have been killed after the checkpoint of that epoch, before they were saved.
        self._save_weights(BEST, self.best)
        self._save_weights(LAST, self.evaluated.state_dict())
        result = TrainResult(
            history=tuple(self.state.history),
            best_epoch=self.state.best_epoch,
            test_accuracy_best=None if best is None else best.accuracy,
            test_accuracy_last=None if last is None else last.accuracy,
            steps=self.state.step,
            lap_ms=tuple(self.state.lap_ms),
            peak_memory=memory,
            best_weights=self.best,
        )
        if self.metrics is not None:
            self.metrics.write("result", self.state.step, result.numbers())
        return result

    def _evaluate_best(self) -> Evaluation | None:
        """The test accuracy of the best weights; the last ones are put back."""
        last = self._weights()
        self.evaluated.load_state_dict(self.best)
        try:
            return self._evaluate(self.test_loader)
        finally:
            self.evaluated.load_state_dict(last)

    def _weights(self) -> dict[str, Tensor]:
        """A copy on the CPU."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.evaluated.state_dict().items()}

    def _save_weights(self, name: str, weights: dict[str, Tensor]) -> None:
        if self.folder is not None:
            epoch = self.state.best_epoch if name == BEST else self.state.epoch
            checkpoint.save(self.folder / name, weights, {"kind": "weights", "epoch": epoch})

    def _headline(self) -> str:
        epoch = f"epoch {self.state.epoch + 1}/{self.config.epochs}"
        accuracy = self.state.history[-1].val_accuracy if self.state.history else None
        return epoch if accuracy is None else f"{epoch}, validation {accuracy:.2%}"

    def _stop_if(self, interrupted: Callable[[], bool]) -> None:
        if interrupted():
            where = "" if self.folder is None else f"; resume from {self.folder / CHECKPOINT}"
            raise KeyboardInterrupt(f"stopped after step {self.state.step}{where}")

    def save(self) -> None:
        """Write the checkpoint: everything that the rest of the run depends on."""
        if self.folder is None:
            return
        self._require_finite_weights()
        tensors = {
            **checkpoint.section("model", self.model.state_dict()),
            **checkpoint.section("objective", self.objective.modules.state_dict()),
            **checkpoint.section("optimizer", optimizer_state(self.optimizer, self.trained)),
            **checkpoint.section("average", {} if self.average is None else self.average.state_dict()),
            **checkpoint.section("best", self.best),
            **checkpoint.section("meter", self.meter.state()),
            **checkpoint.section("rng", checkpoint.rng_state(self.device)),
        }
        metadata: dict[str, Any] = {
            "kind": "training",
            "settings": self._settings(),
            "state": asdict(self.state),
            "meter_steps": self.meter.steps,
            "scaler": self.scaler.state_dict(),
            "base_lrs": base_lrs(self.optimizer, self.trained),
            "metrics_position": 0 if self.metrics is None else self.metrics.position(),
        }
        checkpoint.save(self.folder / CHECKPOINT, tensors, metadata)

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Continue where `saved` was written.

        Raises:
            ValueError: it is of another model, other data or other settings.
        """
        metadata: Any = saved.metadata
        if metadata.get("kind") != "training":
            raise ValueError(f"{saved.path} holds weights, not the state of a run; it cannot be resumed")
        checkpoint.load_module(self.model, saved.section("model"), str(saved.path))
        checkpoint.load_module(self.objective.modules, saved.section("objective"), str(saved.path))
        self._check_settings(saved.path, metadata["settings"])
        self.optimizer = build_optimizer(self.trained, self.config, metadata["base_lrs"])
        restore_optimizer_state(self.optimizer, self.trained, saved.section("optimizer"))
        if self.average is not None:
            checkpoint.load_module(self.average, saved.section("average"), str(saved.path))
        self.best = saved.section("best")
        self.state = _State.from_json(metadata["state"])
        self.meter.restore(saved.section("meter"), metadata["meter_steps"], self.device)
        self.scaler.load_state_dict(metadata["scaler"])
        self._metrics_position = metadata["metrics_position"]
        checkpoint.restore_rng_state(saved.section("rng"), self.device)

    def _settings(self) -> dict[str, Any]:
        config = {key: value for key, value in asdict(self.config).items() if key not in _FREE_SETTINGS}
        return {**config, **self.objective.settings, "train_images": len(self.train_loader.image_set)}

    def _check_settings(self, path: Path, before: dict[str, Any]) -> None:
        """Resuming under other settings would be neither the old run nor a new one."""
        now: Any = checkpoint.as_json(self._settings())
        changed = [
            f"{key} was {before.get(key)!r} and is now {now.get(key)!r}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        if changed:
            raise ValueError(
                f"{path} was written under other settings: {'; '.join(changed)}. "
                "Resume with the same ones, or start a new run in another folder."
            )

    def _loader(self, images: ImageSet, train: bool = False) -> DeviceLoader:
        config = self.config
        return DeviceLoader(
            images,
            config.batch_size,
            device=self.device,
            train=train,
            augment=config.augment,
            seed=config.seed,
            channels_last=config.channels_last,
        )


def to_device(module: nn.Module, config: TrainConfig) -> None:
    """Move a module to the device of a run, its convolution weights channels-last where that is wanted."""
    module.to(config.torch_device())
    if config.channels_last:
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
