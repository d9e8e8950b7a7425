"""Fused hypernetworks and layer-wise distillation for PyTorch.

    student = hyperfast.hypernetize(model)
    with hyperfast.taps(student, teacher, at="stages") as taps:
        logits = student(x)
        with torch.no_grad():
            teacher(x)
    loss = F.cross_entropy(logits, y) + hyperfast.losses.AttentionTransfer(beta=1000)(taps.student, taps.teacher)
"""

from hyperfast import functional, losses, optim
from hyperfast.backends import Backend, BackendUnavailable, explain, use_backend
from hyperfast.nn import Hypernetwork, hypernetize, inherit
from hyperfast.surgery import taps
from hyperfast.version import __version__

__all__ = [
    "Backend",
    "BackendUnavailable",
    "Hypernetwork",
    "__version__",
    "explain",
    "functional",
    "hypernetize",
    "inherit",
    "losses",
    "optim",
    "taps",
    "use_backend",
]
