"""Every operation in plain PyTorch: the specification in code, and the yardstick of the tests and benchmarks."""

from hyperfast.reference.attention_transfer import (
    MODES,
    attention_transfer,
    attention_transfer_backward,
    attention_transfer_with_coefficients,
)
from hyperfast.reference.generate import ACTIVATIONS, ENCODINGS, generate, generate_backward
from hyperfast.reference.ranger_update import ranger_update

__all__ = [
    "ACTIVATIONS",
    "ENCODINGS",
    "MODES",
    "attention_transfer",
    "attention_transfer_backward",
    "attention_transfer_with_coefficients",
    "generate",
    "generate_backward",
    "ranger_update",
]
