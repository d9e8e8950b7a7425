"""Distillation losses as modules: over taps (`FeatureLoss`), over logits, and over input gradients."""

from hyperfast.losses.attention_transfer import AttentionTransfer
from hyperfast.losses.base import FeatureLoss
from hyperfast.losses.feature_map_distillation import FeatureMapDistillation
from hyperfast.losses.jacobian_distillation import JacobianDistillation, JacobianStep
from hyperfast.losses.logit_distillation import CrossEntropyDistillation, LogitDistillation

__all__ = [
    "AttentionTransfer",
    "CrossEntropyDistillation",
    "FeatureLoss",
    "FeatureMapDistillation",
    "JacobianDistillation",
    "JacobianStep",
    "LogitDistillation",
]
