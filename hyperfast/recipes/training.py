"""Training: `train` with cross-entropy alone, `fit` under any objective."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import nn

from hyperfast.data import Splits
from hyperfast.recipes import checkpoint
from hyperfast.recipes.config import TrainConfig
from hyperfast.recipes.objective import CrossEntropy, Objective
from hyperfast.recipes.result import TrainResult
from hyperfast.recipes.trainer import BEST, CHECKPOINT, LAST, Trainer

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger(__name__)


class RunOptions(TypedDict, total=False):
    """Keyword arguments of `train`, `distill` and `fit` about the run and not about what it computes.

    Attributes:
        folder: where to write `checkpoint.safetensors` (to resume), `best.safetensors` and `last.safetensors` (weights
            under the model's own names) and `metrics.jsonl`. Default None: nothing is written.
        resume: continue from the checkpoint in `folder`; where there is none yet, start. Default False.
        progress: show a progress bar on the terminal. Default False.
        tensorboard: also write TensorBoard events to `folder/tensorboard`. Default False.
        on_step: called after each optimiser step with the number of steps made.
    """

    folder: str | os.PathLike[str] | None
    resume: bool
    progress: bool
    tensorboard: bool
    on_step: Callable[[int], object] | None


def train(model: nn.Module, data: Splits, config: TrainConfig | None = None, **run: Unpack[RunOptions]) -> TrainResult:
    """Train a classifier with cross-entropy.

    Args:
        model: maps images `[B, C, H, W]` to logits `[B, classes]`; a `Hypernetwork` will do. It is trained in place and
            moved to `config.device`; afterwards it holds the weights of the last step.
        data: images. Validation selects the best epoch; the test set is measured once, after training, with the best
            and with the last weights. Either may be empty.
        config: settings; default `TrainConfig()`.
        run: `RunOptions`.

    Returns:
        Accuracies, history and cost of the run.

    Raises:
        FileExistsError: `folder` holds checkpoints or weights of a run and `resume` is False.
        ValueError: the checkpoint is damaged, or of another model, other data or other settings; the model has fewer
            outputs than the data have classes.
        FloatingPointError: the loss is not finite any more; the checkpoint from before is kept.
        OSError: a checkpoint cannot be written; the one from before is kept.
        KeyboardInterrupt: Ctrl-C, after the step under way was finished and a checkpoint was written. A second Ctrl-C
            stops at once.

    Notes:
        On the CPU, with the same number of threads, a resumed run ends with bit for bit the same weights as one that
        was never stopped. Torch's global random state is left as it was found.

    Example:
        >>> result = train(models.create("resnet20"), data.load("cifar10", "cifar"), folder="runs/resnet20")
        >>> print(result.test_accuracy_best)
    """
    config = config or TrainConfig()
    return fit(model, CrossEntropy(config.label_smoothing), data, config, **run)


def fit(
    model: nn.Module, objective: Objective, data: Splits, config: TrainConfig, **run: Unpack[RunOptions]
) -> TrainResult:
    """Train `model` under any objective; everything else is as in `train`."""
    folder = None if (given := run.get("folder")) is None else Path(given)
    if folder is None and (run.get("resume") or run.get("tensorboard")):
        raise ValueError("resume and tensorboard need a folder")
    saved = None if folder is None else _find_checkpoint(folder, run.get("resume", False))
    device = config.torch_device()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        trainer = Trainer(model, objective, data, config, folder, run.get("on_step"))
        resumed, progress = saved is not None, run.get("progress", False)
        if saved is not None:
            trainer.restore(saved)
            del saved  # its tensors were copied
        trainer.prepare(resumed=resumed, progress=progress)
        return trainer.run(progress, run.get("tensorboard", False))


def _find_checkpoint(folder: Path, resume: bool) -> checkpoint.Checkpoint | None:
    """The checkpoint to resume from, if any; refuses to overwrite what another run has written."""
    path = folder / CHECKPOINT
    if resume:
        if path.exists():
            return checkpoint.load(path)
        logger.warning("%s does not exist: there is nothing to resume, the run starts from the beginning", path)
        return None
    for name in (CHECKPOINT, BEST, LAST):
        if (folder / name).exists():
            raise FileExistsError(f"{folder / name} is of another run: resume it (resume=True), or use another folder")
    return None
