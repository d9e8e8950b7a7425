"""Spectra of weights: how much of one is in its first singular values, and what a smoother one would do."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hyperfast.analysis.weights import Weights, Workpiece, matrices

INDICES = ("signed", "unsigned")
AXES = ("flat", "spatial")


class Setting(NamedTuple):
    """One point of a sweep: the setting and what the network then reached."""

    value: float
    accuracy: float


def s_ratio(weight: Tensor) -> float:
    r"""Share of a weight's energy in the first half of its singular values.

    With the singular values :math:`s_1 \ge \dots \ge s_q` of the weight as a matrix `[out, everything else]`:

    .. math::
        S = \sum_{i \le \lfloor q / 2 \rfloor} s_i^2 \Big/ \sum_{i \le q} s_i^2

    0 for a matrix of one row or column, which has no half; NaN for a weight of zeros. In float64.

    Raises:
        ValueError: `weight` has fewer than two dimensions, or values that are not finite.

    Source: Choi et al., arXiv 2407.00356, section 3.1.
    """
    energy = torch.linalg.svdvals(_matrix(weight).double()).square()
    return float(energy[: len(energy) // 2].sum() / energy.sum())


def s_ratios(weights: Weights, names: Sequence[str] | None = None) -> dict[str, float]:
    """`s_ratio` by name; default of every parameter of two or more dimensions.

    Raises:
        ValueError: as `s_ratio`, with the name of the weight.
    """
    ratios = {}
    for name, weight in matrices(weights, names).items():
        try:
            ratios[name] = s_ratio(weight)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return ratios


def round_score(original: Mapping[str, float], reconstructed: Mapping[str, float]) -> float:
    r"""What a network gained in :math:`S`, averaged over the last half of its L layers.

    .. math::
        \frac{2}{L} \sum_{l > L / 2} (S_l - S^o_l)

    Where L is odd the layer in the middle is not counted, and the mean is taken over those that are.

    Args:
        original: `s_ratios` of the network that was reconstructed, layers in order.
        reconstructed: of the network of a round, the same names.

    Raises:
        ValueError: other names, or fewer than two layers.

    Source: Choi et al., arXiv 2407.00356, figure 3b.
    """
    if list(original) != list(reconstructed) or len(original) < 2:
        raise ValueError(
            f"there are {len(original)} and {len(reconstructed)} layers; expected the same names, at least two"
        )
    late = list(original)[(len(original) + 1) // 2 :]
    return sum(reconstructed[name] - original[name] for name in late) / len(late)


def modulate_singular_values(weight: Tensor, *, last: int = 15, factor: float) -> Tensor:
    """The weight with its last singular values, as a matrix `[out, everything else]`, multiplied by a factor.

    Args:
        weight: two or more dimensions.
        last: how many of the smallest singular values.
        factor: 1 changes nothing, 0 leaves them out.

    Returns:
        Shape and dtype of `weight`; computed in float64.

    Raises:
        ValueError: `last` is negative or more than there are, or as `s_ratio`.

    Source: Choi et al., arXiv 2407.00356, appendix A.
    """
    u, s, v = torch.linalg.svd(_matrix(weight).double(), full_matrices=False)
    if not 0 <= last <= len(s):
        raise ValueError(f"last is {last}; a weight {list(weight.shape)} has {len(s)} singular values")
    s[len(s) - last :] *= factor
    modulated: Tensor = (u * s) @ v
    return modulated.view(weight.shape).to(weight.dtype)


def low_pass(weight: Tensor, cutoff: float, *, index: str = "signed", axes: str = "flat") -> Tensor:
    r"""The weight with the high frequencies of its kernels damped by a Gaussian.

    Every kernel is multiplied by :math:`H(f) = \exp(-(f / D_0)^2 / 2)` between a Fourier transform and its inverse.

    Args:
        weight: of a convolution, `[out, in, *kernel]`.
        cutoff: :math:`D_0` in units of the frequency index; infinity changes nothing.
        index: what f counts. `"signed"`: periods per kernel, -4 to 4 for nine values. `"unsigned"`: the position in
            the transform, 0 to 8, which treats a frequency and its mirror image differently; the imaginary part that
            this leaves is dropped. The paper does not say which.
        axes: `"flat"`: the kernel is one row of values, as the paper has it. `"spatial"`: the transform runs over the
            kernel's own dimensions, and f is the length of the vector of frequencies.

    Returns:
        Real, shape and dtype of `weight`; computed in float64.

    Raises:
        ValueError: `weight` has no kernel, `cutoff` is not positive, or `index` or `axes` is unknown.

    Source: Choi et al., arXiv 2407.00356, appendix A.
    """
    if weight.ndim < 3:
        raise ValueError(f"weight is {list(weight.shape)}; expected that of a convolution, [out, in, *kernel]")
    if not cutoff > 0:
        raise ValueError(f"cutoff is {cutoff}; expected a positive frequency index")
    for name, given, known in (("index", index, INDICES), ("axes", axes, AXES)):
        if given not in known:
            raise ValueError(f"{name} is {given!r}; choose one of {', '.join(map(repr, known))}")
    kernels = weight.detach().double()
    kernels = kernels.flatten(2) if axes == "flat" else kernels
    dimensions = tuple(range(2, kernels.ndim))
    square = torch.zeros((), dtype=torch.float64, device=weight.device)
    for d in dimensions:
        size = kernels.shape[d]
        frequency = torch.arange(size, dtype=torch.float64, device=weight.device)
        if index == "signed":
            frequency = torch.minimum(frequency, size - frequency)
        square = square.unsqueeze(-1) + frequency.square()
    damped = torch.fft.fftn(kernels, dim=dimensions) * torch.exp(-0.5 * square / cutoff**2)
    real: Tensor = torch.fft.ifftn(damped, dim=dimensions).real
    return real.reshape(weight.shape).to(weight.dtype)


def sweep(
    module: nn.Module,
    block: str,
    values: Sequence[float],
    change: Callable[[Tensor, float], Tensor],
    evaluate: Callable[[nn.Module], float],
) -> list[Setting]:
    """Change the convolutions of one block in several ways and measure the network with each.

    Args:
        module: it is copied and stays as it is.
        block: path of the block, such as `"layer1.0"`; `""` is the whole network.
        values: settings, in order.
        change: `change(weight, value)` returns the weight to use instead.
        evaluate: the accuracy of a module, which is in eval mode.

    Raises:
        ValueError: the block has no convolution.
    """
    convolutions = {
        name: weight
        for name, weight in matrices(module).items()
        if weight.ndim >= 3 and (not block or name.startswith(f"{block}."))
    }
    if not convolutions:
        raise ValueError(f"block {block!r} has no convolution; give the path of a module that has, such as 'layer1.0'")
    workpiece = Workpiece(module)
    return [
        Setting(value, evaluate(workpiece.put({name: change(weight, value) for name, weight in convolutions.items()})))
        for value in values
    ]


def low_pass_sweep(
    module: nn.Module,
    block: str,
    cutoffs: Sequence[float],
    evaluate: Callable[[nn.Module], float],
    *,
    index: str = "signed",
    axes: str = "flat",
) -> list[Setting]:
    """`sweep` of `low_pass` over cutoff frequencies."""

    def change(weight: Tensor, cutoff: float) -> Tensor:
        return low_pass(weight, cutoff, index=index, axes=axes)

    return sweep(module, block, cutoffs, change, evaluate)


def singular_value_sweep(
    module: nn.Module,
    block: str,
    factors: Sequence[float],
    evaluate: Callable[[nn.Module], float],
    *,
    last: int = 15,
) -> list[Setting]:
    """`sweep` of `modulate_singular_values` over factors."""

    def change(weight: Tensor, factor: float) -> Tensor:
        return modulate_singular_values(weight, last=last, factor=factor)

    return sweep(module, block, factors, change, evaluate)


def _matrix(weight: Tensor) -> Tensor:
    if weight.ndim < 2:
        raise ValueError(f"weight is {list(weight.shape)}; expected two or more dimensions")
    matrix = weight.detach().flatten(1)
    if not math.isfinite(float(matrix.abs().sum(dtype=torch.float64))):
        raise ValueError("the weight has values that are not finite")
    return matrix
