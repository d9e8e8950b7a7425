"""Any `nn.Module`: which parameters to generate or cover, in which order, and where to read feature maps."""

from hyperfast.surgery.coverage import Coverage, cover
from hyperfast.surgery.folding import fold_batch_norm, freeze
from hyperfast.surgery.permutation import Permutation, find_permutation, permutation_bits
from hyperfast.surgery.relabel import KeptGroup, RelabelledGroup, Relabelling, relabel
from hyperfast.surgery.select import Role, Select, Target, select_parameters
from hyperfast.surgery.taps import Tap, TapKey, TapRecord, Taps, find_taps, taps
from hyperfast.surgery.tiling import CoveredTensor

__all__ = [
    "Coverage",
    "CoveredTensor",
    "KeptGroup",
    "Permutation",
    "RelabelledGroup",
    "Relabelling",
    "Role",
    "Select",
    "Tap",
    "TapKey",
    "TapRecord",
    "Taps",
    "Target",
    "cover",
    "find_permutation",
    "find_taps",
    "fold_batch_norm",
    "freeze",
    "permutation_bits",
    "relabel",
    "select_parameters",
    "taps",
]
