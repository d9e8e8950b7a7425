"""Fused hypernetworks and layer-wise distillation for PyTorch."""

from hyperfast import functional
from hyperfast.backends import Backend, BackendUnavailable, explain, use_backend
from hyperfast.version import __version__



__all__ = ["Backend", "BackendUnavailable", "__version__", "explain", "functional", "use_backend"]
