"""Handwritten digits, 8x8, from scikit-learn's own copy: real images without a download."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from hyperfast.data.dataset import ImageSet, Splits, channel_statistics, stratified_split

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["read_digits"]

_TEST_IMAGES = 360
_TEST_SEED = 0


def read_digits(root: str | Path | None = None) -> Splits:
    """The 1,797 digits as uint8 `[N, 1, 8, 8]`: 1,437 to train with and 360 to test on, the same in every run.

    Args:
        root: not used; scikit-learn has the images in its package.

    Returns:
        Splits with no validation images; `load` sets some apart.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.

    Source: UCI's "Optical Recognition of Handwritten Digits", test part, in scikit-learn's `load_digits`. Its values
    0 to 16 are spread over 0 to 255.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the digits come with scikit-learn, which is not installed; try `pip install 'hyperfast[demo]'`",
            name="sklearn",
        ) from error
    digits = load_digits()
    images = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    test, train = stratified_split(labels, _TEST_IMAGES, _TEST_SEED)
    mean, std = channel_statistics(images[train])
    everything = ImageSet(images, labels, tuple(str(digit) for digit in range(10)), mean, std)
    nothing = torch.empty(0, dtype=torch.int64)
    return Splits(everything.subset(train), everything.subset(nothing), everything.subset(test))
