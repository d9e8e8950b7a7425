"""scikit-learn's digits as a set of images."""

import sys

import pytest
import torch

from hyperfast.data import read_digits

sklearn_datasets = pytest.importorskip("sklearn.datasets")


def test_all_images_are_there_once_with_their_labels():
    splits = read_digits()
    digits = sklearn_datasets.load_digits()
    expected = sorted(
        (label, bytes((image * 255 / 16).round().astype("uint8").ravel()))
        for image, label in zip(digits.images, digits.target, strict=True)
    )
    parts = (splits.train, splits.test)
    found = sorted(
        (label.item(), bytes(image.flatten().tolist()))
        for part in parts
        for image, label in zip(part.images, part.labels, strict=True)
    )
    assert found == expected
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [1437, 0, 360]


def test_form_and_statistics():
    splits = read_digits()
    assert splits.train.images.shape[1:] == (1, 8, 8)
    assert splits.train.images.max() == 255
    scaled = splits.train.images.double() / 255
    assert splits.test.mean == pytest.approx([scaled.mean().item()])
    assert splits.test.std == pytest.approx([scaled.std(correction=0).item()])
    assert torch.bincount(splits.test.labels).min() >= 34
    assert splits.train.classes == tuple("0123456789")


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'hyperfast\[demo\]'"):
        read_digits()
