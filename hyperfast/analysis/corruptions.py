"""The common corruptions of Hendrycks and Dietterich for images of 32x32 pixels, written from their formulas."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from hyperfast.analysis import filters
from hyperfast.analysis.answers import Images, LabelledImages, pixels

_LEAST = 8  # pixels
_CHUNK = 500  # images that share a generator


@dataclass(frozen=True)
class Corruption:
    """One kind of damage.

    Attributes:
        apply: `apply(images, setting, generator)`; what it returns is then clipped to [0, 1].
        settings: of severities 1 to 5, those of CIFAR-10-C.
        extra: True for those four beside the usual fifteen, which the authors set aside for validation.
        library: an import that it needs besides PyTorch.
    """

    apply: Callable[[Tensor, Any, Generator], Tensor]
    settings: tuple[Any, Any, Any, Any, Any]
    extra: bool = False
    library: str | None = None


def corrupt(images: Tensor, name: str, severity: int, generator: Generator) -> Tensor:
    """Damage images as CIFAR-10-C does.

    Two corruptions differ from the authors' files: `frost` lays a texture made here over the image where theirs are
    photographs, and `spatter` finds the rims of drops without Canny's detector. Nothing is rounded to whole grey
    levels but in `jpeg_compression`. `glass_blur` does what the authors' program does: meant to swap pixels with
    neighbours above and to the left, it copies these.

    The settings are the authors' too, and with them a higher severity is not always farther from the original:
    `elastic_transform` and `saturate` change in kind, `glass_blur`, `frost` and `spatter` trade one setting for
    another.

    Args:
        images: float32 `[B, 3, H, W]` in [0, 1]; the settings are meant for 32x32.
        name: a key of `CORRUPTIONS`.
        severity: 1 to 5.
        generator: of everything random, on any device. The same state and the same batch give the same images.

    Returns:
        As `images`.

    Raises:
        ValueError: an unknown corruption or severity, or images of another kind or range.
        ModuleNotFoundError: `jpeg_compression` without Pillow, extra `hyperfast[images]`.

    Source: Hendrycks and Dietterich, arXiv 1903.12261.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"name is {name!r}; choose one of {', '.join(CORRUPTIONS)}")
    if severity not in (1, 2, 3, 4, 5):
        raise ValueError(f"severity is {severity!r}; choose 1 to 5")
    if images.dtype != torch.float32 or images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < _LEAST:
        raise ValueError(
            f"images is {images.dtype} {list(images.shape)}; expected torch.float32 [B, 3, H, W] of at least "
            f"{_LEAST}x{_LEAST} pixels"
        )
    if not images.shape[0]:
        return images.clone()
    if not bool((images.amin() >= 0) & (images.amax() <= 1)):
        raise ValueError(
            f"images range from {float(images.amin()):.3g} to {float(images.amax()):.3g}; expected [0, 1], "
            "before normalisation"
        )
    corruption = CORRUPTIONS[name]
    return corruption.apply(images, corruption.settings[severity - 1], generator).clamp(0, 1).contiguous()


def corrupted(data: Images, name: str, severity: int, *, seed: int = 0) -> Images:
    """A set of images damaged by `corrupt`, rounded to whole grey levels as the files of CIFAR-10-C are.

    Args:
        data: uint8 images `[N, 3, H, W]`.
        name: as in `corrupt`.
        severity: as in `corrupt`.
        seed: of everything random, together with name and severity. On the device of the images.

    Raises:
        ValueError, ModuleNotFoundError: as `corrupt`.
    """
    damaged = []
    for start in range(0, len(data.images), _CHUNK):
        digest = hashlib.blake2b(f"{seed} {name} {severity} {start}".encode(), digest_size=4).digest()
        generator = Generator(data.images.device).manual_seed(int.from_bytes(digest, "little") >> 1)
        part = corrupt(pixels(data.images[start : start + _CHUNK]), name, severity, generator)
        damaged.append((part * 255).round().to(torch.uint8))
    return LabelledImages(torch.cat(damaged), data.labels, data.mean, data.std)


def _normal(images: Tensor, generator: Generator, *shape: int) -> Tensor:
    return torch.randn(shape or images.shape, generator=generator, device=generator.device).to(images.device)


def _uniform(images: Tensor, generator: Generator, *shape: int) -> Tensor:
    return torch.rand(shape or images.shape, generator=generator, device=generator.device).to(images.device)


def _gaussian_noise(images: Tensor, scale: float, generator: Generator) -> Tensor:
    return images + scale * _normal(images, generator)


def _shot_noise(images: Tensor, photons: float, generator: Generator) -> Tensor:
    counted = torch.poisson((images * photons).to(generator.device), generator=generator)
    return counted.to(images.device) / photons


def _impulse_noise(images: Tensor, share: float, generator: Generator) -> Tensor:
    hit, salt = _uniform(images, generator) < share, _uniform(images, generator) < 0.5
    return torch.where(hit, salt.to(images.dtype), images)


def _speckle_noise(images: Tensor, scale: float, generator: Generator) -> Tensor:
    return images * (1 + scale * _normal(images, generator))


def _gaussian_blur(images: Tensor, sigma: float, generator: Generator) -> Tensor:
    return filters.gaussian(images, sigma)


def _defocus_blur(images: Tensor, setting: tuple[float, float], generator: Generator) -> Tensor:
    return filters.correlate(images, filters.disk(*setting))


def _glass_blur(images: Tensor, setting: tuple[float, int, int], generator: Generator) -> Tensor:
    sigma, reach, passes = setting
    batch, channels, height, width = images.shape
    blurred = filters.gaussian(images, sigma).flatten(2)
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    # The border, of which the authors' loops leave out the first `reach` pixels and themselves, stays.
    inside = (rows > reach) & (rows <= height - reach) & (columns > reach) & (columns <= width - reach)
    for _ in range(passes):
        shape = (2, batch, height, width)
        moves = torch.randint(-reach, reach, shape, generator=generator, device=generator.device).cpu()
        source = torch.where(inside, (rows + moves[0]) * width + columns + moves[1], rows * width + columns)
        source = source.view(batch, 1, -1).expand(-1, channels, -1).to(images.device)
        blurred = blurred.gather(2, source)
    return filters.gaussian(blurred.view(images.shape), sigma)


def _motion_blur(images: Tensor, setting: tuple[int, float], generator: Generator) -> Tensor:
    angle = _uniform(images, generator, len(images)) * 90 - 45
    return filters.motion(images, *setting, angle)


def _zoom_blur(images: Tensor, factors: int, generator: Generator) -> Tensor:
    total = images.clone()
    for index in range(factors):
        total += filters.zoom(images, 1 + 0.01 * index)
    return total / (factors + 1)


def _snow(images: Tensor, setting: tuple[float, ...], generator: Generator) -> Tensor:
    mean, scale, factor, least, radius, sigma, kept = setting
    batch, _, height, width = images.shape
    flakes = filters.zoom(mean + scale * _normal(images, generator, batch, 1, height, width), factor)
    flakes = torch.where(flakes < least, 0.0, flakes).clamp(0, 1)
    flakes = filters.motion(flakes, int(radius), sigma, -135 + 90 * _uniform(images, generator, batch))
    whiter = torch.maximum(images, _grey(images) * 1.5 + 0.5)
    return kept * images + (1 - kept) * whiter + flakes + flakes.rot90(2, (2, 3))


def _frost(images: Tensor, setting: tuple[float, float], generator: Generator) -> Tensor:
    return setting[0] * images + setting[1] * _frost_texture(images, generator)


def _frost_texture(images: Tensor, generator: Generator) -> Tensor:
    """Patches of ice with needles across them, bluish white: the ridges of one cloud over the heights of another."""
    batch, _, height, width = images.shape
    patches, ridges = (
        filters.plasma(batch, max(height, width), decay, generator)[:, None, :height, :width] for decay in (1.5, 1.25)
    )
    needles = (1 - (2 * ridges - 1).abs()) ** 3
    ice = (0.15 + 0.65 * patches + 0.45 * needles).clamp(0, 1).to(images.device)
    return torch.cat([ice**1.25, ice**1.1, ice**0.9], 1)


def _fog(images: Tensor, setting: tuple[float, float], generator: Generator) -> Tensor:
    thickness, decay = setting
    batch, _, height, width = images.shape
    clouds = filters.plasma(batch, max(height, width), decay, generator)[:, None, :height, :width].to(images.device)
    brightest = images.amax((1, 2, 3), keepdim=True)
    # Black images stay so, whatever the fog: only what is brightest sets the scale.
    return (images + thickness * clouds) * brightest / (brightest + thickness)


def _brightness(images: Tensor, added: float, generator: Generator) -> Tensor:
    # The value of HSV is the largest channel; hue and saturation stay when all channels are scaled alike.
    value = images.amax(1, keepdim=True)
    target = (value + added).clamp_max(1)
    return torch.where(value > 0, images * (target / value.clamp_min(1e-12)), target)


def _contrast(images: Tensor, factor: float, generator: Generator) -> Tensor:
    means = images.mean((2, 3), keepdim=True)
    return (images - means) * factor + means


def _saturate(images: Tensor, setting: tuple[float, float], generator: Generator) -> Tensor:
    factor, added = setting
    value = images.amax(1, keepdim=True)
    spread = value - images.amin(1, keepdim=True)
    saturation = spread / value.clamp_min(1e-12)
    target = (saturation * factor + added).clamp(0, 1)
    coloured = value - (value - images) * (target / saturation.clamp_min(1e-12))
    # Grey has no hue; by convention it is 0, which is red.
    grey = torch.cat([value, value * (1 - target), value * (1 - target)], 1)
    return torch.where(spread > 0, coloured, grey)


def _pixelate(images: Tensor, share: float, generator: Generator) -> Tensor:
    height, width = images.shape[2:]
    small = filters.box_resize(images, int(height * share), int(width * share))
    return filters.box_resize(small, height, width)


def _jpeg_compression(images: Tensor, quality: int, generator: Generator) -> Tensor:
    try:
        import numpy as np
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "jpeg_compression needs Pillow, which is not installed; try `pip install 'hyperfast[images]'`", name="PIL"
        ) from error
    rounded = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().contiguous().numpy()
    decoded = []
    for image in rounded:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=quality)
        decoded.append(torch.from_numpy(np.array(Image.open(buffer).convert("RGB"))))
    return torch.stack(decoded).permute(0, 3, 1, 2).to(images) / 255


def _elastic_transform(images: Tensor, setting: tuple[float, float, float], generator: Generator) -> Tensor:
    height, width = images.shape[2:]
    side = min(height, width)
    strength, sigma, jitter = (side * part for part in setting)
    warped = _sample(images, *_random_affine(images, jitter, generator), about_centres=True)
    moves = 2 * _uniform(images, generator, len(images), 2, height, width) - 1
    moves = strength * filters.gaussian(moves.double(), sigma, truncate=3, border="mirror")
    rows, columns = _places(images)
    return _sample(warped, columns + moves[:, 0], rows + moves[:, 1], about_centres=False)


def _random_affine(images: Tensor, jitter: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """Where every pixel comes from when three corners of a square in the middle are moved at random."""
    batch, _, height, width = images.shape
    middle, reach = torch.tensor([width // 2, height // 2]), min(height, width) // 3
    corners = middle + reach * torch.tensor([[1, 1], [1, -1], [-1, -1]])
    homogeneous = torch.cat([corners, torch.ones(3, 1)], 1).to(images.device, torch.float64)
    moved = homogeneous[:, :2] + jitter * (2 * _uniform(images, generator, batch, 3, 2).double() - 1)
    # Back from where the corners went to where they were.
    back = torch.linalg.solve(torch.cat([moved, torch.ones_like(moved[..., :1])], 2), homogeneous[:, :2])
    rows, columns = _places(images)
    grid = torch.stack([columns, rows, torch.ones_like(rows)], -1) @ back[:, None]
    return grid[..., 0], grid[..., 1]


def _places(images: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the pixels, float64 `[H, W]`."""
    height, width = images.shape[2:]
    rows, columns = torch.meshgrid(
        torch.arange(height, dtype=torch.float64, device=images.device),
        torch.arange(width, dtype=torch.float64, device=images.device),
        indexing="ij",
    )
    return rows, columns


def _sample(images: Tensor, columns: Tensor, rows: Tensor, *, about_centres: bool) -> Tensor:
    """Bilinear values at places in pixels `[B, H, W]`; beyond the border the image is mirrored."""
    height, width = images.shape[2:]
    if about_centres:
        grid = torch.stack([2 * columns / (width - 1) - 1, 2 * rows / (height - 1) - 1], -1)
    else:
        grid = torch.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], -1)
    return F.grid_sample(images, grid.to(images.dtype), padding_mode="reflection", align_corners=about_centres)


_WATER = (175 / 255, 238 / 255, 238 / 255)
_MUD = (63 / 255, 42 / 255, 20 / 255)
_EMBOSS = ((-2.0, -1.0, 0.0), (-1.0, 1.0, 1.0), (0.0, 1.0, 2.0))
_FARTHEST = 20.0  # pixels from the rim of a drop


def _spatter(images: Tensor, setting: tuple[float, float, float, float, float, bool], generator: Generator) -> Tensor:
    mean, scale, sigma, least, weight, mud = setting
    batch, _, height, width = images.shape
    liquid = filters.gaussian(mean + scale * _normal(images, generator, batch, height, width), sigma)
    liquid = torch.where(liquid < least, 0.0, liquid)
    if mud:
        cover = filters.gaussian((liquid > least).to(images.dtype), weight)[:, None]
        cover = torch.where(cover < 0.8, 0.0, cover)
        return images * (1 - cover) + cover * _colour(images, _MUD)
    relief = liquid * _relief(liquid > 0)
    highest = relief.amax((1, 2), keepdim=True)
    relief = torch.where(highest > 0, relief / highest.clamp_min(1e-12), 0.0)[:, None]
    return images + weight * relief * _colour(images, _WATER)


def _relief(drops: Tensor) -> Tensor:
    """Light and shadow on drops: the distance from their rims, evened out and embossed."""
    outside = F.pad((~drops).float(), (1, 1, 1, 1))
    neighbours = outside[:, :-2, 1:-1] + outside[:, 2:, 1:-1] + outside[:, 1:-1, :-2] + outside[:, 1:-1, 2:]
    far = filters.distance(drops & (neighbours > 0)).clamp_max(_FARTHEST)[:, None]
    mean = torch.full((3, 3), 1 / 9)
    even = filters.equalised(filters.correlate(far, mean)[:, 0].floor())[:, None]
    embossed = filters.correlate(even, torch.tensor(_EMBOSS)).clamp(0, 255)
    return filters.correlate(embossed, mean)[:, 0]


def _colour(images: Tensor, colour: tuple[float, float, float]) -> Tensor:
    return torch.tensor(colour, device=images.device).view(3, 1, 1)


def _grey(images: Tensor) -> Tensor:
    return (images * _colour(images, (0.299, 0.587, 0.114))).sum(1, keepdim=True)


CORRUPTIONS: Mapping[str, Corruption] = {
    "gaussian_noise": Corruption(_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": Corruption(_shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": Corruption(_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": Corruption(_defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    "glass_blur": Corruption(_glass_blur, ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))),
    "motion_blur": Corruption(_motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": Corruption(_zoom_blur, (6, 11, 16, 21, 26)),
    "snow": Corruption(
        _snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "frost": Corruption(_frost, ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))),
    "fog": Corruption(_fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": Corruption(_brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": Corruption(_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": Corruption(
        _elastic_transform, ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))
    ),
    "pixelate": Corruption(_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": Corruption(_jpeg_compression, (80, 65, 58, 50, 40), library="PIL"),
    "speckle_noise": Corruption(_speckle_noise, (0.06, 0.1, 0.12, 0.16, 0.2), extra=True),
    "gaussian_blur": Corruption(_gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1), extra=True),
    "spatter": Corruption(
        _spatter,
        (
            (0.62, 0.1, 0.7, 0.7, 0.5, False),
            (0.65, 0.1, 0.8, 0.7, 0.5, False),
            (0.65, 0.3, 1, 0.69, 0.5, False),
            (0.65, 0.1, 0.7, 0.69, 0.6, True),
            (0.65, 0.1, 0.5, 0.68, 0.6, True),
        ),
        extra=True,
    ),
    "saturate": Corruption(_saturate, ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)), extra=True),
}
