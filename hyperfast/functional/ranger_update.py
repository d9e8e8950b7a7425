"""One step of the optimiser Ranger."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hyperfast.ops import ranger_update as _op
from hyperfast.ops._library import accumulator_dtype

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DTYPE_NAMES = "float16, bfloat16, float32 or float64"


@torch.no_grad()
def ranger_update(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    slow: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.5, 0.999),
    eps: float = 1e-5,
    weight_decay: float = 1e-3,
    k: int = 6,
    alpha: float = 0.5,
    centralize: bool = True,
) -> None:
    r"""One step of Ranger over all tensors, in place and in one launch: RAdam, centralised gradients and Lookahead.

    With :math:`t` the number of this step, :math:`\rho_\infty = 2 / (1 - \beta_2) - 1` and
    :math:`\rho = \rho_\infty - 2 t \beta_2^t / (1 - \beta_2^t)`:

    .. math::
        g &\leftarrow g - \mathrm{mean}(g) \text{ over all dimensions but the first, where there are two or more} \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        p &\leftarrow (1 - lr \cdot weight\_decay)\, p \\
        p &\leftarrow p - \frac{lr}{1 - \beta_1^t} \cdot \begin{cases}
            r\, m / (\sqrt{v} + eps) & \rho > 5 \\ m & \text{else} \end{cases}, \qquad
        r = \sqrt{(1 - \beta_2^t) \frac{(\rho - 4)(\rho - 2) \rho_\infty}{(\rho_\infty - 4)(\rho_\infty - 2) \rho}} \\
        p &\leftarrow s \leftarrow s + alpha\, (p - s) \text{ in every k-th step}

    Args:
        parameters: tensors of any shape, float16, bfloat16, float32 or float64. Changed.
        gradients: one per parameter, of its shape and dtype.
        exp_avg: the moments m, of the parameters' shapes; float32, for float64 parameters float64. Changed.
        exp_avg_sq: the moments v, likewise. Changed.
        slow: Lookahead's s, likewise; copies of the parameters before the first step. Changed.
        steps: updates made so far, one float32 scalar per parameter, where the parameter is. Increased by one.
        lr: learning rate. A CUDA graph replays the rate it was captured with, unless this is a scalar tensor on the
            parameters' device; float64 avoids a conversion.
        betas: decay of the moments, in [0, 1).
        eps: added to the root of v, which is not divided by 1 - beta2^t.
        weight_decay: decoupled, before the update.
        k: steps between two meetings with the slow copy.
        alpha: share of the way that the slow copy goes.
        centralize: whether the mean of each output row leaves the gradient.

    Raises:
        ValueError: lists of unequal lengths, unequal shapes, a wrong dtype or device, an option out of its range.

    Notes:
        A gradient that is NaN or infinite makes its parameter NaN for good (with `centralize` the row's others too):
        nothing is skipped, because finding out would wait for the device. The elements do not depend on the number
        of threads, and two runs agree bit for bit.

    Source: RAdam, arXiv 1908.03265; Lookahead, arXiv 1907.08610; gradient centralisation, arXiv 2004.01461; put
    together as NeRN (arXiv 2212.13554) runs them.
    """
    check_ranger_options(betas, eps, weight_decay, k, alpha)
    lists = {
        "gradients": gradients, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "slow": slow, "steps": steps
    }  # fmt: skip
    for name, tensors in lists.items():
        if len(tensors) != len(parameters):
            raise ValueError(f"{len(tensors)} {name} for {len(parameters)} parameters; give one for each")
    if not parameters:
        return
    device = parameters[0].device
    for index, tensors in enumerate(zip(parameters, *lists.values(), strict=True)):
        _check_tensors(index, device, *tensors)
    _op.ranger_update(
        parameters, gradients, exp_avg, exp_avg_sq, slow, steps, _rate(lr, device),
        betas[0], betas[1], eps, weight_decay, k, alpha, centralize,
    )  # fmt: skip


def check_ranger_options(betas: tuple[float, float], eps: float, weight_decay: float, k: int, alpha: float) -> None:
    """Raise a ValueError that names the option which is out of its range."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas is {betas}; expected two numbers in [0, 1)")
    if not eps >= 0:
        raise ValueError(f"eps is {eps}; expected a number of at least 0")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay is {weight_decay}; expected a number of at least 0")
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1 step")
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha is {alpha}; expected a number in (0, 1]")


def _check_tensors(
    index: int, device: torch.device, p: Tensor, gradient: Tensor, m: Tensor, v: Tensor, slow: Tensor, step: Tensor
) -> None:
    """Raise a ValueError unless the gradient and the state of parameter `p` fit it."""
    shape, dtype = p.shape, p.dtype
    if dtype not in _DTYPES or p.device != device:
        raise ValueError(f"parameter {index} is {dtype} on {p.device}; expected {_DTYPE_NAMES} on {device}")
    state = accumulator_dtype(dtype)
    # A kernel writes to all of these: one that does not fit is memory of another. Written out, as every step runs it.
    if (
        gradient.shape == m.shape == v.shape == slow.shape == shape
        and gradient.dtype == dtype
        and m.dtype == v.dtype == slow.dtype == state
        and gradient.device == m.device == v.device == slow.device == step.device == device
        and gradient.layout == torch.strided
        and step.dtype == torch.float32
        and step.ndim == 0
    ):
        return
    expected = {"gradient": dtype, "exp_avg": state, "exp_avg_sq": state, "slow": state}
    found = ", ".join(
        f"{name} {tensor.layout} {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        for name, tensor in zip((*expected, "step"), (gradient, m, v, slow, step), strict=True)
    )
    wanted = ", ".join(f"{name} {kind}" for name, kind in expected.items())
    raise ValueError(
        f"parameter {index} is {dtype} {list(shape)} on {device}; expected dense tensors of that shape and device "
        f"({wanted}) and a float32 scalar step, got {found}"
    )


def _rate(lr: float | Tensor, device: torch.device) -> Tensor:
    """The learning rate as the operation takes it: float64, on the device of the parameters or on the CPU."""
    if not isinstance(lr, Tensor):
        return torch.tensor(lr, dtype=torch.float64)
    if lr.ndim or lr.device not in (device, torch.device("cpu")):
        raise ValueError(f"lr is a tensor {list(lr.shape)} on {lr.device}; expected a scalar on {device} or the CPU")
    return lr.double()
