"""Distillation losses as modules: over taps (`FeatureLoss`), over logits, and over input gradients."""

from hyperfast.losses.activation_boundary import ActivationBoundary
from hyperfast.losses.attention_transfer import AttentionTransfer
from hyperfast.losses.base import CompressedTeacherLoss, FeatureLoss
from hyperfast.losses.channel_wise_distillation import ChannelWiseDistillation
from hyperfast.losses.connectors import Connector
from hyperfast.losses.factor_transfer import FactorTransfer, Paraphraser, Translator
from hyperfast.losses.feature_map_distillation import FeatureMapDistillation
from hyperfast.losses.fitnets import FitNets
from hyperfast.losses.flow_of_solution import FlowOfSolution
from hyperfast.losses.jacobian_distillation import JacobianDistillation, JacobianStep
from hyperfast.losses.logit_distillation import CrossEntropyDistillation, LogitDistillation
from hyperfast.losses.relational_distillation import RelationalDistillation
from hyperfast.losses.similarity_preserving import SimilarityPreserving

__all__ = [
    "ActivationBoundary",
    "AttentionTransfer",
    "ChannelWiseDistillation",
    "CompressedTeacherLoss",
    "Connector",
    "CrossEntropyDistillation",
    "FactorTransfer",
    "FeatureLoss",
    "FeatureMapDistillation",
    "FitNets",
    "FlowOfSolution",
    "JacobianDistillation",
    "JacobianStep",
    "LogitDistillation",
    "Paraphraser",
    "RelationalDistillation",
    "SimilarityPreserving",
    "Translator",
]
