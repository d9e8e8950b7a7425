"""Sets by name, with their validation images set apart."""

import pytest
import torch

from hyperfast import data


def keys(part):
    return {bytes(image.flatten().tolist()) for image in part.images}


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", seed=0)


def test_the_three_sets_are_disjoint(digits):
    train, val, test = (keys(part) for part in (digits.train, digits.val, digits.test))
    assert not train & val
    assert not train & test
    assert not val & test
    assert (len(digits.train), len(digits.val), len(digits.test)) == (1293, 144, 360)


def test_the_seed_chooses_validation_images_but_never_test_images(digits):
    other = data.load("digits", seed=1)
    assert torch.equal(other.test.images, digits.test.images)
    assert not torch.equal(other.val.images, digits.val.images)
    again = data.load("digits", seed=0)
    assert torch.equal(again.train.images, digits.train.images)
    assert torch.equal(again.val.images, digits.val.images)


@pytest.mark.parametrize(("val_fraction", "expected"), [(0, 0), (0.0001, 1), (0.25, 359), (200, 200), (200.0, 200)])
def test_validation_by_fraction_or_count(val_fraction, expected):
    splits = data.load("digits", val_fraction=val_fraction)
    assert (len(splits.val), len(splits.train)) == (expected, 1437 - expected)


def test_limit_takes_so_many_of_each_set_in_proportion():
    splits = data.load("digits", limit=50)
    assert torch.equal(splits.test.images, data.load("digits", limit=50, seed=1).test.images)
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [50, 50, 50]
    assert torch.bincount(splits.train.labels).tolist() == pytest.approx([5] * 10, abs=1)


@pytest.mark.parametrize("val_fraction", [-0.1, 1.5, float("nan"), float("inf")])
def test_an_impossible_fraction_is_named(val_fraction):
    with pytest.raises(ValueError, match=rf"val_fraction is {val_fraction}; give a fraction in \[0, 1\)"):
        data.load("digits", val_fraction=val_fraction)


def test_too_many_validation_images():
    with pytest.raises(ValueError, match="val_fraction is 1437: no training image of the 1437 would be left"):
        data.load("digits", val_fraction=1437)


def test_an_impossible_limit_is_named():
    with pytest.raises(ValueError, match="limit is 0; give at least 1 image"):
        data.load("digits", limit=0)


def test_an_unknown_set_lists_the_known():
    with pytest.raises(ValueError, match=r"'cifar20' \(did you mean cifar100?\?\); choose one of digits, cifar10, cif"):
        data.load("cifar20")


def test_digits_are_not_mirrored():
    assert data.default_augment("digits") == data.Augment(pad=1, flip=False)
    assert data.default_augment("cifar10") == data.Augment(pad=4, flip=True)
    assert set(data.names()) == {"digits", "cifar10", "cifar100", "folder"}
