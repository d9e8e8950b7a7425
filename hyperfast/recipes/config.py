"""Settings of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from hyperfast.data import Augment


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; the defaults are those of CIFAR ResNets.

    Attributes:
        epochs: passes over the training set.
        batch_size: images per step.
        optimizer: `"sgd"` or `"adamw"`.
        lr: learning rate after warm-up.
        lr_steps: shares of the training after which the learning rate is a tenth of what it was, such as 0.625 0.75
            0.875; None: it falls to 0 along half a cosine.
        momentum: of SGD; beta_1 of AdamW is 0.9 whatever this is.
        nesterov: Nesterov momentum (SGD).
        weight_decay: L2 penalty (SGD) or decoupled decay (AdamW).
        decay_norm_and_bias: apply the decay to biases and to the parameters of normalisation layers too.
        step_factors: divide the learning rate of a hypernetwork's theta0 and head by its `step_factors()`, so that `lr`
            moves the generated weights as far as it moves those of an ordinary network.
        factored_head: update a hypernetwork's head from the factors of its gradient, without ever storing the gradient
            (`hyperfast.optim.factor_head`), wherever that can be done.
        warmup_epochs: the learning rate rises linearly over so many epochs; fractions are allowed.
        label_smoothing: share of the target spread evenly over all classes, in [0, 1).
        amp: `"none"`, or arithmetic in `"bf16"` or `"fp16"` (with loss scaling) where autocast deems it safe.
        clip_grad_norm: scale the gradient down to this L2 norm where it is longer; None: leave it.
        ema: decay of an exponential moving average of the weights, for instance 0.999; None: no average. With an
            average, it is what is validated, selected, tested and saved.
        augment: random changes to training images; `hyperfast.data.default_augment` knows what suits a set.
        seed: of the order of the images, augmentation and dropout. The model was initialised before.
        log_every: steps between two lines of metrics. The device is waited for once per line, and not in between.
        checkpoint_every: steps between two checkpoints, besides the one after each epoch; None: only that one.
        device: `"auto"` (a GPU where torch sees one), `"cpu"`, `"cuda"`, `"cuda:1"`, ...
        channels_last: store images and weights with channels innermost.
        compile: run training steps through torch.compile.
    """

    epochs: int = 40
    batch_size: int = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    lr_steps: tuple[float, ...] | None = None
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    decay_norm_and_bias: bool = False
    step_factors: bool = True
    factored_head: bool = True
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    amp: Literal["none", "bf16", "fp16"] = "none"
    clip_grad_norm: float | None = None
    ema: float | None = None
    augment: Augment = Augment()  # noqa: RUF009 - frozen
    seed: int = 0
    log_every: int = 50
    checkpoint_every: int | None = None
    device: str = "auto"
    channels_last: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "log_every"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("checkpoint_every", "clip_grad_norm"):
            value = getattr(self, name)
            _require(value is None or value > 0, name, value, "above 0, or None")
        _require(self.optimizer in ("sgd", "adamw"), "optimizer", self.optimizer, "'sgd' or 'adamw'")
        _require(self.amp in ("none", "bf16", "fp16"), "amp", self.amp, "'none', 'bf16' or 'fp16'")
        _require(self.lr > 0, "lr", self.lr, "above 0")
        steps = self.lr_steps or ()
        rising = all(a < b for a, b in zip((0, *steps), (*steps, 1), strict=True))
        _require(rising, "lr_steps", self.lr_steps, "rising shares of the training in (0, 1), or None")
        _require(0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")
        _require(self.momentum > 0 or not self.nesterov, "momentum", self.momentum, "above 0 with nesterov=True")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0")
        _require(0 <= self.warmup_epochs <= self.epochs, "warmup_epochs", self.warmup_epochs, f"in [0, {self.epochs}]")
        _require(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "in [0, 1)")
        _require(self.ema is None or 0 <= self.ema < 1, "ema", self.ema, "in [0, 1), or None")

    def torch_device(self) -> torch.device:
        """The device that `device` means on this machine.

        Raises:
            ValueError: torch does not know the device, or does not see it.
        """
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(f"device is {self.device!r}; use 'auto', 'cpu', 'cuda' or 'cuda:0'") from error
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            seen = torch.cuda.device_count()
            raise ValueError(f"device is {self.device!r}, but torch sees {seen} CUDA devices; use 'cpu' or 'auto'")
        return device


def _require(condition: bool, name: str, given: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {given!r}; expected {expected}")
