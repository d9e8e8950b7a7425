"""The public operations over tensors: argument checks, then one fused launch.

Layers (`hyperfast.nn`) and losses (`hyperfast.losses`) are thin holders of parameters over these functions.
Checks look at shapes, dtypes and devices only; none of them waits for the device.
"""

from hyperfast.functional.attention_transfer import attention_transfer
from hyperfast.functional.generate import generate
from hyperfast.functional.predict import fourier_features, positional_embedding, predict, squared_error

__all__ = [
    "attention_transfer",
    "fourier_features",
    "generate",
    "positional_embedding",
    "predict",
    "squared_error",
]
