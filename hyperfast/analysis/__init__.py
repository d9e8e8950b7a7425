"""What a run came to, in pictures: attention maps, curves and a self-contained HTML report."""

from hyperfast.analysis.attention import attention_maps
from hyperfast.analysis.figures import Curve, curves_svg, png_uri, svg
from hyperfast.analysis.report import Report

__all__ = ["Curve", "Report", "attention_maps", "curves_svg", "png_uri", "svg"]
