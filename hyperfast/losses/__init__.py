"""Distillation losses as modules: over taps (`FeatureLoss`), over logits, and over input gradients."""

from hyperfast.losses.attention_transfer import AttentionTransfer
from hyperfast.losses.base import CompressedTeacherLoss, FeatureLoss
from hyperfast.losses.feature_map_distillation import FeatureMapDistillation
from hyperfast.losses.flow_of_solution import FlowOfSolution
from hyperfast.losses.jacobian_distillation import JacobianDistillation, JacobianStep
from hyperfast.losses.logit_distillation import CrossEntropyDistillation, LogitDistillation
from hyperfast.losses.relational_distillation import RelationalDistillation
from hyperfast.losses.similarity_preserving import SimilarityPreserving

__all__ = [
    "AttentionTransfer",
    "CompressedTeacherLoss",
    "CrossEntropyDistillation",
    "FeatureLoss",
    "FeatureMapDistillation",
    "FlowOfSolution",
    "JacobianDistillation",
    "JacobianStep",
    "LogitDistillation",
    "RelationalDistillation",
    "SimilarityPreserving",
]
