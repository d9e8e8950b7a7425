"""Every operation in plain PyTorch: the specification in code, and the yardstick of the tests and benchmarks."""

from hyperfast.reference.activation_boundary import (
    activation_boundary,
    activation_boundary_backward,
    activation_boundary_forward,
    pack_signs,
)
from hyperfast.reference.attention_transfer import (
    MODES,
    attention_transfer,
    attention_transfer_backward,
    attention_transfer_forward,
)
from hyperfast.reference.channel_wise_distillation import (
    channel_wise_distillation,
    channel_wise_distillation_backward,
    channel_wise_distillation_forward,
)
from hyperfast.reference.cross_entropy_distillation import (
    DIVERGENCES,
    LOGIT_STATISTICS,
    cross_entropy_distillation,
    cross_entropy_distillation_backward,
    cross_entropy_distillation_forward,
)
from hyperfast.reference.fitnets import fitnets, fitnets_backward, fitnets_forward
from hyperfast.reference.flow_of_solution import (
    REDUCTIONS,
    flow_of_solution,
    flow_of_solution_backward,
    flow_of_solution_forward,
    flow_statistics,
)
from hyperfast.reference.gated_experts import gated_experts, gated_experts_backward
from hyperfast.reference.generate import ACTIVATIONS, ENCODINGS, generate, generate_backward
from hyperfast.reference.gram import gram_backward
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
from hyperfast.reference.relational_distance_angle import (
    relational_distance_angle,
    relational_distance_angle_forward,
    relational_statistics,
)
from hyperfast.reference.similarity_preserving import (
    similarity_preserving,
    similarity_preserving_forward,
    similarity_statistics,
)
from hyperfast.reference.sub_logit_distillation import (
    SUB_LOGIT_COMPONENTS,
    sub_logit_distillation,
    sub_logit_distillation_forward,
    sub_logit_distillation_gradients,
)
from hyperfast.reference.unit_distance import unit_distance, unit_distance_backward, unit_distance_forward

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
    "REDUCTIONS",
    "SIMILARITIES",
    "SUB_LOGIT_COMPONENTS",
    "activation_boundary",
    "activation_boundary_backward",
    "activation_boundary_forward",
    "adam_rank_one",
    "attention_transfer",
    "attention_transfer_backward",
    "attention_transfer_forward",
    "channel_wise_distillation",
    "channel_wise_distillation_backward",
    "channel_wise_distillation_forward",
    "cross_entropy_distillation",
    "cross_entropy_distillation_backward",
    "cross_entropy_distillation_forward",
    "fitnets",
    "fitnets_backward",
    "fitnets_forward",
    "flow_of_solution",
    "flow_of_solution_backward",
    "flow_of_solution_forward",
    "flow_statistics",
    "fourier_features",
    "gated_experts",
    "gated_experts_backward",
    "generate",
    "generate_backward",
    "gram_backward",
    "greedy_chain",
    "pack_signs",
    "positional_embedding",
    "predict",
    "predict_backward",
    "ranger_update",
    "relational_distance_angle",
    "relational_distance_angle_forward",
    "relational_statistics",
    "sgd_rank_one",
    "similarity_preserving",
    "similarity_preserving_forward",
    "similarity_statistics",
    "squared_error",
    "squared_error_with_gradient",
    "sub_logit_distillation",
    "sub_logit_distillation_forward",
    "sub_logit_distillation_gradients",
    "unit_distance",
    "unit_distance_backward",
    "unit_distance_forward",
]
