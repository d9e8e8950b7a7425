"""Distillation losses as modules: over taps (`FeatureLoss`) and over logits."""

from hyperfast.losses.attention_transfer import AttentionTransfer
from hyperfast.losses.base import FeatureLoss
from hyperfast.losses.feature_map_distillation import FeatureMapDistillation
from hyperfast.losses.logit_distillation import CrossEntropyDistillation, LogitDistillation

__all__ = [
    "AttentionTransfer",
    "CrossEntropyDistillation",
    "FeatureLoss",
    "FeatureMapDistillation",
    "LogitDistillation",
]
