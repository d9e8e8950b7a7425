"""Every operation in plain PyTorch: the specification in code, and the yardstick of the tests and benchmarks."""

from hyperfast.reference.attention_transfer import (
    MODES,
    attention_transfer,
    attention_transfer_backward,
    attention_transfer_with_coefficients,
)
from hyperfast.reference.generate import ACTIVATIONS, ENCODINGS, generate, generate_backward
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

__all__ = [
    "ACTIVATIONS",
    "ENCODINGS",
    "FUSIONS",
    "LEAKY_SLOPE",
    "MODES",
    "PRECISIONS",
    "PREDICT_ACTIVATIONS",
    "attention_transfer",
    "attention_transfer_backward",
    "attention_transfer_with_coefficients",
    "fourier_features",
    "generate",
    "generate_backward",
    "positional_embedding",
    "predict",
    "predict_backward",
    "squared_error",
    "squared_error_with_gradient",
]
