"""Ranger, the optimiser that NeRN trains its predictors with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from hyperfast.functional.ranger_update import check_ranger_options, ranger_update

_STATE = ("exp_avg", "exp_avg_sq", "slow", "step")
_OPTIONS = ("lr", "betas", "eps", "weight_decay", "k", "alpha", "centralize")
_Launches: TypeAlias = "dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], ...]]"


class Ranger(Optimizer):
    """RAdam with centralised gradients, decoupled weight decay and Lookahead; all tensors in one launch.

    The formula stands at `hyperfast.functional.ranger_update`. Defaults are those of NeRN, which differ from the
    published Ranger:

    - Gradients are always centralised there: its option to switch that off is read nowhere. Here `centralize=False`
      does switch it off.
    - The betas are (0.5, 0.999), not (0.95, 0.999), and weights decay by 1e-3.
    - `eps` is not negligible. Gradients of a predictor are as small as 1e-6, so that 1e-5 rules the denominator, and
      the scale of the loss sets the length of a step: a loss of ten times the size trains almost ten times as fast.
      Keep the loss that the learning rate was chosen for, for NeRN the root of the mean squared error.

    Args:
        params: parameters or groups of them; float16, bfloat16, float32 or float64.
        lr: learning rate, a number or a scalar tensor.
        betas: decay of the moments, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        k: steps between two meetings with the slow copy of Lookahead.
        alpha: share of the way that the slow copy goes, in (0, 1].
        centralize: whether the mean of each output row leaves the gradient of tensors of two dimensions or more.
        capturable: for a step inside a CUDA graph. The learning rate becomes a scalar tensor on the parameters'
            device, which schedulers of torch write to, so that a replay follows the schedule. Make one step before
            the capture: it allocates the state. The results are the same either way.

    State of a parameter: `step` (a scalar), `exp_avg`, `exp_avg_sq` and `slow` (float32, for float64 parameters
    float64), on its device and in its memory layout. A parameter without gradient is left out, state and all; a
    gradient that is NaN or infinite is not, and makes its parameter NaN.

    Raises:
        ValueError: an option out of its range.
        RuntimeError: a sparse gradient; a capture without `capturable`.

    Source: as `hyperfast.functional.ranger_update`; lessw2020/Ranger-Deep-Learning-Optimizer, as in NeRN.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 5e-3,
        betas: tuple[float, float] = (0.5, 0.999),
        eps: float = 1e-5,
        weight_decay: float = 1e-3,
        k: int = 6,
        alpha: float = 0.5,
        centralize: bool = True,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "k": k, "alpha": alpha,
            "centralize": centralize, "capturable": capturable,
        }  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; options that it leaves out are the optimiser's."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if not group["lr"] >= 0:
                raise ValueError(f"lr is {float(group['lr'])}; expected a number of at least 0")
            check_ranger_options(*(group[name] for name in ("betas", "eps", "weight_decay", "k", "alpha")))
        except ValueError:
            self.param_groups.pop()
            raise
        _place_rate(group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` returned; the tensors are copied."""
        super().load_state_dict(state_dict)
        # torch has given all state the dtype of its parameter, which is too coarse for half precision.
        indices = (index for group in state_dict["param_groups"] for index in group["params"])
        parameters = (p for group in self.param_groups for p in group["params"])
        for index, p in zip(indices, parameters, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                self.state[p][name] = value.to(p.device, copy=True)
        for group in self.param_groups:
            _place_rate(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step; `closure`, if given, computes the loss and its gradients again, and its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            options = {name: group[name] for name in _OPTIONS}
            for (device, _), tensors in self._by_device_and_dtype(group["params"]).items():
                _check_capture(device, group["capturable"])
                ranger_update(*tensors, **options)
        return loss

    def _by_device_and_dtype(self, parameters: Iterable[Tensor]) -> _Launches:
        """What one launch takes: lists of parameters, gradients and state, of those parameters with a gradient."""
        found: _Launches = {}
        for p in parameters:
            gradient = p.grad
            if gradient is None:
                continue
            if gradient.layout != torch.strided:
                raise RuntimeError(
                    f"Ranger got a {gradient.layout} gradient of a parameter {list(p.shape)}; it needs dense ones "
                    "(nn.Embedding(sparse=False))"
                )
            state = self._state_of(p)
            lists = found.setdefault((p.device, p.dtype), ([], [], [], [], [], []))
            for tensors, tensor in zip(lists, (p, gradient, *(state[name] for name in _STATE)), strict=True):
                tensors.append(tensor)
        return found

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=dtype)
            state["slow"] = torch.empty_like(parameter, dtype=dtype).copy_(parameter)
        return state


def _place_rate(group: dict[str, Any]) -> None:
    """Bring the learning rate of a capturable group to where its kernels read it."""
    if group["capturable"] and group["params"]:
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float64, device=group["params"][0].device)


def _check_capture(device: torch.device, capturable: bool) -> None:
    if device.type == "cuda" and not capturable and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a CUDA graph would replay one learning rate for ever; use Ranger(..., capturable=True)")
