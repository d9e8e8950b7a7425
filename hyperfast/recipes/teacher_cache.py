"""What a teacher says about images that come again unchanged, computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hyperfast.data import Augment, DeviceLoader
from hyperfast.losses import CompressedTeacherLoss
from hyperfast.recipes.feature_term import FeatureTerm
from hyperfast.recipes.progress import progress_bar


class Answers(NamedTuple):
    """What the teacher says about some images.

    Attributes:
        logits: `[B, classes]`.
        statistics: what each loss made of the teacher's maps, by its name: tensors whose first axis is the batch.
    """

    logits: Tensor
    statistics: Mapping[str, list[Tensor]]


@dataclass(frozen=True)
class TeacherCache:
    """`Answers` for all images of a set, in its order, on the device of the training."""

    answers: Answers

    @classmethod
    def of(
        cls, ask: Callable[[Tensor], tuple[Tensor, dict[str, list[Tensor]]]], loader: DeviceLoader, progress: bool
    ) -> TeacherCache:
        """Run the teacher over the images of `loader`, as they are.

        Args:
            ask: the teacher: images to logits and statistics.
            loader: of the training images.
            progress: show a progress bar.
        """
        device = loader.image_set.images.device
        plain = DeviceLoader(loader.image_set, loader.batch_size, device=device, train=False)
        parts: list[tuple[Tensor, dict[str, list[Tensor]]]] = []
        with progress_bar(progress, len(plain)) as show:
            for images, _ in plain.epoch():
                parts.append(ask(images))
                show(len(parts), "teacher")
        logits = torch.cat([part for part, _ in parts])
        statistics = {
            name: [torch.cat(taps) for taps in zip(*(found[name] for _, found in parts), strict=True)]
            for name in parts[0][1]
        }
        return cls(Answers(logits, statistics))

    def at(self, indices: Tensor) -> Answers:
        """The answers for some of the images, int64 `[B]`."""
        logits, statistics = self.answers
        picked = {name: [taps.index_select(0, indices) for taps in found] for name, found in statistics.items()}
        return Answers(logits.index_select(0, indices), picked)


def check_cacheable(loader: DeviceLoader, terms: Sequence[tuple[str, FeatureTerm]]) -> None:
    """Raise a ValueError unless the teacher's answers are the same in every epoch, and small enough to be kept."""
    if loader.augment != Augment(pad=0, flip=False):
        raise ValueError(
            f"cache_teacher keeps what the teacher says about each image, but the images are augmented "
            f"({loader.augment}), so that it says something else each time; use Augment(pad=0, flip=False)"
        )
    for name, term in terms:
        why = None
        if not isinstance(term.loss, CompressedTeacherLoss):
            why = "needs whole maps of the teacher"
        elif not term.loss.per_sample:
            why = "compares the images of a batch with each other"
        if why is not None:
            raise ValueError(
                f"cache_teacher keeps what a loss needs of each image, but {name!r} {why}; leave out one of them"
            )
