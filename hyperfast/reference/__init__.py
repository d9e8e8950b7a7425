"""Every operation in plain PyTorch: the specification in code, and the yardstick of the tests and benchmarks."""

from hyperfast.reference.attention_transfer import (
    MODES,
    attention_transfer,
    attention_transfer_backward,
    attention_transfer_forward,
)
from hyperfast.reference.generate import ACTIVATIONS, ENCODINGS, generate, generate_backward

__all__ = [
    "ACTIVATIONS",
    "ENCODINGS",
    "MODES",
    "attention_transfer",
    "attention_transfer_backward",
    "attention_transfer_forward",
    "generate",
    "generate_backward",
]
