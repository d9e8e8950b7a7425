"""Distillation losses as modules: over taps (`FeatureLoss`) and over logits."""

from hyperfast.losses.attention_transfer import AttentionTransfer
from hyperfast.losses.base import CompressedTeacherLoss, FeatureLoss
from hyperfast.losses.feature_map_distillation import FeatureMapDistillation
from hyperfast.losses.flow_of_solution import FlowOfSolution
from hyperfast.losses.logit_distillation import LogitDistillation
from hyperfast.losses.relational_distillation import RelationalDistillation
from hyperfast.losses.similarity_preserving import SimilarityPreserving

__all__ = [
    "AttentionTransfer",
    "CompressedTeacherLoss",
    "FeatureLoss",
    "FeatureMapDistillation",
    "FlowOfSolution",
    "LogitDistillation",
    "RelationalDistillation",
    "SimilarityPreserving",
]
