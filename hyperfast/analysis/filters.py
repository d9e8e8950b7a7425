"""Filters of small images, all images of a batch at once: what the corruptions are made of."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def gaussian(images: Tensor, sigma: float, *, truncate: float = 4.0, border: str = "edge") -> Tensor:
    """Blur the last two dimensions.

    Args:
        images: `[..., H, W]`.
        sigma: in pixels; 0 changes nothing.
        truncate: the kernel ends at this many sigmas, rounded to whole pixels.
        border: `"edge"` repeats the last pixel, `"mirror"` reflects about its outer side.
    """
    height, width = images.shape[-2:]
    rows, columns = (_gaussian_matrix(n, sigma, truncate, border).to(images) for n in (height, width))
    return rows @ images @ columns.mT


def _gaussian_matrix(size: int, sigma: float, truncate: float, border: str) -> Tensor:
    """float64 `[size, size]`; as a matrix, a kernel may be wider than the image."""
    radius = int(truncate * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (offsets.double() / sigma).square()) if radius else torch.ones(1, dtype=torch.float64)
    source = torch.arange(size)[:, None] + offsets
    if border == "mirror":
        source = source.remainder(2 * size)
        source = torch.minimum(source, 2 * size - 1 - source)
    else:
        source = source.clamp(0, size - 1)
    weights = (kernel / kernel.sum()).expand(size, -1)
    return torch.zeros(size, size, dtype=torch.float64).scatter_add_(1, source, weights)


def correlate(images: Tensor, kernel: Tensor) -> Tensor:
    """Every channel with one kernel `[k, k]`, k odd; the border is reflected about the last pixel."""
    batch, channels, height, width = images.shape
    pad = kernel.shape[0] // 2
    padded = F.pad(images.reshape(batch * channels, 1, height, width), (pad,) * 4, mode="reflect")
    return F.conv2d(padded, kernel.to(images)[None, None]).view(images.shape)


def disk(radius: float, sigma: float) -> Tensor:
    """A disc of equal weights, softened by a Gaussian of 3x3: the kernel of a lens out of focus."""
    reach = int(radius) + 1
    line = torch.arange(-reach, reach + 1, dtype=torch.float64)
    flat = (line.square()[:, None] + line.square() <= radius**2).double()
    soft = torch.exp(-0.5 * (torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64) / sigma).square())
    soft = soft / soft.sum()
    return F.conv2d((flat / flat.sum())[None, None], torch.outer(soft, soft)[None, None], padding=1)[0, 0]


def motion(images: Tensor, radius: int, sigma: float, angle: Tensor) -> Tensor:
    """Blur every image along a direction of its own, to one side: it moved while the shutter was open.

    Args:
        images: `[B, C, H, W]`.
        radius: the kernel has 2 `radius` + 1 pixels.
        sigma: of the half Gaussian of weights along the way.
        angle: float64 `[B]` in degrees, 0 to the right, 90 down.
    """
    batch, channels, height, width = images.shape
    steps = torch.arange(2 * radius + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (steps / sigma).square())
    kernel = kernel / kernel.sum()
    direction = torch.deg2rad(angle.cpu().double())
    flat, total = images.flatten(2), torch.zeros_like(images)
    for step, weight in zip(steps.tolist(), kernel.tolist(), strict=True):
        right = (step * direction.cos() - 0.5).ceil().long()
        down = (step * direction.sin() - 0.5).ceil().long()
        columns = (torch.arange(width) + right[:, None]).clamp(0, width - 1)
        rows = (torch.arange(height) + down[:, None]).clamp(0, height - 1)
        places = (rows[:, :, None] * width + columns[:, None, :]).view(batch, 1, -1).to(images.device)
        total += weight * flat.gather(2, places.expand(-1, channels, -1)).view(images.shape)
    return total


def zoom(images: Tensor, factor: float) -> Tensor:
    """The middle of the images, enlarged bilinearly to the size they had."""
    height, width = images.shape[-2:]
    part = [math.ceil(n / factor) for n in (height, width)]
    top, left = (height - part[0]) // 2, (width - part[1]) // 2
    middle = images[..., top : top + part[0], left : left + part[1]]
    size = [round(n * factor) for n in part]
    large = F.interpolate(middle, size=size, mode="bilinear", align_corners=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return large[..., top : top + height, left : left + width]


def plasma(batch: int, size: int, decay: float, generator: torch.Generator) -> Tensor:
    """Clouds by the diamond-square algorithm on a torus, from 0 to 1 each.

    Args:
        batch: how many.
        size: at least this many pixels wide; the next power of two is made and cut.
        decay: the noise of a level of detail is `decay**2` times that of the next finer one.
        generator: of the noise.

    Returns:
        float32 `[batch, size, size]` on the generator's device.
    """
    side = 2 ** max(1, math.ceil(math.log2(size)))
    device = generator.device
    clouds = torch.zeros(batch, side, side, device=device)

    def around(total: Tensor, strength: float) -> Tensor:
        return total / 4 + strength * (2 * torch.rand(total.shape, generator=generator, device=device) - 1)

    step, strength = side, 1.0
    while step >= 2:
        half = step // 2
        corners = clouds[:, ::step, ::step]
        pairs = corners + corners.roll(-1, 1)
        middles = around(pairs + pairs.roll(-1, 2), strength)
        clouds[:, half::step, half::step] = middles
        clouds[:, ::step, half::step] = around(middles + middles.roll(1, 1) + corners + corners.roll(-1, 2), strength)
        clouds[:, half::step, ::step] = around(middles + middles.roll(1, 2) + corners + corners.roll(-1, 1), strength)
        step, strength = half, strength / decay**2
    low, high = clouds.amin((1, 2), keepdim=True), clouds.amax((1, 2), keepdim=True)
    return ((clouds - low) / (high - low))[:, :size, :size]


def distance(mask: Tensor) -> Tensor:
    """Euclidean distance of every pixel to the nearest one of the mask; infinity where the mask is empty.

    Args:
        mask: bool `[B, H, W]`.

    Returns:
        float32 `[B, H, W]`.
    """
    _, height, width = mask.shape
    free = torch.where(mask, 0.0, torch.inf)
    squares = [
        (torch.arange(n, device=mask.device)[:, None] - torch.arange(n, device=mask.device)).square().float()
        for n in (height, width)
    ]
    along = (free[:, :, None, :] + squares[1]).amin(-1)  # nearest of its row: [B, H, W]
    return (along[:, None, :, :] + squares[0][:, :, None]).amin(2).sqrt()


def equalised(images: Tensor) -> Tensor:
    """Whole numbers 0 to 255 of each image spread so that their distribution is even.

    Args:
        images: `[B, H, W]`.
    """
    flat = images.flatten(1).contiguous()
    ordered = flat.sort(1).values
    rank = torch.searchsorted(ordered, flat, right=True).to(images.dtype)
    least = torch.searchsorted(ordered, ordered[:, :1].contiguous(), right=True).to(images.dtype)
    spread = (rank - least) / (flat.shape[1] - least).clamp_min(1) * 255
    # One value everywhere has no distribution to even out.
    return torch.where(least == flat.shape[1], flat, spread.round()).view(images.shape)


def box_resize(images: Tensor, height: int, width: int) -> Tensor:
    """Every output pixel is the mean of the input pixels whose centres it covers, or the nearest one if enlarged."""
    rows, columns = (_box_matrix(n, m).to(images) for n, m in zip(images.shape[-2:], (height, width), strict=True))
    return rows @ images @ columns.mT


def _box_matrix(size: int, target: int) -> Tensor:
    scale = size / target
    centres = (torch.arange(target, dtype=torch.float64)[:, None] + 0.5) * scale
    away = (torch.arange(size, dtype=torch.float64) + 0.5 - centres) / max(scale, 1.0)
    covered = ((away > -0.5) & (away <= 0.5)).double()
    return covered / covered.sum(1, keepdim=True)
