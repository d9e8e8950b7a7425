"""What a run or a network came to, in numbers and pictures.

`network_report` compares a network with what was reconstructed from it and writes an HTML page and CSV files. What it
is made of can be called alone: spectra, differences, lines and planes between networks, attacks, corruptions, integers.
"""

from hyperfast.analysis.adversarial import calibrate_epsilon, fgsm
from hyperfast.analysis.answers import answers
from hyperfast.analysis.attention import attention_maps
from hyperfast.analysis.corruptions import CORRUPTIONS, corrupt
from hyperfast.analysis.differences import layer_differences, rmse
from hyperfast.analysis.figures import (
    Curve,
    Line,
    curves_svg,
    dots_svg,
    lines_svg,
    png_uri,
    require_matplotlib,
    surface_svg,
    svg,
)
from hyperfast.analysis.interpolation import interpolation
from hyperfast.analysis.landscape import Plane, landscape
from hyperfast.analysis.network_report import network_report
from hyperfast.analysis.network_study import StudyConfig, study_steps
from hyperfast.analysis.paired import mcnemar
from hyperfast.analysis.quantization import quantized_accuracy, quantized_weights, size_in_bytes
from hyperfast.analysis.report import Report
from hyperfast.analysis.spectra import low_pass, modulate_singular_values, s_ratio, s_ratios

__all__ = [
    "CORRUPTIONS",
    "Curve",
    "Line",
    "Plane",
    "Report",
    "StudyConfig",
    "answers",
    "attention_maps",
    "calibrate_epsilon",
    "corrupt",
    "curves_svg",
    "dots_svg",
    "fgsm",
    "interpolation",
    "landscape",
    "layer_differences",
    "lines_svg",
    "low_pass",
    "mcnemar",
    "modulate_singular_values",
    "network_report",
    "png_uri",
    "quantized_accuracy",
    "quantized_weights",
    "require_matplotlib",
    "rmse",
    "s_ratio",
    "s_ratios",
    "size_in_bytes",
    "study_steps",
    "surface_svg",
    "svg",
]
