"""Every corruption, and those with a closed form against it."""

from __future__ import annotations

import colorsys
import re
import sys

import pytest
import torch
from torch import Tensor

from hyperfast.analysis import CORRUPTIONS, corrupt, filters
from hyperfast.analysis.answers import LabelledImages
from hyperfast.analysis.corruptions import corrupted

pytest.importorskip("PIL")

# With the authors' settings these trade one kind of damage for another.
_NOT_ORDERED = {"glass_blur", "frost", "elastic_transform", "spatter", "saturate"}


def _images(count: int = 24) -> Tensor:
    """Smooth blobs with edges across them and one grey image: between 0 and 1, as photographs are."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.rand(count, 3, 32, 32, generator=generator)
    blobs = filters.gaussian(noise, 2.0)
    low, high = blobs.amin((1, 2, 3), keepdim=True), blobs.amax((1, 2, 3), keepdim=True)
    images = 0.1 + 0.8 * (blobs - low) / (high - low)
    images[:, :, 10:20, 8:24] = 1 - images[:, :, 10:20, 8:24]
    images[-1] = images[-1, :1]
    return images


def _seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _distances(name: str, images: Tensor) -> list[float]:
    return [
        float((corrupt(images, name, severity, _seeded()) - images).square().mean().sqrt()) for severity in range(1, 6)
    ]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_images_stay_images_and_the_seed_decides(name: str) -> None:
    images = _images(6)
    before = images.clone()
    for severity in (1, 5):
        damaged = corrupt(images, name, severity, _seeded(1))
        assert damaged.shape == images.shape and damaged.dtype == torch.float32 and damaged.is_contiguous()
        assert damaged.isfinite().all() and damaged.min() >= 0 and damaged.max() <= 1
        assert torch.equal(damaged, corrupt(images, name, severity, _seeded(1)))
        assert not torch.equal(damaged, images)
    assert torch.equal(images, before)
    other = corrupt(images, name, 5, _seeded(2))
    fixed = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression", "gaussian_blur"}
    assert torch.equal(damaged, other) == (name in fixed | {"saturate"})


@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name not in _NOT_ORDERED])
def test_every_severity_is_farther_from_the_original(name: str) -> None:
    found = _distances(name, _images())
    if name == "motion_blur":
        # (6, 2) and (8, 2): the longer kernel adds what lies beyond six sigmas, which is nothing.
        assert found.pop(3) == pytest.approx(found[2], rel=1e-5)
    assert found == sorted(found) and len(set(found)) == len(found), found


def test_severities_are_ordered_on_average() -> None:
    images = _images()
    rows = torch.tensor([_distances(name, images) for name in CORRUPTIONS])
    means = rows.mean(0)
    assert (means.diff() > 0).all(), means
    # Each by its own largest, so that none outweighs the others.
    shares = (rows / rows.amax(1, keepdim=True)).mean(0)
    assert (shares.diff() > 0).all(), shares


def test_black_and_white_images_have_no_holes() -> None:
    images = torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32)])
    for name in CORRUPTIONS:
        for severity in range(1, 6):
            assert corrupt(images, name, severity, _seeded()).isfinite().all(), name


def test_noises_have_the_moments_of_their_formulas() -> None:
    grey = torch.full((40, 3, 32, 32), 0.5)
    for severity, scale in enumerate((0.04, 0.06, 0.08, 0.09, 0.10), 1):
        error = corrupt(grey, "gaussian_noise", severity, _seeded()) - grey
        assert float(error.std()) == pytest.approx(scale, rel=0.02)
    assert float(corrupt(grey, "shot_noise", 5, _seeded()).var()) == pytest.approx(0.5 / 50, rel=0.03)
    assert float(corrupt(grey, "speckle_noise", 3, _seeded()).std()) == pytest.approx(0.5 * 0.12, rel=0.02)
    impulse = corrupt(grey, "impulse_noise", 5, _seeded())
    assert float((impulse == 1).float().mean()) == pytest.approx(0.035, rel=0.05)
    assert float((impulse == 0).float().mean()) == pytest.approx(0.035, rel=0.05)
    assert float((impulse == 0.5).float().mean()) == pytest.approx(0.93, rel=0.01)


def test_contrast_and_fog_by_their_formulas() -> None:
    images = _images()
    means = images.mean((2, 3), keepdim=True)
    torch.testing.assert_close(corrupt(images, "contrast", 5, _seeded()), 0.15 * images + 0.85 * means)
    clouds = filters.plasma(len(images), 32, 2, _seeded())[:, None]
    top = images.amax((1, 2, 3), keepdim=True)
    torch.testing.assert_close(corrupt(images, "fog", 4, _seeded()), (images + clouds) * top / (top + 1))


@pytest.mark.parametrize(
    ("name", "severity", "change"),
    [
        ("brightness", 5, lambda h, s, v: (h, s, min(v + 0.3, 1))),
        ("saturate", 1, lambda h, s, v: (h, 0.3 * s, v)),
        ("saturate", 5, lambda h, s, v: (h, min(2.5 * s + 0.2, 1), v)),
    ],
)
def test_colours_change_in_hsv(name: str, severity: int, change) -> None:
    images = torch.cat([_images(2), torch.zeros(1, 3, 32, 32)])
    found = corrupt(images, name, severity, _seeded()).permute(0, 2, 3, 1).reshape(-1, 3)
    pixels = images.permute(0, 2, 3, 1).reshape(-1, 3).double()
    expected = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*pixel))) for pixel in pixels.tolist()]
    torch.testing.assert_close(found.double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-5)


def test_glass_takes_pixels_from_above_and_from_the_left() -> None:
    # With a blur of no reach each pixel is one of four.
    images = torch.arange(1024.0).view(1, 1, 32, 32).expand(2, 3, -1, -1) / 1023
    damaged = (corrupt(images, "glass_blur", 1, _seeded()) * 1023).round().long()
    moved = torch.arange(1024).view(32, 32) - damaged[0, 0]
    assert set(moved[2:, 2:].unique().tolist()) == {0, 1, 32, 33}
    assert not moved[:2].any() and not moved[:, :2].any()
    assert torch.equal(damaged[0, 0], damaged[0, 2]) and not torch.equal(damaged[0], damaged[1])


def test_elastic_at_its_first_severity_is_affine() -> None:
    """A linear ramp through an affine map stays linear, away from the mirrored border."""
    ramp = torch.arange(32.0).expand(8, 3, 32, 32) / 31
    warped = corrupt(ramp, "elastic_transform", 1, _seeded())
    middle = warped[:, 0, 10:22, 10:22]
    torch.testing.assert_close(middle.diff(dim=2, n=2), torch.zeros(8, 12, 10), atol=1e-5, rtol=0)
    torch.testing.assert_close(middle.diff(dim=1, n=2), torch.zeros(8, 10, 12), atol=1e-5, rtol=0)
    assert (warped - ramp).abs().max() > 0.02


def test_set_is_damaged_in_parts_and_rounded() -> None:
    images = (_images(4) * 255).byte().repeat(130, 1, 1, 1)  # more than one part
    data = LabelledImages(images, torch.arange(520), (0.5,) * 3, (0.2,) * 3)
    found = corrupted(data, "gaussian_noise", 3, seed=7)
    assert found.images.dtype == torch.uint8 and found.images.shape == images.shape
    assert torch.equal(found.labels, data.labels) and found.mean == data.mean
    assert torch.equal(found.images, corrupted(data, "gaussian_noise", 3, seed=7).images)
    assert not torch.equal(found.images, corrupted(data, "gaussian_noise", 3, seed=8).images)
    error = found.images.double() / 255 - images.double() / 255
    assert float(error[:500].std()) == pytest.approx(0.08, rel=0.1)
    assert not torch.equal(found.images[:20], found.images[500:])


@pytest.mark.parametrize(
    ("images", "name", "severity", "message"),
    [
        (torch.zeros(1, 3, 32, 32), "rain", 1, "name is 'rain'; choose one of gaussian_noise, "),
        (torch.zeros(1, 3, 32, 32), "fog", 6, "severity is 6; choose 1 to 5"),
        (torch.zeros(1, 1, 32, 32), "fog", 1, "images is torch.float32 [1, 1, 32, 32]; expected torch.float32 [B, 3,"),
        (torch.zeros(1, 3, 4, 32), "fog", 1, "of at least 8x8 pixels"),
        (torch.full((1, 3, 32, 32), -2.0), "fog", 1, "images range from -2 to -2; expected [0, 1], before normalisat"),
    ],
)
def test_messages(images: Tensor, name: str, severity: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        corrupt(images, name, severity, _seeded())


def test_no_images_are_no_error() -> None:
    assert corrupt(torch.zeros(0, 3, 32, 32), "fog", 1, _seeded()).shape == (0, 3, 32, 32)


def test_without_pillow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'hyperfast\[images\]'"):
        corrupt(_images(1), "jpeg_compression", 1, _seeded())
