"""Phase 2 of a compression: the reconstructed network answers, and a teacher's logits say how well."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hyperfast import surgery
from hyperfast.data import DeviceLoader, Splits
from hyperfast.losses import FeatureMapDistillation, LogitDistillation
from hyperfast.nn import WeightPredictor
from hyperfast.optim import Ranger
from hyperfast.recipes.compress_config import CompressConfig, GuideConfig
from hyperfast.recipes.evaluation import autocast
from hyperfast.recipes.reconstruction import Targets, learning_rate, new_sampler, restore_training, training_state


class Guidance:
    r"""A predictor in training for what the network with its weights answers.

    .. math::
        L = \alpha \, \mathrm{KD} \qquad \text{or, joint,} \qquad
        L = w \, L_{rec} + [t \ge warmup] (\alpha \, \mathrm{KD} + \beta \, \mathrm{FMD})

    KD is NeRN's stable divergence at temperature 1, FMD its squared distance of feature maps of norm 1, summed over
    the inputs of all activations, L_rec the root of the mean squared error. Norms run in eval mode. All weights are
    predicted in each step; with `batch_rows`, a batch of kernels alone has a gradient.

    Args:
        predictor: trained in place.
        targets: of the original network, in the predictor's order.
        network: the original; a copy is run with predicted weights.
        teacher: gives the logits, and under joint training the feature maps; runs frozen.
        data: training images; None under `guide.noise`.
        guide: the settings, resolved.
        config: those of the reconstruction, for rows and the floor of the learning rate.

    Attributes:
        made: steps made.
        total: steps of the whole training.

    Notes:
        NeRN's list of feature maps also has the output of each block's second norm. The shortcut is added to that
        tensor in place, so that it is the block's sum, counted twice; here it counts once.

    Source: NeRN, arXiv 2212.13554 (maorash/NeRN); decoupled training, arXiv 2407.00356.
    """

    def __init__(
        self,
        predictor: WeightPredictor,
        targets: Targets,
        network: nn.Module,
        teacher: nn.Module,
        data: Splits | None,
        guide: GuideConfig,
        config: CompressConfig,
    ) -> None:
        self.predictor, self.targets, self.guide, self.config = predictor, targets, guide, config
        self.network, self.teacher = network, surgery.freeze(teacher)
        self.inputs = _Inputs(data, guide, config)
        self.made, self.total = 0, guide.steps or (guide.epochs or 0) * self.inputs.steps_per_epoch
        self.sampler = None
        if guide.batch_rows is not None:
            self.sampler = new_sampler(targets, config, guide.batch_rows, config.seed)
        assert guide.lr is not None
        self.lr = guide.lr
        self.optimizer: torch.optim.Optimizer
        if guide.optimizer == "ranger":
            self.optimizer = Ranger(predictor.parameters(), lr=self.lr)
        else:
            self.optimizer = torch.optim.Adam(predictor.parameters(), lr=self.lr, fused=True)
        self.logits = LogitDistillation(temperature=1.0, mode="stable")
        self.maps = FeatureMapDistillation()
        self.terms: dict[str, Tensor] = {}

    def step(self) -> None:
        """One optimiser step. Nothing here waits for the device."""
        images = self.inputs.batch(self.made)
        rows = None if self.sampler is None else self.sampler()
        with torch.set_grad_enabled(rows is None):
            predicted = self.predictor()
        # The networks' backward ends at the weights; the predictor's begins there, for the rows of the batch alone.
        leaf = predicted.detach().requires_grad_()
        self._loss(leaf, images).backward()
        gradient = leaf.grad
        assert gradient is not None
        self.optimizer.zero_grad()
        if rows is None:
            predicted.backward(gradient)
        else:
            self.predictor(rows).backward(gradient[rows])
        self.optimizer.param_groups[0]["lr"] = learning_rate(self.lr, self.config, self.made, self.total)
        self.optimizer.step()
        self.made += 1

    def read(self) -> dict[str, float]:
        """Numbers for the log; the device is waited for."""
        return {name: float(term) for name, term in self.terms.items()}

    def state(self) -> dict[str, Tensor]:
        """Everything that the rest of the training depends on."""
        return training_state(self.predictor, self.optimizer, self.sampler, self.made)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken."""
        self.made = restore_training(self.predictor, self.optimizer, self.sampler, tensors)

    def _loss(self, rows: Tensor, images: Tensor) -> Tensor:
        guide, joint = self.guide, self.guide.method == "joint"
        terms: dict[str, tuple[float, Tensor]] = {}
        if joint:
            difference = rows - self.targets.rows
            if self.targets.mask is not None:
                difference = difference * self.targets.mask
            error = (difference.square().sum() / self.targets.elements).sqrt()
            terms["reconstruction"] = (guide.reconstruction_weight, error)
        if self.made >= guide.warmup or not joint:
            assert guide.alpha is not None
            weights = self.targets.coverage.scatter(self.targets.permutation.invert(rows))
            with self._tapped(joint and guide.beta > 0) as taps, autocast(rows.device, guide.amp):
                with torch.no_grad():
                    wanted = self.teacher(images)
                answered = functional_call(self.network, weights, (images,))
                terms["kd"] = (guide.alpha, self.logits(answered, wanted))
                if taps is not None:
                    terms["fmd"] = (guide.beta, self.maps(taps.student, taps.teacher))
        total: Tensor = sum((weight * term for weight, term in terms.values()), rows.new_zeros(()))
        self.terms = {"loss": total.detach(), **{name: term.detach() for name, (_, term) in terms.items()}}
        return total

    def _tapped(self, wanted: bool) -> contextlib.AbstractContextManager[Any]:
        if not wanted:
            return contextlib.nullcontext()
        return surgery.taps(self.network, self.teacher, at="activations")


def check_guide(guide: GuideConfig, network: nn.Module, teacher: nn.Module, data: Splits | None) -> None:
    """Raise a ValueError unless there is something to show both networks, and both give as many logits."""
    if data is None and not guide.noise:
        raise ValueError("phase 2 shows images to the networks, but there is no data; give data, or noise=True")
    if guide.noise and guide.steps is None:
        raise ValueError("noise has no epochs; give steps")
    size = guide.image if data is None else data.train.images.shape[1:]
    device = next(network.parameters()).device
    images = torch.zeros(1, *size, device=device)
    with torch.no_grad():
        wanted, answered = surgery.freeze(teacher)(images), network(images)
    if wanted.shape != answered.shape:
        raise ValueError(
            f"the teacher gives {wanted.shape[-1]} logits and the network {answered.shape[-1]}; their classes must be "
            "the same ones"
        )


class _Inputs:
    """The images, or noise, of each step; a function of the step alone, so that a run can be resumed."""

    def __init__(self, data: Splits | None, guide: GuideConfig, config: CompressConfig) -> None:
        self._seed, self._device = config.seed, config.torch_device()
        self._epoch: tuple[int, Iterator[tuple[Tensor, Tensor]]] | None = None
        self._shape = (guide.batch_size, *(guide.image if data is None else data.train.images.shape[1:]))
        # As the frozen teacher's weights are, and what a CPU convolves fastest.
        self._channels_last = self._device.type == "cpu" and len(self._shape) == 4
        self._loader = None
        if not guide.noise:
            assert data is not None
            self._loader = DeviceLoader(
                data.train,
                min(guide.batch_size, len(data.train)),
                device=self._device,
                train=True,
                augment=guide.augment,
                seed=config.seed,
                channels_last=self._channels_last,
            )
        self._next = 0

    @property
    def steps_per_epoch(self) -> int:
        return 0 if self._loader is None else len(self._loader)

    def batch(self, step: int) -> Tensor:
        if self._loader is None:
            generator = torch.Generator(self._device).manual_seed((self._seed + 1) * 1_000_003 + step)
            noise = torch.rand(self._shape, generator=generator, device=self._device)
            noise = noise.mul_(2).sub_(1)
            return noise.contiguous(memory_format=torch.channels_last) if self._channels_last else noise
        epoch, position = divmod(step, len(self._loader))
        if self._epoch is None or self._epoch[0] != epoch or step != self._next:
            self._epoch = epoch, self._loader.epoch(epoch, position)
        self._next = step + 1
        return next(self._epoch[1])[0]
