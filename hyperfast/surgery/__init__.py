"""Any `nn.Module`: which parameters to generate, and where to read feature maps."""

from hyperfast.surgery.folding import fold_batch_norm, freeze
from hyperfast.surgery.select import Role, Select, Target, select_parameters
from hyperfast.surgery.taps import Tap, TapKey, TapRecord, Taps, find_taps, taps

__all__ = [
    "Role",
    "Select",
    "Tap",
    "TapKey",
    "TapRecord",
    "Taps",
    "Target",
    "find_taps",
    "fold_batch_norm",
    "freeze",
    "select_parameters",
    "taps",
]
