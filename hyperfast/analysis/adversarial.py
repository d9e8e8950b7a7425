"""Images changed against a network, within a bound on every pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperfast.analysis.answers import Answers, Images, answers, evaluating, normalised


class Calibration(NamedTuple):
    """A bound of the attack, in [0, 1] as pixels are, and the accuracy under it."""

    epsilon: float
    accuracy: float


def fgsm(
    module: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    steps: int = 1,
    step_size: float | None = None,
) -> Tensor:
    r"""The fast gradient sign method, in one step or iterated (I-FGSM).

    .. math::
        x_{t+1} = \mathrm{clip}_{[0, 1] \cap [x_0 - \epsilon, x_0 + \epsilon]}
            \big(x_t + a\, \mathrm{sign}\, \nabla_x L(x_t, y)\big)

    L is the cross-entropy with the labels. The module runs in eval mode, its mode is put back, and its parameters
    receive no gradients.

    Args:
        module: maps normalised images to logits.
        images: floats `[B, C, H, W]` in [0, 1], before normalisation: epsilon is in these units.
        labels: int64 `[B]`.
        epsilon: bound on the change of every pixel, for instance 2 / 255.
        mean: the network's normalisation, per channel.
        std: as `mean`.
        steps: 1 is FGSM.
        step_size: a; default `epsilon / steps`.

    Returns:
        The changed images, in [0, 1].

    Raises:
        ValueError: `epsilon` is negative or `steps` less than 1.

    Source: Goodfellow et al., arXiv 1412.6572; Kurakin et al., arXiv 1607.02533.
    """
    if epsilon < 0 or steps < 1:
        raise ValueError(f"epsilon is {epsilon} and steps {steps}; expected at least 0 and 1")
    size = epsilon / steps if step_size is None else step_size
    start = images.detach()
    changed = start
    with evaluating(module):
        for _ in range(steps):
            with torch.enable_grad():
                leaf = changed.detach().requires_grad_()
                loss = F.cross_entropy(module(normalised(leaf, mean, std)), labels, reduction="sum")
                (gradient,) = torch.autograd.grad(loss, leaf)
            moved = changed + size * gradient.sign()
            changed = torch.minimum(torch.maximum(moved, start - epsilon), start + epsilon).clamp(0, 1)
    return changed


def attacked(
    module: nn.Module,
    data: Images,
    epsilon: float,
    *,
    steps: int = 1,
    step_size: float | None = None,
    batch_size: int = 500,
) -> Answers:
    """What a network answers when every image is changed against it by `fgsm`.

    Raises:
        ValueError: as `fgsm` and `answers`.
    """

    def change(images: Tensor, labels: Tensor) -> Tensor:
        return fgsm(module, images, labels, epsilon, mean=data.mean, std=data.std, steps=steps, step_size=step_size)

    return answers(module, data, change=change, batch_size=batch_size)


def calibrate_epsilon(
    module: nn.Module,
    data: Images,
    accuracy: float,
    *,
    steps: int = 1,
    most: float = 16 / 255,
    halvings: int = 12,
    batch_size: int = 500,
) -> Calibration:
    """The bound under which a network still has a given accuracy, by bisection.

    Papers often print the accuracy and leave out the bound: found here for the original network, it can then be used
    for all others.

    Args:
        module: the network.
        data: images.
        accuracy: what is to be left, in [0, 1].
        steps: of the attack, as in `fgsm`; `step_size` is `epsilon / steps`.
        most: where the search ends.
        halvings: of the interval [0, most].
        batch_size: images at a time.

    Returns:
        The bound tried whose accuracy came nearest; the smaller one of equals.

    Raises:
        ValueError: the network does not have this accuracy without an attack, or still has more at `most`.
    """
    clean = answers(module, data, batch_size=batch_size).accuracy
    if accuracy > clean:
        raise ValueError(f"accuracy is {accuracy:.4f}, but the network has {clean:.4f} without any attack")
    worst = attacked(module, data, most, steps=steps, batch_size=batch_size).accuracy
    if worst > accuracy:
        raise ValueError(f"accuracy is {accuracy:.4f}, but at epsilon = {most:.5f} it is still {worst:.4f}; raise most")
    tried = [Calibration(0.0, clean), Calibration(most, worst)]
    low, high = 0.0, most
    for _ in range(halvings):
        middle = (low + high) / 2
        reached = attacked(module, data, middle, steps=steps, batch_size=batch_size).accuracy
        tried.append(Calibration(middle, reached))
        if reached == accuracy:
            break
        low, high = (middle, high) if reached > accuracy else (low, middle)
    return min(tried, key=lambda point: (abs(point.accuracy - accuracy), point.epsilon))
