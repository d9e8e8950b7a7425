"""Phase 1 of a compression: a predictor learns the weights themselves. No image is looked at, no network is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hyperfast.nn import RowSampler, WeightPredictor
from hyperfast.optim import Ranger
from hyperfast.recipes import checkpoint
from hyperfast.recipes.compress_config import RELABEL, CompressConfig
from hyperfast.recipes.optim import optimizer_state, restore_optimizer_state
from hyperfast.recipes.schedules import cosine_with_warmup
from hyperfast.surgery import Coverage, Permutation, find_permutation

# Draws of the sampler whose mean squared error is that of all kernels in expectation.
_UNBIASED = ("uniform", "epoch")
_DECAY = 0.9


@dataclass(frozen=True, eq=False)
class Targets:
    """What a predictor is to say at each place of the grid.

    Attributes:
        coverage: the weights that are predicted.
        permutation: their order on the grid.
        rows: float32 `[N, K]`, the kernels in that order.
        mask: float32 `[N, K]`, 0 where a row has no element; None: all 1.
    """

    coverage: Coverage
    permutation: Permutation
    rows: Tensor
    mask: Tensor | None

    @classmethod
    def of(
        cls,
        state: Mapping[str, Tensor],
        coverage: Coverage,
        config: CompressConfig,
        permutation: Permutation | None = None,
    ) -> Targets:
        """Those of a state dict, on the device of the run, in the order given or else that `config` asks for."""
        natural = coverage.gather(state).detach().float().cpu()
        if permutation is None:
            permutation = find_permutation(coverage, natural, permutation_kind(config), zero=config.zero)
        mask, device = coverage.element_weights(), config.torch_device()
        return cls(
            coverage,
            permutation,
            permutation.apply(natural).to(device),
            None if mask is None else permutation.apply(mask).to(device),
        )

    @property
    def elements(self) -> int:
        """P, covered weights."""
        return self.coverage.weights

    @torch.no_grad()
    def rmse(self, predictor: WeightPredictor) -> Tensor:
        """The root of the mean squared error over all weights, a scalar."""
        return (predictor.squared_error(self.rows, self.mask) / self.elements).sqrt()


def permutation_kind(config: CompressConfig) -> str:
    """What `find_permutation` is asked for: a relabelled network is in order already."""
    return "identity" if config.permutation == RELABEL else config.permutation


def new_predictor(coverage: Coverage, config: CompressConfig, seed: int) -> WeightPredictor:
    """A predictor for `coverage` on the device of the run; torch's global random state is left as it was."""
    grids = coverage.grids
    sizes = (len(grids), max(filters for filters, _ in grids), max(channels for _, channels in grids))
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        predictor = WeightPredictor(
            sizes,
            config.hidden,
            coverage.coordinates(),
            layers=config.layers,
            outputs=coverage.outputs,
            base=config.base,
            levels=config.levels,
            fusion=config.fusion,
            activation=config.activation,
            skip=config.skip,
            precision=config.precision,
        )
    return predictor.to(config.torch_device())


def new_sampler(targets: Targets, config: CompressConfig, batch: int, seed: int) -> RowSampler:
    """Draws `batch` kernels a step, all where there are fewer, as `config` says."""
    return RowSampler(
        targets.rows.norm(dim=1),
        min(batch, targets.coverage.rows),
        uniform=config.uniform,
        method=config.sampling,
        layers=[filters * channels for filters, channels in targets.coverage.grids],
        generator=torch.Generator().manual_seed(seed),
    )


class Reconstruction:
    r"""A predictor in training towards given kernels.

    The loss is the root of the mean squared error over the P covered weights; a batch of rows alone has a gradient, a
    row that was drawn twice two of them:

    .. math::
        L = \sqrt{\tfrac{1}{P} \sum_{all} (\hat w - w)^2}, \qquad
        \frac{dL}{d\phi} = \frac{1}{2 L P} \frac{dS_b}{d\phi}, \quad S_b = \sum_{batch} (\hat w - w)^2

    All other rows enter through the scalar L alone. With `rmse="full"` it is computed; with `"running"` it is the
    root of an exponential average of :math:`S_b N / (R P)` over the batches of R of N rows that were drawn uniformly,
    from the exact value at the start on. Batches drawn by magnitude are biased: they use it and do not enter.

    Args:
        predictor: trained in place.
        targets: on its device.
        config: the settings.
        seed: of the batches.

    Attributes:
        made: steps made.
        total: steps of the whole training.
        loss: L before the last step, on the device.

    Source: NeRN, arXiv 2212.13554 (maorash/NeRN), whose loss is `"full"`.
    """

    def __init__(self, predictor: WeightPredictor, targets: Targets, config: CompressConfig, seed: int) -> None:
        self.predictor, self.targets, self.config = predictor, targets, config
        self.made, self.total = 0, config.steps
        self.sampler = new_sampler(targets, config, config.batch_rows, seed)
        self.optimizer = Ranger(predictor.parameters(), lr=config.lr)
        self.loss = targets.rmse(predictor)
        self.running = self.loss.square()

    def step(self) -> None:
        """Draw a batch, compute its gradient, and let the optimiser step. Nothing here waits for the device."""
        drawn = self.sampler.choose()
        self.loss = self.gradient(self.sampler.draw(drawn), drawn in _UNBIASED)
        self.optimizer.param_groups[0]["lr"] = learning_rate(self.config.lr, self.config, self.made, self.total)
        self.optimizer.step()
        self.made += 1

    def gradient(self, rows: Tensor | None, unbiased: bool = False) -> Tensor:
        """Leave dL/dphi through `rows` in the parameters' `.grad`.

        Args:
            rows: int64 `[R]` with repetitions; None: all.
            unbiased: the error of `rows` estimates that of all kernels.

        Returns:
            L, detached.
        """
        error = self.predictor.squared_error(self.targets.rows, self.targets.mask, rows)
        loss = self._root_mean_square(error.detach(), rows, unbiased)
        self.optimizer.zero_grad()
        # The factor enters with the gradient of the output: the pass over the rows is over, this scales its result.
        torch.autograd.backward(error, (0.5 / self.targets.elements) / loss)
        return loss

    def read(self) -> dict[str, float]:
        """Numbers for the log; the device is waited for."""
        return {"rmse": float(self.loss), "lr": float(self.optimizer.param_groups[0]["lr"])}

    def state(self) -> dict[str, Tensor]:
        """Everything that the rest of the training depends on."""
        return {**training_state(self.predictor, self.optimizer, self.sampler, self.made), "running": self.running}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken."""
        self.made = restore_training(self.predictor, self.optimizer, self.sampler, tensors)
        self.running = tensors["running"].to(self.running.device)

    def _root_mean_square(self, error: Tensor, rows: Tensor | None, unbiased: bool) -> Tensor:
        elements = self.targets.elements
        if rows is None:
            return (error / elements).sqrt()
        if self.config.rmse == "full":
            return self.targets.rmse(self.predictor)
        if unbiased:
            share = self.targets.coverage.rows / (len(rows) * elements)
            self.running = self.running.lerp(error * share, 1 - _DECAY)
        return self.running.sqrt()


def learning_rate(lr: float, config: CompressConfig, step: int, total: int) -> float:
    """From `lr` to `config.min_lr` along half a cosine, per step."""
    return lr * cosine_with_warmup(step, total, final=min(1.0, config.min_lr / lr))


def training_state(
    predictor: nn.Module, optimizer: torch.optim.Optimizer, sampler: RowSampler | None, made: int
) -> dict[str, Tensor]:
    """A training as named tensors."""
    drawn = {} if sampler is None else sampler.state_dict()
    return {
        **checkpoint.section("predictor", predictor.state_dict()),
        **checkpoint.section("optimizer", optimizer_state(optimizer, predictor)),
        **checkpoint.section("sampler", {name: value for name, value in drawn.items() if isinstance(value, Tensor)}),
        "made": torch.tensor(made),
    }


def restore_training(
    predictor: nn.Module, optimizer: torch.optim.Optimizer, sampler: RowSampler | None, tensors: Mapping[str, Tensor]
) -> int:
    """Continue from `training_state`; returns the steps made."""

    def part(name: str) -> dict[str, Tensor]:
        return {key.removeprefix(f"{name}/"): t for key, t in tensors.items() if key.startswith(f"{name}/")}

    made = int(tensors["made"])
    predictor.load_state_dict(part("predictor"))
    restore_optimizer_state(optimizer, predictor, part("optimizer"))
    if sampler is not None:
        sampler.load_state_dict({**sampler.state_dict(), "step": made, **part("sampler")})
    return made
