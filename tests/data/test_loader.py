"""The loader on the device against plain loops, and its promise about resuming."""

import pytest
import torch
import torch.nn.functional as F

from hyperfast.data import Augment, DeviceLoader, ImageSet
from hyperfast.data.loader import crop_and_flip

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.fixture
def images():
    """Ten images whose label is their place in the set."""
    pixels = torch.randint(1, 256, (10, 3, 6, 5), dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(10), tuple("abcdefghij"), MEAN, STD)


def normalised(pixels):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


def batches(loader, *args):
    return list(loader.epoch(*args))


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for (images, labels), (other_images, other_labels) in zip(found, expected, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


def test_evaluation_takes_everything_in_order_as_it_is(images):
    loader = DeviceLoader(images, 4, device="cpu", train=False)
    found = batches(loader)
    assert [len(labels) for _, labels in found] == [4, 4, 2]
    assert len(loader) == 3
    assert torch.cat([labels for _, labels in found]).tolist() == list(range(10))
    pixels = torch.cat([pixels for pixels, _ in found])
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, normalised(images.images))


def test_batches_are_the_caller_s_to_change(images):
    before = images.images.clone(), images.labels.clone()
    for train in (True, False):
        for pixels, labels in DeviceLoader(images, 4, device="cpu", train=train).epoch():
            pixels.zero_()
            labels.zero_()
    assert torch.equal(images.images, before[0])
    assert torch.equal(images.labels, before[1])


def test_training_without_augmentation_only_shuffles(images):
    loader = DeviceLoader(images, 4, device="cpu", train=True, augment=Augment(0, False), drop_last=False)
    found = batches(loader, 3)
    order = torch.cat([labels for _, labels in found])
    assert sorted(order.tolist()) == list(range(10))
    assert order.tolist() != list(range(10))
    torch.testing.assert_close(torch.cat([pixels for pixels, _ in found]), normalised(images.images[order]))


def one_by_one(pixels, top, left, flip, pad):
    height, width = pixels.shape[2:]
    results = []
    for image, y, x, mirrored in zip(pixels, top.tolist(), left.tolist(), flip.tolist(), strict=True):
        window = F.pad(image, (pad,) * 4)[:, y : y + height, x : x + width]
        results.append(window.flip(-1) if mirrored else window)
    return torch.stack(results)


@pytest.mark.parametrize("pad", [0, 1, 4])
def test_crop_and_flip_against_a_loop(images, pad):
    top, left = torch.randint(2 * pad + 1, (2, 10))
    flip = torch.arange(10) % 3 == 0
    found = crop_and_flip(images.images, top, left, flip, pad)
    assert torch.equal(found, one_by_one(images.images, top, left, flip, pad))


@pytest.mark.parametrize("flip", [False, True])
def test_augmented_batches_are_windows_of_their_image(images, flip):
    loader = DeviceLoader(images, 5, device="cpu", train=True, augment=Augment(pad=2, flip=flip))
    for pixels, labels in loader.epoch():
        for image, label in zip(pixels, labels.tolist(), strict=True):
            original = images.images[label : label + 1].expand(50, -1, -1, -1)
            places = torch.cartesian_prod(torch.arange(5), torch.arange(5), torch.arange(2)).T
            windows = normalised(one_by_one(original, places[0], places[1], places[2] == 1, 2))
            matching = (windows - image).abs().amax((1, 2, 3)) < 1e-5
            assert matching.any()
            assert flip or not places[2, matching].all()


def test_every_place_and_both_sides_come_up_equally_often():
    pixels = torch.zeros(4000, 1, 3, 3, dtype=torch.uint8)
    pixels[:, :, 1, 2] = 255  # one bright pixel beside the centre shows where the window was and how it was turned
    loader = DeviceLoader(
        ImageSet(pixels, torch.zeros(4000, dtype=torch.int64), ("a",), (0.0,), (1.0,)),
        4000,
        device="cpu",
        train=True,
        augment=Augment(pad=1, flip=True),
    )
    [(images, _)] = batches(loader)
    frequency = images.mean((0, 1))
    # It is in each row equally often. It has left the image a third of the time, else is in the middle or beside it.
    expected = torch.outer(torch.full((3,), 1 / 3), torch.tensor([1, 2, 1]) / 6)
    torch.testing.assert_close(frequency, expected, atol=0.03, rtol=0)


def test_order_and_changes_depend_on_seed_and_epoch_alone(images):
    def make(seed):
        return DeviceLoader(images, 4, device="cpu", train=True, seed=seed)

    first = make(7)
    expected = batches(first, 2)
    torch.manual_seed(123)
    batches(first, 5)
    assert_equal(batches(first, 2), expected)
    assert_equal(batches(make(7), 2), expected)
    for loader, epoch in ((make(7), 3), (make(8), 2)):
        assert not torch.equal(torch.cat([x for x, _ in batches(loader, epoch)]), torch.cat([x for x, _ in expected]))


@pytest.mark.parametrize("train", [False, True])
def test_an_epoch_can_be_resumed_anywhere(images, train):
    loader = DeviceLoader(images, 3, device="cpu", train=train, drop_last=False)
    whole = batches(loader, 1)
    for start in range(len(loader) + 1):
        assert_equal(batches(loader, 1, start), whole[start:])


def test_the_global_generator_is_left_alone(images):
    state = torch.get_rng_state()
    batches(DeviceLoader(images, 4, device="cpu", train=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("drop_last", "sizes"), [(None, [4, 4]), (True, [4, 4]), (False, [4, 4, 2])])
def test_the_last_batch_of_training(images, drop_last, sizes):
    loader = DeviceLoader(images, 4, device="cpu", train=True, drop_last=drop_last)
    assert [len(labels) for _, labels in loader.epoch()] == sizes
    assert len(loader) == len(sizes)


@pytest.mark.parametrize("train", [False, True])
def test_channels_last(images, train):
    plain, last = (DeviceLoader(images, 4, device="cpu", train=train, channels_last=value) for value in (False, True))
    for (pixels, _), (other, _) in zip(plain.epoch(), last.epoch(), strict=True):
        assert torch.equal(pixels, other)
        assert pixels.is_contiguous()
        assert other.is_contiguous(memory_format=torch.channels_last)


def test_an_empty_set_has_no_batches(images):
    nothing = images.subset(torch.empty(0, dtype=torch.int64))
    loader = DeviceLoader(nothing, 4, device="cpu", train=False)
    assert (len(loader), batches(loader)) == (0, [])


def test_impossible_arguments_are_named(images):
    with pytest.raises(ValueError, match="batch_size is 0; give at least 1"):
        DeviceLoader(images, 0, device="cpu", train=True)
    with pytest.raises(ValueError, match="batch_size is 11 but the set has 10 images"):
        DeviceLoader(images, 11, device="cpu", train=True)
    with pytest.raises(ValueError, match="pad is -1"):
        Augment(pad=-1)
    loader = DeviceLoader(images, 4, device="cpu", train=True)
    with pytest.raises(ValueError, match="epoch is -1; epochs count from 0"):
        loader.epoch(-1)
    with pytest.raises(ValueError, match="start_batch is 3; an epoch has 2 batches"):
        loader.epoch(0, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("train", [False, True])
def test_no_batch_waits_for_the_gpu(images, train):
    loader = DeviceLoader(images, 4, device="cuda", train=train)
    expected = batches(loader, 1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = batches(loader, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_equal(found, expected)
