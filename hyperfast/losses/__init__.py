"""Distillation losses as modules: over taps (`FeatureLoss`) and over logits."""

from hyperfast.losses.activation_boundary import ActivationBoundary
from hyperfast.losses.attention_transfer import AttentionTransfer
from hyperfast.losses.base import FeatureLoss
from hyperfast.losses.channel_wise_distillation import ChannelWiseDistillation
from hyperfast.losses.factor_transfer import FactorTransfer, Paraphraser, Translator
from hyperfast.losses.feature_map_distillation import FeatureMapDistillation
from hyperfast.losses.fitnets import FitNets
from hyperfast.losses.logit_distillation import LogitDistillation

__all__ = [
    "ActivationBoundary",
    "AttentionTransfer",
    "ChannelWiseDistillation",
    "FactorTransfer",
    "FeatureLoss",
    "FeatureMapDistillation",
    "FitNets",
    "LogitDistillation",
    "Paraphraser",
    "Translator",
]
