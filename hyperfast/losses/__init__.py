"""Distillation losses as modules: over taps (`FeatureLoss`), with branches behind them (`BranchLoss`), over logits, and
over input gradients."""

from hyperfast.losses.activation_boundary import ActivationBoundary
from hyperfast.losses.attention_transfer import AttentionTransfer
from hyperfast.losses.base import BranchLoss, CompressedTeacherLoss, FeatureLoss, WeightedLoss
from hyperfast.losses.channel_wise_distillation import ChannelWiseDistillation
from hyperfast.losses.complementary_distillation import ComplementaryDistillation
from hyperfast.losses.connectors import Connector, TokenMap
from hyperfast.losses.factor_transfer import FactorTransfer, Paraphraser, Translator
from hyperfast.losses.feature_map_distillation import FeatureMapDistillation
from hyperfast.losses.fitnets import FitNets
from hyperfast.losses.flow_of_solution import FlowOfSolution
from hyperfast.losses.frequency_distillation import FrequencyDistillation
from hyperfast.losses.hierarchical_context import HierarchicalContext
from hyperfast.losses.implicit_clustering import ImplicitClustering
from hyperfast.losses.info_nce import InfoNCE
from hyperfast.losses.inter_channel_correlation import InterChannelCorrelation
from hyperfast.losses.jacobian_distillation import JacobianDistillation, JacobianStep
from hyperfast.losses.logit_distillation import CrossEntropyDistillation, LogitDistillation
from hyperfast.losses.one_for_all import OneForAll, one_for_all
from hyperfast.losses.projectors import StageProjector
from hyperfast.losses.relational_distillation import RelationalDistillation
from hyperfast.losses.similarity_preserving import SimilarityPreserving
from hyperfast.losses.sinkhorn import LocalWasserstein, SinkhornDistillation, transport_cost

__all__ = [
    "ActivationBoundary",
    "AttentionTransfer",
    "BranchLoss",
    "ChannelWiseDistillation",
    "ComplementaryDistillation",
    "CompressedTeacherLoss",
    "Connector",
    "CrossEntropyDistillation",
    "FactorTransfer",
    "FeatureLoss",
    "FeatureMapDistillation",
    "FitNets",
    "FlowOfSolution",
    "FrequencyDistillation",
    "HierarchicalContext",
    "ImplicitClustering",
    "InfoNCE",
    "InterChannelCorrelation",
    "JacobianDistillation",
    "JacobianStep",
    "LocalWasserstein",
    "LogitDistillation",
    "OneForAll",
    "Paraphraser",
    "RelationalDistillation",
    "SimilarityPreserving",
    "SinkhornDistillation",
    "StageProjector",
    "TokenMap",
    "Translator",
    "WeightedLoss",
    "one_for_all",
    "transport_cost",
]
