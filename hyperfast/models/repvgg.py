"""RepVGG for 32x32 images: three branches in training, one 3x3 convolution afterwards.

Source: Ding et al., arXiv 2101.03697, with the module names and strides of chenyaofo/pytorch-cifar-models, whose
weights load. The first two stages have stride 1, so that 32x32 images end at 4x4.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["RepVGG", "RepVGGBlock", "repvgg_a0", "repvgg_a1", "repvgg_a2"]

_BLOCKS = (2, 4, 14, 1)
_STRIDES = (1, 2, 2, 2)


class RepVGGBlock(nn.Module):
    """relu(bn(conv3x3(x)) + bn(conv1x1(x)) + bn(x)), the last where shapes agree; fused, relu(conv3x3(x)).

    The activation reads the sum: where it is active cannot be seen from one branch.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: of both convolutions.
        deploy: the fused form, `rbr_reparam` in place of the branches.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, deploy: bool = False) -> None:
        super().__init__()
        self.stride = stride
        self.rbr_reparam: nn.Conv2d | None = None
        self.rbr_identity: nn.BatchNorm2d | None = None
        if deploy:
            self.rbr_reparam = nn.Conv2d(in_channels, out_channels, 3, stride, 1)
        else:
            if stride == 1 and in_channels == out_channels:
                self.rbr_identity = nn.BatchNorm2d(in_channels)
            self.rbr_dense = _ConvBN(in_channels, out_channels, 3, stride)
            self.rbr_1x1 = _ConvBN(in_channels, out_channels, 1, stride)
        self.nonlinearity = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        if self.rbr_reparam is not None:
            total = self.rbr_reparam(x)
        else:
            total = self.rbr_dense(x) + self.rbr_1x1(x)
            if self.rbr_identity is not None:
                total = total + self.rbr_identity(x)
        out: Tensor = self.nonlinearity(total)
        return out

    @torch.no_grad()
    def fuse_(self) -> None:
        """Replace the branches by `rbr_reparam`, which answers as they do in eval mode."""
        if self.rbr_reparam is not None:
            return
        weight, bias = self.rbr_dense.folded()
        pointwise, shift = self.rbr_1x1.folded()
        bias = bias + shift
        if self.rbr_identity is not None:
            scale, shift = _scale_and_shift(self.rbr_identity)
            pointwise = pointwise + scale.diag()[:, :, None, None]
            bias = bias + shift
        # On meta, so that no random numbers are drawn for weights that are replaced at once.
        fused = nn.Conv2d(weight.shape[1], weight.shape[0], 3, self.stride, 1, device="meta")
        fused.weight = nn.Parameter(weight + F.pad(pointwise, (1, 1, 1, 1)))
        fused.bias = nn.Parameter(bias)
        del self.rbr_dense, self.rbr_1x1
        self.rbr_identity = None
        self.rbr_reparam = fused


class _ConvBN(nn.Sequential):
    conv: nn.Conv2d
    bn: nn.BatchNorm2d

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one convolution that answers as both layers do in eval mode."""
        scale, shift = _scale_and_shift(self.bn)
        return _own(self.conv, "weight") * scale[:, None, None, None], shift


def _scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    scale = _own(norm, "weight") * (_own(norm, "running_var") + norm.eps).rsqrt()
    return scale, _own(norm, "bias") - _own(norm, "running_mean") * scale


def _own(layer: nn.Module, name: str) -> Tensor:
    tensor = getattr(layer, name, None)
    if not isinstance(tensor, Tensor):
        raise RuntimeError(
            f"cannot fuse this RepVGG: a {type(layer).__name__} in it has no {name} of its own. If a hypernetwork "
            "generates it, fuse what its materialize() returns; if freeze() has folded it, call fuse() before freeze()"
        )
    return tensor


class RepVGG(nn.Module):
    """Block `stage0`, stages `stage1` to `stage4` of 2, 4, 14 and 1 blocks, a linear classifier `linear`.

    Args:
        channels: of `stage0` and of the four stages.
        num_classes: width of the logits.
        in_channels: channels of the images.
        width: channels of `stage0`, `channels[0]` by default; with another number all change in proportion.
        deploy: make the fused form, into which fused weights load.

    Shape: images `[B, in_channels, H, W]`, any H and W of at least 1, to logits `[B, num_classes]`. On 32x32 images the
    stages end at 32x32, 32x32, 16x16, 8x8 and 4x4.

    Weights start as torch's layers do.
    """

    def __init__(
        self,
        channels: tuple[int, int, int, int, int],
        num_classes: int = 10,
        *,
        in_channels: int = 3,
        width: int | None = None,
        deploy: bool = False,
    ) -> None:
        super().__init__()
        first = channels[0] if width is None else width
        outputs = [max(1, round(count * first / channels[0])) for count in channels]
        self.stage0 = RepVGGBlock(in_channels, outputs[0], 1, deploy)
        self.stage1 = _stage(0, outputs, deploy)
        self.stage2 = _stage(1, outputs, deploy)
        self.stage3 = _stage(2, outputs, deploy)
        self.stage4 = _stage(3, outputs, deploy)
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(outputs[4], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage4(self.stage3(self.stage2(self.stage1(self.stage0(x)))))
        logits: Tensor = self.linear(self.gap(x).flatten(1))
        return logits

    def fuse(self) -> RepVGG:
        r"""A copy in eval mode with one 3x3 convolution per block (`rbr_reparam`) in place of the branches.

        .. math::
            s = \gamma / \sqrt{\sigma^2 + \epsilon}, \qquad
            W' = s_3 W_3 + \mathrm{pad}(s_1 W_1 + \mathrm{diag}(s_0)), \qquad b' = \sum_k \beta_k - s_k \mu_k

        over the 3x3, 1x1 and identity branches; outputs agree to rounding. Tap keys `stageN` and the activations stay.

        Raises:
            RuntimeError: weights are generated by a hypernetwork (fuse what `materialize` returns), or folded already.
        """
        model = copy.deepcopy(self).eval()
        for module in model.modules():
            if isinstance(module, RepVGGBlock):
                module.fuse_()
        return model


def _stage(index: int, channels: list[int], deploy: bool) -> nn.Sequential:
    inputs, outputs = channels[index : index + 2]
    first = RepVGGBlock(inputs, outputs, _STRIDES[index], deploy)
    return nn.Sequential(first, *(RepVGGBlock(outputs, outputs, 1, deploy) for _ in range(_BLOCKS[index] - 1)))


def repvgg_a0(num_classes: int = 10, *, in_channels: int = 3, width: int = 48, deploy: bool = False) -> RepVGG:
    """48, 48, 96, 192 and 1280 channels; 7,956,164 parameters with 100 classes, before `fuse`."""
    return RepVGG((48, 48, 96, 192, 1280), num_classes, in_channels=in_channels, width=width, deploy=deploy)


def repvgg_a1(num_classes: int = 10, *, in_channels: int = 3, width: int = 64, deploy: bool = False) -> RepVGG:
    """64, 64, 128, 256 and 1280 channels; 12,939,492 parameters with 100 classes, before `fuse`."""
    return RepVGG((64, 64, 128, 256, 1280), num_classes, in_channels=in_channels, width=width, deploy=deploy)


def repvgg_a2(num_classes: int = 10, *, in_channels: int = 3, width: int = 64, deploy: bool = False) -> RepVGG:
    """64, 96, 192, 384 and 1408 channels; 26,942,500 parameters with 100 classes, before `fuse`."""
    return RepVGG((64, 96, 192, 384, 1408), num_classes, in_channels=in_channels, width=width, deploy=deploy)
