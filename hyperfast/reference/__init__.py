"""Every operation in plain PyTorch: the specification in code, and the yardstick of the tests and benchmarks."""

from hyperfast.reference.attention_transfer import (
    MODES,
    attention_transfer,
    attention_transfer_backward,
    attention_transfer_with_coefficients,
)
from hyperfast.reference.generate import ACTIVATIONS, ENCODINGS, generate, generate_backward
from hyperfast.reference.greedy_chain import SIMILARITIES, greedy_chain

__all__ = [
    "ACTIVATIONS",
    "ENCODINGS",
    "MODES",
    "SIMILARITIES",
    "attention_transfer",
    "attention_transfer_backward",
    "attention_transfer_with_coefficients",
    "generate",
    "generate_backward",
    "greedy_chain",
]
