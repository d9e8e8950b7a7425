"""Layers: hypernetworks over any module, and the predictor of a network's weights."""

from hyperfast.nn.conditions import (
    Condition,
    ConstantCondition,
    ExternalCondition,
    LearnedCondition,
    PerLayerCondition,
    StochasticCondition,
)
from hyperfast.nn.cost import CostReport, CostRow
from hyperfast.nn.gate_diagnostics import GateRow, gate_diagnostics
from hyperfast.nn.hypernetize import hypernetize
from hyperfast.nn.hypernetwork import Hypernetwork, StepFactors
from hyperfast.nn.inherit import InheritReport, InheritRow, fold, inherit, recalibrate_norms
from hyperfast.nn.inherited import InheritedConv2d, InheritedLinear, load_balance_loss
from hyperfast.nn.inherited_structure import build_inherited, check_gates, inherited_layers
from hyperfast.nn.initialization import initialize
from hyperfast.nn.interop import load_hyperlight, load_nern, nern_state_dict
from hyperfast.nn.row_sampler import RowSampler
from hyperfast.nn.weight_predictor import WeightPredictor

__all__ = [
    "Condition",
    "ConstantCondition",
    "CostReport",
    "CostRow",
    "ExternalCondition",
    "GateRow",
    "Hypernetwork",
    "InheritReport",
    "InheritRow",
    "InheritedConv2d",
    "InheritedLinear",
    "LearnedCondition",
    "PerLayerCondition",
    "RowSampler",
    "StepFactors",
    "StochasticCondition",
    "WeightPredictor",
    "build_inherited",
    "check_gates",
    "fold",
    "gate_diagnostics",
    "hypernetize",
    "inherit",
    "inherited_layers",
    "initialize",
    "load_balance_loss",
    "load_hyperlight",
    "load_nern",
    "nern_state_dict",
    "recalibrate_norms",
]
