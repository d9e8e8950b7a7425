"""Every operation in plain PyTorch: the specification in code, and the yardstick of the tests and benchmarks."""

from hyperfast.reference.attention_transfer import (
    MODES,
    attention_transfer,
    attention_transfer_backward,
    attention_transfer_forward,
)
from hyperfast.reference.cross_entropy_distillation import (
    DIVERGENCES,
    LOGIT_STATISTICS,
    cross_entropy_distillation,
    cross_entropy_distillation_backward,
    cross_entropy_distillation_forward,
)
from hyperfast.reference.generate import ACTIVATIONS, ENCODINGS, generate, generate_backward
from hyperfast.reference.greedy_chain import SIMILARITIES, greedy_chain
from hyperfast.reference.predict import (
    FUSIONS,
    LEAKY_SLOPE,
    PRECISIONS,
    PREDICT_ACTIVATIONS,
    fourier_features,
    positional_embedding,
    predict,
    predict_backward,
    squared_error,
    squared_error_with_gradient,
)
from hyperfast.reference.ranger_update import ranger_update
from hyperfast.reference.rank_one_update import adam_rank_one, sgd_rank_one

__all__ = [
    "ACTIVATIONS",
    "DIVERGENCES",
    "ENCODINGS",
    "FUSIONS",
    "LEAKY_SLOPE",
    "LOGIT_STATISTICS",
    "MODES",
    "PRECISIONS",
    "PREDICT_ACTIVATIONS",
    "SIMILARITIES",
    "adam_rank_one",
    "attention_transfer",
    "attention_transfer_backward",
    "attention_transfer_forward",
    "cross_entropy_distillation",
    "cross_entropy_distillation_backward",
    "cross_entropy_distillation_forward",
    "fourier_features",
    "generate",
    "generate_backward",
    "greedy_chain",
    "positional_embedding",
    "predict",
    "predict_backward",
    "ranger_update",
    "sgd_rank_one",
    "squared_error",
    "squared_error_with_gradient",
]
