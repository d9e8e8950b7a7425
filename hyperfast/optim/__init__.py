"""Optimisers: what an update of a generated or predicted network needs beyond `torch.optim`."""

from hyperfast.optim.ranger import Ranger

__all__ = ["Ranger"]
