"""Factor transfer (arXiv 1802.04977): its distance, and the two networks that make factors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn

from hyperfast import functional
from hyperfast.losses.base import FeatureLoss, Weights

_MODES = ("factor", "attention")
_LEAKY_SLOPE = 0.1


class FactorTransfer(FeatureLoss):
    r"""The student's factors point where the teacher's do.

    With the factors of a sample flattened to M numbers x (student) and y (teacher):

    .. math::
        L_{factor} = \frac{1}{B M} \sum_b \left\| \frac{x_b}{\|x_b\|_2} - \frac{y_b}{\|y_b\|_2} \right\|_p^p

    Args:
        p: 1 or 2.
        mode: `"factor"`, the authors' code; `"attention"`, RepDistiller's, which is another loss: x and y are the means
            over the channels of the squared factor, `[B, N]`, and channels may differ in number. With p = 2 that is
            `AttentionTransfer`; RepDistiller's own is p = 1.
        weights: of the taps, see `FeatureLoss`; default 1 / L.
        beta: of the whole loss, see there.

    Shape:
        Factors `[B, ...]`, float16 to float64, student's and teacher's of one shape: `Translator` and the encoder of a
        pretrained `Paraphraser` make them from feature maps. Maps of one shape may be compared without. Result: a
        scalar, float32 (float64 for float64 maps).

    Notes:
        Invariant to the scale of each sample of either side; not to a shift. Zero, with zero gradient, for factors
        compared with themselves. A sample of which either factor is zero contributes nothing. The sum per sample is M
        times the mean, which is why beta is large: 500 in the authors' code for CIFAR-10, 200 in RepDistiller and
        Knowledge-Distillation-Zoo, 1000 in torchdistill.

    Example:
        >>> factor_transfer = FactorTransfer(beta=500)
        >>> factors = [translator(features) for features in taps.student.values()]
        >>> loss = factor_transfer(factors, [paraphraser.encoder(features) for features in taps.teacher.values()])

    Source: Kim, Park and Kwak, arXiv 1802.04977, and the official code (Jangho-Kim/Factor-Transfer-pytorch).
    """

    def __init__(self, p: int = 1, mode: str = "factor", weights: Weights | None = None, beta: float = 1.0) -> None:
        super().__init__(weights, beta)
        if mode not in _MODES:
            raise ValueError(f"mode is {mode!r}; choose one of {', '.join(map(repr, _MODES))}")
        if p not in (1, 2):
            raise ValueError(f"p is {p!r}; choose 1 or 2")
        self.p, self.mode = p, mode

    def per_tap(self, student: Sequence[Tensor], teacher: Sequence[Tensor], expected_grad: Tensor) -> Tensor:
        """Losses `[L]` of all taps, in one launch."""
        if self.mode == "attention":
            if self.p == 2:
                return functional.attention_transfer(student, teacher, expected_grad=expected_grad)
            student, teacher = [_energy(x) for x in student], [_energy(y) for y in teacher]
        return functional.unit_distance(student, teacher, p=self.p, expected_grad=expected_grad)

    def extra_repr(self) -> str:
        return f"p={self.p}, mode={self.mode!r}"


def _energy(factor: Tensor) -> Tensor:
    """Channel mean of the square, `[B, N]`, at least float32: float16 would overflow."""
    wide = factor.double() if factor.itemsize == 8 else factor.float()
    return wide.square().mean(1).flatten(1)


class Paraphraser(nn.Module):
    """Autoencoder of the teacher's feature maps: what it passes through its middle are the teacher's factors.

    Args:
        channels: C, of the feature maps.
        k: factors per channel; the middle has `round(k C)` channels, at least one.

    Attributes:
        encoder: `[B, C, H, W]` to the factors `[B, k C, H, W]`: three 3x3 convolutions C-C, C-kC, kC-kC.
        decoder: back: three 3x3 transposed convolutions kC-kC, kC-C, C-C.
        factors: k C.

    Notes:
        Each convolution has a bias and a LeakyReLU of slope 0.1 behind it, also the last one. There is no batch norm,
        as in the official code; Knowledge-Distillation-Zoo has some.

    Source: arXiv 1802.04977; Jangho-Kim/Factor-Transfer-pytorch. `hyperfast.recipes.pretrain_paraphrasers` trains it.
    """

    def __init__(self, channels: int, k: float = 0.5) -> None:
        super().__init__()
        self.factors = max(1, round(k * channels))
        self.encoder = _encoder(channels, self.factors)
        self.decoder = _stack(nn.ConvTranspose2d, self.factors, self.factors, channels, channels)

    def forward(self, features: Tensor) -> Tensor:
        """The feature maps as the factors know them, `[B, C, H, W]`."""
        reconstruction: Tensor = self.decoder(self.encoder(features))
        return reconstruction


class Translator(nn.Module):
    """The student's side of factor transfer: its feature maps in terms of the teacher's factors.

    Args:
        channels: C, of the student's feature maps.
        factors: channels of the teacher's factors, `Paraphraser.factors`.

    Notes:
        The layers are those of a paraphraser's encoder: 3x3 convolutions C-C, C-factors, factors-factors. It is trained
        with the student, and of no use afterwards.

    Source: arXiv 1802.04977; Jangho-Kim/Factor-Transfer-pytorch. RepDistiller has batch norm here.
    """

    def __init__(self, channels: int, factors: int) -> None:
        super().__init__()
        self.encoder = _encoder(channels, factors)

    def forward(self, features: Tensor) -> Tensor:
        """Factors `[B, factors, H, W]`."""
        factors: Tensor = self.encoder(features)
        return factors


def _encoder(channels: int, factors: int) -> nn.Sequential:
    return _stack(nn.Conv2d, channels, channels, factors, factors)


def _stack(convolution: type[nn.Conv2d] | type[nn.ConvTranspose2d], *channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(channels):
        layers += [convolution(before, after, 3, padding=1), nn.LeakyReLU(_LEAKY_SLOPE)]
    return nn.Sequential(*layers)
