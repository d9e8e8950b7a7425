"""The public operations over tensors: argument checks, then one fused launch; quantisation is plain PyTorch.

Layers (`hyperfast.nn`) and losses (`hyperfast.losses`) are thin holders of parameters over these functions.
Checks look at shapes, dtypes and devices only; none of them waits for the device.
"""

from hyperfast.functional.activation_boundary import activation_boundary, pack_signs
from hyperfast.functional.attention_transfer import attention_transfer
from hyperfast.functional.channel_wise_distillation import channel_wise_distillation
from hyperfast.functional.cross_entropy_distillation import cross_entropy_distillation
from hyperfast.functional.fitnets import fitnets
from hyperfast.functional.flow_of_solution import flow_of_solution, flow_statistics
from hyperfast.functional.gated_experts import gated_experts
from hyperfast.functional.generate import generate
from hyperfast.functional.greedy_chain import greedy_chain
from hyperfast.functional.predict import fourier_features, positional_embedding, predict, squared_error
from hyperfast.functional.quantize import dequantize, fake_quantize, quantize
from hyperfast.functional.ranger_update import ranger_update
from hyperfast.functional.rank_one_update import adam_rank_one, sgd_rank_one
from hyperfast.functional.relational_distance_angle import relational_distance_angle, relational_statistics
from hyperfast.functional.similarity_preserving import similarity_preserving, similarity_statistics
from hyperfast.functional.sub_logit_distillation import SubLogitLosses, sub_logit_distillation
from hyperfast.functional.unit_distance import unit_distance

__all__ = [
    "SubLogitLosses",
    "activation_boundary",
    "adam_rank_one",
    "attention_transfer",
    "channel_wise_distillation",
    "cross_entropy_distillation",
    "dequantize",
    "fake_quantize",
    "fitnets",
    "flow_of_solution",
    "flow_statistics",
    "fourier_features",
    "gated_experts",
    "generate",
    "greedy_chain",
    "pack_signs",
    "positional_embedding",
    "predict",
    "quantize",
    "ranger_update",
    "relational_distance_angle",
    "relational_statistics",
    "sgd_rank_one",
    "similarity_preserving",
    "similarity_statistics",
    "squared_error",
    "sub_logit_distillation",
    "unit_distance",
]
