"""Optimisers: what an update of a generated or predicted network needs beyond `torch.optim`."""

from hyperfast.optim.factored_head import cannot_factor, clip_grad_norm_, factor_head, total_grad_norm
from hyperfast.optim.ranger import Ranger

__all__ = [
    "Ranger",
    "cannot_factor",
    "clip_grad_norm_",
    "factor_head",
    "total_grad_norm",
]
