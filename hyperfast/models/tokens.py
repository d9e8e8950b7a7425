"""Networks over the patches of 32x32 images: a vision transformer and an MLP-Mixer.

Source: Dosovitskiy et al., arXiv 2010.11929, and Tolstikhin et al., arXiv 2105.01601, in sizes for small images.
Neither has a class token: the classifier reads the mean over the patches, so that every map has one token per patch.
All weights but the positions are those of linear layers, convolution and norms, which `hypernetize` and `inherit` know.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "Attention",
    "MixerBlock",
    "Mlp",
    "MlpMixer",
    "TransformerBlock",
    "VisionTransformer",
    "mixer_tiny32",
    "vit_tiny32",
]

_STAGES = 4
_STD = 0.02  # of the initial linear weights and positions


class Mlp(nn.Sequential):
    """Linear, GELU, linear, over the last axis."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class Attention(nn.Module):
    """Every token reads all tokens, with `heads` heads of width / heads channels: `[B, N, D]` to `[B, N, D]`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        split = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind()
        read = F.scaled_dot_product_attention(query, key, value)
        answer: Tensor = self.proj(read.transpose(1, 2).reshape(batch, tokens, width))
        return answer


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), and then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class MixerBlock(nn.Module):
    """x + what an MLP across the tokens makes of norm(x), and then x + what one across the channels does."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.token_mlp = Mlp(tokens, max(1, width // 2))
        self.norm2 = nn.LayerNorm(width)
        self.channel_mlp = Mlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_mlp(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        out: Tensor = x + self.channel_mlp(self.norm2(x))
        return out


class _PatchNetwork(nn.Module):
    """Patches to tokens (`embed`), four equal groups of blocks (`stages.0` to `stages.3`), `norm`, their mean, `fc`."""

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        width: int,
        depth: int,
        patch: int,
        image_size: int,
        block: Callable[[int], nn.Module],
    ) -> None:
        super().__init__()
        if depth < _STAGES or depth % _STAGES:
            raise ValueError(f"depth is {depth}; the blocks form four equal stages, so it must be 4, 8, 12, ...")
        if patch < 1 or image_size < patch or image_size % patch:
            raise ValueError(f"patch is {patch} and image_size {image_size}; patches must fill the image")
        self.image_size, self.tokens = image_size, (image_size // patch) ** 2
        self.embed = nn.Conv2d(in_channels, width, patch, patch)
        self.stages = nn.Sequential(
            *(nn.Sequential(*(block(self.tokens) for _ in range(depth // _STAGES))) for _ in range(_STAGES))
        )
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=_STD, a=-2 * _STD, b=2 * _STD)
                nn.init.zeros_(module.bias)

    def _placed(self, tokens: Tensor) -> Tensor:
        """The tokens, with whatever says where each of them comes from."""
        return tokens

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"the images are {list(x.shape)}; this network is for {self.image_size}x{self.image_size}: create it "
                "with another image_size, or resize the images"
            )
        tokens = self._placed(self.embed(x).flatten(2).transpose(1, 2))
        logits: Tensor = self.fc(self.norm(self.stages(tokens)).mean(1))
        return logits


class VisionTransformer(_PatchNetwork):
    """Patches with learned positions, and transformer blocks with the norms in front (arXiv 2010.11929).

    Args:
        num_classes: width of the logits.
        in_channels: channels of the images.
        width: D, channels of a token; the MLPs have 4 D.
        depth: blocks, a multiple of 4: the stages are four equal groups of them.
        patch: side of a patch, in pixels.
        heads: of the attention; None: one per 64 channels, at least one.
        image_size: side of the images, in pixels.

    Shape: images `[B, in_channels, image_size, image_size]` to logits `[B, num_classes]`. The stages end in token maps
    `[B, (image_size / patch)^2, D]`, the rows of the image one after the other.

    Raises:
        ValueError: a depth that is no multiple of 4, patches that do not fill the image, heads that do not divide D;
            in the forward, images of another size.

    Linear weights and positions start from a normal distribution of standard deviation 0.02, cut off at two of them,
    biases from 0, the patches' convolution as PyTorch has it. There is no dropout, and no class token.
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        in_channels: int = 3,
        width: int = 192,
        depth: int = 12,
        patch: int = 4,
        heads: int | None = None,
        image_size: int = 32,
    ) -> None:
        count = max(1, width // 64) if heads is None else heads
        if count < 1 or width % count:
            raise ValueError(f"heads is {count} and width {width}; the width must be a multiple of the heads")
        super().__init__(
            num_classes, in_channels, width, depth, patch, image_size, lambda _: TransformerBlock(width, count)
        )
        self.positions = nn.Parameter(torch.empty(1, self.tokens, width))
        nn.init.trunc_normal_(self.positions, std=_STD, a=-2 * _STD, b=2 * _STD)

    def _placed(self, tokens: Tensor) -> Tensor:
        return tokens + self.positions


class MlpMixer(_PatchNetwork):
    """Patches, and blocks of two MLPs: one across the tokens, one across the channels (arXiv 2105.01601).

    Args:
        num_classes: width of the logits.
        in_channels: channels of the images.
        width: D, channels of a token; the MLPs across the channels have 4 D, those across the tokens D / 2.
        depth: blocks, a multiple of 4: the stages are four equal groups of them.
        patch: side of a patch, in pixels.
        image_size: side of the images, in pixels.

    Shape: images `[B, in_channels, image_size, image_size]` to logits `[B, num_classes]`. The stages end in token maps
    `[B, (image_size / patch)^2, D]`, the rows of the image one after the other.

    Raises:
        ValueError: a depth that is no multiple of 4, patches that do not fill the image; in the forward, images of
            another size.

    Weights start as those of `VisionTransformer`.
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        in_channels: int = 3,
        width: int = 192,
        depth: int = 8,
        patch: int = 4,
        image_size: int = 32,
    ) -> None:
        super().__init__(
            num_classes, in_channels, width, depth, patch, image_size, lambda tokens: MixerBlock(width, tokens)
        )


def vit_tiny32(
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    width: int = 192,
    depth: int = 12,
    patch: int = 4,
    heads: int | None = None,
    image_size: int = 32,
) -> VisionTransformer:
    """64 tokens of 192 channels, 12 blocks of 3 heads; 5,379,748 parameters with 100 classes."""
    return VisionTransformer(
        num_classes,
        in_channels=in_channels,
        width=width,
        depth=depth,
        patch=patch,
        heads=heads,
        image_size=image_size,
    )


def mixer_tiny32(
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    width: int = 192,
    depth: int = 8,
    patch: int = 4,
    image_size: int = 32,
) -> MlpMixer:
    """64 tokens of 192 channels, 8 blocks; 2,501,796 parameters with 100 classes."""
    return MlpMixer(num_classes, in_channels=in_channels, width=width, depth=depth, patch=patch, image_size=image_size)
