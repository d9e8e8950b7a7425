"""Filters against direct formulas."""

from __future__ import annotations

import math

import pytest
import torch

from hyperfast.analysis import filters


def test_gaussian_inside_is_the_sampled_kernel() -> None:
    image = torch.zeros(1, 1, 21, 21, dtype=torch.float64)
    image[0, 0, 10, 10] = 1
    places = torch.arange(-4, 5, dtype=torch.float64)
    kernel = torch.exp(-0.5 * places**2)
    kernel = kernel / kernel.sum()
    blurred = filters.gaussian(image, 1.0)[0, 0]
    torch.testing.assert_close(blurred[6:15, 6:15], torch.outer(kernel, kernel))
    assert blurred.sum() == pytest.approx(1)
    assert torch.equal(filters.gaussian(image, 0.05), image)


@pytest.mark.parametrize("border", ["edge", "mirror"])
def test_gaussian_at_the_border(border: str) -> None:
    line = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    around = {"edge": [1, 1, 1, 1, 2, 3, 3, 3, 3], "mirror": [3, 2, 1, 1, 2, 3, 3, 2, 1]}[border]
    # sigma 0.7 and 4 sigmas: three pixels either way.
    weights = [math.exp(-0.5 * (k / 0.7) ** 2) for k in range(-3, 4)]
    expected = [sum(w * around[i + k] for k, w in enumerate(weights)) / sum(weights) for i in range(3)]
    torch.testing.assert_close(filters.gaussian(line, 0.7, border=border)[0], torch.tensor(expected).double())


def test_wide_gaussian_of_a_small_image_keeps_a_constant() -> None:
    for border in ("edge", "mirror"):
        blurred = filters.gaussian(torch.full((2, 5, 5), 0.3, dtype=torch.float64), 20.0, border=border)
        torch.testing.assert_close(blurred, torch.full((2, 5, 5), 0.3, dtype=torch.float64))


def test_disk() -> None:
    nearly_hard = filters.disk(1.0, 0.01)
    cross = torch.tensor([[0.0, 1, 0], [1, 1, 1], [0, 1, 0]], dtype=torch.float64) / 5
    torch.testing.assert_close(nearly_hard[1:4, 1:4], cross)
    soft = filters.disk(1.5, 0.6)
    assert soft.shape == (5, 5) and soft.sum() == pytest.approx(1)
    torch.testing.assert_close(soft, soft.T)


def test_correlate_does_not_flip_the_kernel() -> None:
    image = torch.arange(25.0).view(1, 1, 5, 5)
    kernel = torch.zeros(3, 3)
    kernel[0, 2] = 1  # the pixel above to the right
    found = filters.correlate(image, kernel)[0, 0]
    assert torch.equal(found[1:, :4], image[0, 0, :4, 1:])
    assert torch.equal(found[0, :4], image[0, 0, 1, 1:])  # reflected about the first row


@pytest.mark.parametrize(("angle", "step"), [(0.0, (0, 1)), (90.0, (1, 0)), (-90.0, (-1, 0)), (45.0, (1, 1))])
def test_motion_looks_along_its_direction(angle: float, step: tuple[int, int]) -> None:
    image = torch.rand(1, 2, 16, 16)
    weights = torch.tensor([math.exp(-0.5 * i**2) for i in range(5)])
    weights = weights / weights.sum()
    expected = torch.zeros(2)
    for i, weight in enumerate(weights.tolist()):
        far = round(i * (math.sqrt(0.5) if step == (1, 1) else 1))
        expected += weight * image[0, :, 8 + far * step[0], 8 + far * step[1]]
    found = filters.motion(image, 2, 1.0, torch.tensor([angle]))
    torch.testing.assert_close(found[0, :, 8, 8], expected)


def test_motion_has_one_angle_per_image() -> None:
    images = torch.rand(1, 3, 8, 8).repeat(2, 1, 1, 1)
    both = filters.motion(images, 3, 2.0, torch.tensor([0.0, 60.0]))
    torch.testing.assert_close(both[1:], filters.motion(images[1:], 3, 2.0, torch.tensor([60.0])))
    assert not torch.equal(both[0], both[1])


def test_zoom_keeps_size_and_enlarges_the_middle() -> None:
    across = torch.arange(32.0).expand(1, 1, 32, 32)
    assert torch.equal(filters.zoom(across, 1.0), across)
    twice = filters.zoom(across, 2.0)
    assert twice.shape == across.shape
    torch.testing.assert_close(twice[0, 0, 0], torch.linspace(8, 23, 32))


def test_plasma_is_smooth_cloud_between_zero_and_one() -> None:
    made = filters.plasma(4, 32, 2.0, torch.Generator().manual_seed(0))
    assert made.shape == (4, 32, 32) and made.isfinite().all()
    assert torch.equal(made.amin((1, 2)), torch.zeros(4)) and torch.equal(made.amax((1, 2)), torch.ones(4))
    rough = filters.plasma(4, 32, 1.1, torch.Generator().manual_seed(0))
    assert made.diff(dim=1).abs().mean() < rough.diff(dim=1).abs().mean() / 2
    assert torch.equal(made, filters.plasma(4, 32, 2.0, torch.Generator().manual_seed(0)))
    assert filters.plasma(1, 20, 2.0, torch.Generator()).shape == (1, 20, 20)


def test_distance_is_euclidean() -> None:
    mask = torch.rand(3, 7, 9) < 0.1
    mask[2] = False
    mask[:2, 3, 4] = True
    found = filters.distance(mask)
    for image in range(2):
        places = mask[image].nonzero().double()
        every = torch.cartesian_prod(torch.arange(7), torch.arange(9)).double()
        expected = torch.cdist(every, places).amin(1).view(7, 9)
        torch.testing.assert_close(found[image].double(), expected, rtol=1e-6, atol=1e-6)
    assert found[2].isinf().all()


def test_equalised_by_hand() -> None:
    image = torch.tensor([[[5.0, 5.0], [7.0, 200.0]]])
    # Numbers up to a value: 2, 3 and 4 of 4, from which the 2 of the darkest are taken off.
    assert filters.equalised(image).tolist() == [[[0, 0], [128, 255]]]
    assert torch.equal(filters.equalised(torch.full((1, 2, 2), 9.0)), torch.full((1, 2, 2), 9.0))


@pytest.mark.parametrize("side", [30, 28, 24, 20])
def test_box_resize_is_pillows(side: int) -> None:
    image_module = pytest.importorskip("PIL.Image")
    numpy = pytest.importorskip("numpy")
    picture = torch.rand(32, 32)
    small = image_module.fromarray(picture.numpy(), "F").resize((side, side), image_module.BOX)
    found = filters.box_resize(picture, side, side)
    torch.testing.assert_close(found, torch.from_numpy(numpy.array(small)))
    large = torch.from_numpy(numpy.array(small.resize((32, 32), image_module.BOX)))
    torch.testing.assert_close(filters.box_resize(found, 32, 32), large)
