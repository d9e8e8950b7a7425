"""Sets, their checks and their division."""

import pytest
import torch

from hyperfast.data import ImageSet, Splits, stratified_split
from hyperfast.data.dataset import channel_statistics


def image_set(count=6, channels=3, **changes):
    fields = {
        "images": torch.randint(256, (count, channels, 4, 4), dtype=torch.uint8),
        "labels": torch.arange(count) % 2,
        "classes": ("cat", "dog"),
        "mean": (0.5,) * channels,
        "std": (0.2,) * channels,
    }
    return ImageSet(**(fields | changes))


def test_subset_keeps_order_and_the_rest():
    whole = image_set()
    part = whole.subset(torch.tensor([4, 1]))
    assert torch.equal(part.images, whole.images[[4, 1]])
    assert part.labels.tolist() == [0, 1]
    assert (part.classes, part.mean, len(part)) == (whole.classes, whole.mean, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(6, 3, 4, 4)}, r"images is torch.float32 \[6, 3, 4, 4\]; expected torch.uint8"),
        ({"images": torch.zeros(6, 4, 4, dtype=torch.uint8)}, r"expected torch.uint8 \[N, C, H, W\]"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, r"labels is torch.int64 \[5\]; expected torch.int64 \[6\]"),
        ({"labels": torch.zeros(6)}, "labels is torch.float32"),
        ({"mean": (0.5,)}, "mean has 1 and std 3 values; the images have 3 channels"),
        ({"std": (0.2, 0.0, 0.2)}, "every value must be positive"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        image_set(**changes)


def test_normalised_changes_all_three():
    splits = Splits(image_set(), image_set(), image_set()).normalised([0.1, 0.2, 0.3], [1, 2, 3])
    assert {(part.mean, part.std) for part in (splits.train, splits.val, splits.test)} == {((0.1, 0.2, 0.3), (1, 2, 3))}


def test_statistics_are_those_of_the_scaled_pixels():
    images = torch.randint(256, (50, 3, 5, 4), dtype=torch.uint8)
    images[:, 2] = 51
    mean, std = channel_statistics(images)
    scaled = images.double() / 255
    assert torch.allclose(torch.tensor(mean).double(), scaled.mean((0, 2, 3)))
    assert torch.allclose(torch.tensor(std[:2]).double(), scaled[:, :2].std((0, 2, 3), correction=0))
    assert std[2] == 1


def test_a_split_is_disjoint_complete_and_in_proportion():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)[torch.randperm(100)]
    drawn, left = stratified_split(labels, 10, seed=3)
    assert sorted(drawn.tolist() + left.tolist()) == list(range(100))
    assert torch.bincount(labels[drawn]).tolist() == [5, 3, 2]
    assert drawn.tolist() == sorted(drawn.tolist())


def test_a_split_of_balanced_classes_is_balanced():
    drawn, _ = stratified_split(torch.arange(1000) % 10, 100, seed=0)
    assert torch.bincount(torch.arange(1000)[drawn] % 10).tolist() == [10] * 10


def test_a_split_is_chosen_by_the_seed_and_never_changes():
    labels = torch.arange(40) % 4
    assert stratified_split(labels, 8, seed=0)[0].tolist() == [4, 10, 11, 15, 20, 22, 25, 29]  # fixed for good
    assert stratified_split(labels, 8, seed=1)[0].tolist() != stratified_split(labels, 8, seed=0)[0].tolist()


@pytest.mark.parametrize("count", [0, 5])
def test_a_split_may_draw_none_or_all(count):
    drawn, left = stratified_split(torch.tensor([7, 7, 0, 0, 7]), count, seed=0)
    assert (len(drawn), len(left)) == (count, 5 - count)


def test_a_split_cannot_draw_more_than_there_is():
    with pytest.raises(ValueError, match="count is 6; there are 5 images"):
        stratified_split(torch.zeros(5, dtype=torch.int64), 6, seed=0)
