"""Settings of a compression: reconstruction, rounds, guidance."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from hyperfast.data import Augment
from hyperfast.nn.row_sampler import METHODS
from hyperfast.recipes.config import TrainConfig
from hyperfast.surgery.permutation import PERMUTATIONS

RELABEL = "relabel"


@dataclass(frozen=True)
class GuideConfig:
    """The phase in which the reconstructed network answers, and a teacher is its measure.

    Attributes:
        method: `"kd"`, only the teacher's logits, from the predictor of the reconstruction on; `"joint"`, NeRN's own
            training from a fresh predictor: reconstruction, feature maps and logits at once, instead of it.
        alpha: weight of the logits. None: 0.01, joint 1e-4.
        beta: joint: weight of the feature maps, which are read before the activations.
        reconstruction_weight: joint: weight of the reconstruction loss.
        warmup: joint: first steps, in which reconstruction is all.
        epochs: passes over the training images. None: 100, joint 350.
        steps: instead of epochs; noise has no epochs and needs it.
        batch_size: images per step.
        batch_rows: kernels per step that get a gradient, drawn as in the reconstruction. None: all, joint as many as
            in the reconstruction.
        optimizer: `"ranger"` or `"adam"` (betas 0.9, 0.999).
        lr: learning rate; it falls to `min_lr` of the reconstruction along half a cosine. None: 3e-4 for kd, that of
            the reconstruction for joint. (The paper does not give that of its second phase. 1e-3 undoes much of the
            reconstruction of a ResNet-20 before it helps.)
        noise: show noise, uniform in [-1, 1], instead of images.
        image: `(C, H, W)` of the noise where there are no images to take it from.
        amp: arithmetic of the two networks: `"none"`, or `"bf16"` where autocast deems it safe.
        augment: random changes to the images.
    """

    method: Literal["kd", "joint"] = "kd"
    alpha: float | None = None
    beta: float = 1e-4
    reconstruction_weight: float = 1.0
    warmup: int = 0
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 256
    batch_rows: int | None = None
    optimizer: Literal["ranger", "adam"] = "ranger"
    lr: float | None = None
    noise: bool = False
    image: tuple[int, int, int] = (3, 32, 32)
    amp: Literal["none", "bf16"] = "none"
    augment: Augment = Augment()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        _choice("method", self.method, ("kd", "joint"))
        _choice("optimizer", self.optimizer, ("ranger", "adam"))
        _choice("amp", self.amp, ("none", "bf16"))
        for name in ("epochs", "steps", "batch_rows"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1, or None")
        for name in ("beta", "reconstruction_weight", "warmup"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        _require(self.alpha is None or self.alpha > 0, "alpha", self.alpha, "above 0, or None")
        _require(self.lr is None or self.lr > 0, "lr", self.lr, "above 0, or None")
        _require(min(self.image) >= 1, "image", self.image, "three positive numbers (C, H, W)")
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"epochs is {self.epochs} and steps is {self.steps}; give one of them")

    def resolved(self, reconstruction: CompressConfig) -> GuideConfig:
        """The same, with what was None as it is by default under these settings of the reconstruction."""
        joint = self.method == "joint"
        epochs = (350 if joint else 100) if self.epochs is None and self.steps is None else self.epochs
        lr = (reconstruction.lr if joint else 3e-4) if self.lr is None else self.lr
        rows = reconstruction.batch_rows if joint and self.batch_rows is None else self.batch_rows
        alpha = (1e-4 if joint else 0.01) if self.alpha is None else self.alpha
        return replace(self, alpha=alpha, epochs=epochs, lr=lr, batch_rows=rows)


@dataclass(frozen=True)
class CompressConfig:
    """Settings of a compression; the defaults are NeRN's for CIFAR ResNets, without its two distillation losses.

    Attributes:
        hidden: width h of the predictor; 3 h^2 + 253 h + 9 parameters with 5 layers.
        layers: linear layers of the predictor.
        kernel: side of its output; larger kernels are an error under cover="nern" and split under "all".
        cover: which weights are predicted: `"nern"`, the convolutions that NeRN takes, one kernel per row; `"all"`,
            those of every convolution, linear and attention layer, packed.
        include: globs of parameters to predict, instead of the choice of `cover`.
        exclude: globs of parameters to leave out.
        permutation: order that makes neighbours alike, stored with the predictor: `"in-filter"`, `"cross-filter"`
            (smoother, twice the bits), `"identity"` (none); or `"relabel"`, hidden channels of the network in another
            order, which computes the same and costs no bits.
        zero: kernels that are all zero, which have no cosine: `"error"`, or `"last"` in their chain.
        base: of the positional embedding.
        levels: of the positional embedding.
        fusion: of the embeddings of layer, filter and channel: `"concat"` or `"sum"`.
        activation: relu, leaky_relu, hardswish, gelu, relu6 or elu.
        skip: None, `"nerf"` or `"residual"`, see `hyperfast.nn.WeightPredictor`.
        precision: what the predictor multiplies: `"fp32"`, `"tf32"` (GPU) or `"bf16"`.
        steps: of a reconstruction. 68,600 are NeRN's 350 epochs.
        batch_rows: kernels per step, at most as many as there are.
        sampling: `RowSampler`'s method: random_weighted, uniform, epoch, all, layer or random_layer.
        uniform: share of uniform batches in random_weighted; the others are drawn by magnitude.
        rmse: the loss is the root of the mean squared error over all kernels, of which only the gradient is the
            batch's. `"full"` computes it each step, as NeRN does; `"running"` estimates it from the uniform batches,
            in a third of the time or less.
        lr: of Ranger. It falls to `min_lr` along half a cosine.
        min_lr: see there.
        rounds: reconstructions of reconstructions, each by a fresh predictor; stopped when one does not improve.
        seeds: predictors per round, of which the best is kept.
        recalibrate: batches of 256 augmented training images, over which the batch norms of a reconstructed network
            take the means and variances of what they see now; phase 2 runs with these, and keeps them. About 16 do. 0:
            those of the network, as in the papers; they are off, the more the smaller the predictor.
        select: best by accuracy on the validation images (`"val"`), on the test images as in the papers (`"test"`), or
            by reconstruction error (`"rmse"`). None: val where there are such images, else rmse.
        seed: of the first predictor; the others have those that follow.
        device: `"auto"` (a GPU where torch sees one), `"cpu"`, `"cuda"`, ...
        log_every: steps between two lines of metrics. The device is waited for once per line, and not in between.
        checkpoint_every: steps between two checkpoints; there is one at every end of a training too.
        guide: the second phase; None: reconstruction only.
    """

    hidden: int = 180
    layers: int = 5
    kernel: int = 3
    cover: Literal["nern", "all"] = "nern"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    permutation: Literal["in-filter", "cross-filter", "identity", "relabel"] = "in-filter"
    zero: Literal["error", "last"] = "error"
    base: float = 0.76
    levels: int = 40
    fusion: Literal["concat", "sum"] = "concat"
    activation: Literal["relu", "leaky_relu", "hardswish", "gelu", "relu6", "elu"] = "relu"
    skip: Literal["nerf", "residual"] | None = None
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    steps: int = 68_600
    batch_rows: int = 4096
    sampling: Literal["random_weighted", "uniform", "epoch", "all", "layer", "random_layer"] = "random_weighted"
    uniform: float = 0.8
    rmse: Literal["running", "full"] = "running"
    lr: float = 5e-3
    min_lr: float = 1e-6
    rounds: int = 1
    seeds: int = 1
    recalibrate: int = 0
    select: Literal["val", "test", "rmse"] | None = None
    seed: int = 0
    device: str = "auto"
    log_every: int = 100
    checkpoint_every: int = 5000
    guide: GuideConfig | None = None

    def __post_init__(self) -> None:
        _choice("cover", self.cover, ("nern", "all"))
        _choice("permutation", self.permutation, (*PERMUTATIONS, RELABEL))
        _choice("sampling", self.sampling, METHODS)
        _choice("rmse", self.rmse, ("running", "full"))
        _choice("select", self.select, (None, "val", "test", "rmse"))
        for name in ("hidden", "kernel", "steps", "batch_rows", "rounds", "seeds", "log_every", "checkpoint_every"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(self.layers >= 2, "layers", self.layers, "at least 2")
        _require(self.recalibrate >= 0, "recalibrate", self.recalibrate, "at least 0")
        _require(self.lr > 0, "lr", self.lr, "above 0")
        _require(0 <= self.min_lr <= self.lr, "min_lr", self.min_lr, f"in [0, {self.lr}]")
        if self.rmse == "running" and (self.sampling in ("layer", "random_layer") or self.uniform == 0):
            raise ValueError(
                f"rmse is 'running', but sampling={self.sampling!r} with uniform={self.uniform} draws no batch that "
                "stands for all kernels; use rmse='full'"
            )
        if self.guide is not None and self.guide.method == "joint":
            if self.rounds > 1 or self.seeds > 1:
                raise ValueError(
                    f"rounds is {self.rounds} and seeds is {self.seeds}, but method='joint' has no reconstruction of "
                    "its own to repeat; use method='kd', or 1 of each"
                )
            if self.recalibrate:
                raise ValueError(
                    f"recalibrate is {self.recalibrate}, but method='joint' begins with no reconstruction to take "
                    "statistics of; use method='kd', or recalibrate=0"
                )

    def torch_device(self) -> torch.device:
        """As `TrainConfig.torch_device`."""
        return TrainConfig(device=self.device).torch_device()


def _choice(name: str, given: object, choices: tuple[object, ...]) -> None:
    if given not in choices:
        raise ValueError(f"{name} is {given!r}; choose one of {', '.join(map(repr, choices))}")


def _require(condition: bool, name: str, given: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {given!r}; expected {expected}")
