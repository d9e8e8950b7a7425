"""The public operations over tensors: argument checks, then one fused launch; quantisation is plain PyTorch.

Layers (`hyperfast.nn`) and losses (`hyperfast.losses`) are thin holders of parameters over these functions.
Checks look at shapes, dtypes and devices only; none of them waits for the device.
"""

from hyperfast.functional.attention_transfer import attention_transfer
from hyperfast.functional.generate import generate
from hyperfast.functional.quantize import dequantize, fake_quantize, quantize

__all__ = ["attention_transfer", "dequantize", "fake_quantize", "generate", "quantize"]
