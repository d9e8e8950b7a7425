"""Training procedures: supervised training, distillation, inheriting, comparisons of them, and the files they write."""

from hyperfast.recipes.artifact import Artifact
from hyperfast.recipes.checkpoint import Checkpoint
from hyperfast.recipes.compare import compare
from hyperfast.recipes.comparison import ComparedRun, Comparison, PairedDifference
from hyperfast.recipes.compress import CompressResult, RoundRecord, compress, continuation
from hyperfast.recipes.compress_config import CompressConfig, GuideConfig
from hyperfast.recipes.config import TrainConfig
from hyperfast.recipes.distill import Distillation, distill
from hyperfast.recipes.distill_config import METHODS, DistillConfig, LossTerm, Method
from hyperfast.recipes.evaluation import Evaluation, evaluate
from hyperfast.recipes.inherit import inherit_sweep
from hyperfast.recipes.inherit_plan import InheritConfig, InheritPlan, TuneConfig
from hyperfast.recipes.objective import CrossEntropy, Objective, StepLosses
from hyperfast.recipes.paraphraser import pretrain_paraphrasers
from hyperfast.recipes.predictor_storage import fake_quantized
from hyperfast.recipes.result import EpochRecord, TrainResult
from hyperfast.recipes.schedules import TapWeights, cosine_with_warmup
from hyperfast.recipes.size_report import SizeReport
from hyperfast.recipes.trainer import CHECKPOINT, Trainer
from hyperfast.recipes.training import RunOptions, fit, train

__all__ = [
    "CHECKPOINT",
    "METHODS",
    "Artifact",
    "Checkpoint",
    "ComparedRun",
    "Comparison",
    "CompressConfig",
    "CompressResult",
    "CrossEntropy",
    "DistillConfig",
    "Distillation",
    "EpochRecord",
    "Evaluation",
    "GuideConfig",
    "InheritConfig",
    "InheritPlan",
    "LossTerm",
    "Method",
    "Objective",
    "PairedDifference",
    "RoundRecord",
    "RunOptions",
    "SizeReport",
    "StepLosses",
    "TapWeights",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "TuneConfig",
    "compare",
    "compress",
    "continuation",
    "cosine_with_warmup",
    "distill",
    "evaluate",
    "fake_quantized",
    "fit",
    "inherit_sweep",
    "pretrain_paraphrasers",
    "train",
]
