"""Every operation in plain PyTorch: the specification in code, and the yardstick of the tests and benchmarks."""

from hyperfast.reference.attention_transfer import (
    MODES,
    attention_transfer,
    attention_transfer_backward,
    attention_transfer_forward,
)
from hyperfast.reference.generate import ACTIVATIONS, ENCODINGS, generate, generate_backward
from hyperfast.reference.greedy_chain import SIMILARITIES, greedy_chain
from hyperfast.reference.ranger_update import ranger_update
from hyperfast.reference.rank_one_update import adam_rank_one, sgd_rank_one

__all__ = [
    "ACTIVATIONS",
    "ENCODINGS",
    "MODES",
    "SIMILARITIES",
    "adam_rank_one",
    "attention_transfer",
    "attention_transfer_backward",
    "attention_transfer_forward",
    "generate",
    "generate_backward",
    "greedy_chain",
    "ranger_update",
    "sgd_rank_one",
]
