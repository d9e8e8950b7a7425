"""Figures as text to put into a page: SVG that follows the page's colours, PNG as data URIs."""

from __future__ import annotations

import base64
import contextlib
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from torch import Tensor

# Legible on white and on near-black, and apart from one another for the colour-blind.
COLORS = ("#2f7fd1", "#d9730d", "#1f9d63", "#b5529c", "#7a6ff0", "#8a8d91")

# Stands for the page's text colour while matplotlib draws; `svg` replaces it.
_INK = "#010203"
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hyperfast",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlesize": 12,
    "axes.titlecolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.color": _INK,
    "legend.frameon": False,
}


# Beyond as many lines as there are colours, another stroke and another marker tell them apart.
_STROKES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
_MARKERS = ("o", "D", "s", "^")


@dataclass(frozen=True)
class Curve:
    """One line of a chart: a mean over runs, with a band from the lowest to the highest run.

    Attributes:
        label: for the legend.
        runs: values of each run at 1, 2, ... (epochs); runs may have different lengths. NaN leaves a gap.
    """

    label: str
    runs: Sequence[Sequence[float]]

    def band(self) -> tuple[list[float], list[float], list[float]]:
        """Mean, minimum and maximum at each epoch, over the runs that have a finite value there."""
        rows: list[tuple[float, float, float]] = []
        for epoch in range(max(map(len, self.runs), default=0)):
            values = [run[epoch] for run in self.runs if epoch < len(run) and math.isfinite(run[epoch])]
            row = (sum(values) / len(values), min(values), max(values)) if values else (math.nan,) * 3
            rows.append(row)
        return [mean for mean, _, _ in rows], [low for _, low, _ in rows], [high for _, _, high in rows]


@dataclass(frozen=True)
class Line:
    """One line of a chart of y over x.

    Attributes:
        label: for the legend.
        x: places.
        y: as many values; NaN leaves a gap.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ValueError(f"line {self.label!r} has {len(self.x)} places but {len(self.y)} values")


def curves_svg(
    curves: Sequence[Curve],
    *,
    ylabel: str,
    percent: bool = False,
    log: bool = False,
    reference: tuple[str, float] | None = None,
) -> str:
    """A chart of curves against the epoch, as SVG.

    Args:
        curves: each has its colour of `COLORS`, by position.
        ylabel: what is drawn, with its unit.
        percent: values are shares in [0, 1], shown in percent. Where all are high, the axis leaves out what lies below.
        log: logarithmic axis.
        reference: label and value of a dashed horizontal line.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    with _style():
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        for index, curve in enumerate(curves):
            _draw(axes, curve, index, faint=len(curves) > len(COLORS))
        if reference is not None:
            label, value = reference
            axes.axhline(value, color=_INK, linestyle=(0, (5, 3)), linewidth=1.3, label=label)
        axes.set_xlabel("epoch")
        axes.set_ylabel(ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.02)
        if log:
            _logarithmic(axes, "y")
        if percent:
            _percent(axes, *_reach(curves, reference))
        axes.grid(True, axis="y", color=_INK, alpha=0.12)
        axes.set_axisbelow(True)
        _legend(axes)
    return svg(figure)


def lines_svg(
    lines: Sequence[Line],
    *,
    xlabel: str,
    ylabel: str,
    percent: bool = False,
    log_x: bool = False,
    whole: bool = False,
    reference: tuple[str, float] | None = None,
) -> str:
    """A chart of lines with a marker at every value, as SVG.

    Args:
        lines: each has its colour of `COLORS`, by position.
        xlabel: what x is.
        ylabel: what y is, with its unit.
        percent: y are shares in [0, 1], shown in percent.
        log_x: logarithmic x.
        whole: x are whole numbers, such as those of layers.
        reference: label and value of a dashed horizontal line.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    with _style():
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        for index, line in enumerate(lines):
            # A line of one value is a point.
            size = 3.5 if len(line.x) > 1 else 7
            axes.plot(line.x, line.y, **_look(index, marked=True), linewidth=1.8, markersize=size, label=line.label)
        if reference is not None:
            label, value = reference
            axes.axhline(value, color=_INK, linestyle=(0, (5, 3)), linewidth=1.3, label=label)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        if log_x:
            _logarithmic(axes, "x")
        if whole:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if percent:
            values = [value for line in lines for value in line.y] + ([reference[1]] if reference else [])
            finite = [value for value in values if math.isfinite(value)]
            _percent(axes, min(finite, default=0.0), max(finite, default=1.0))
        axes.grid(True, axis="y", color=_INK, alpha=0.12)
        axes.set_axisbelow(True)
        _legend(axes)
    return svg(figure)


def dots_svg(
    groups: Mapping[str, Sequence[float]],
    *,
    xlabel: str,
    percent: bool = False,
    reference: tuple[str, float] | None = None,
) -> str:
    """A line of dots for each group, one dot per value, with a stroke at their mean, as SVG.

    Args:
        groups: values by name, from the top down; colours are those of `curves_svg`.
        xlabel: what the values are.
        percent: values are shares in [0, 1], shown in percent.
        reference: label and value of a dashed vertical line.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    with _style():
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=(6.4, max(3.4, 1.3 + 0.34 * len(groups))), layout="constrained")
        axes = figure.subplots()
        for index, values in enumerate(groups.values()):
            look = {**_look(index, marked=True), "linestyle": ""}
            axes.plot(values, [index] * len(values), **look, alpha=0.75, clip_on=False)
            if values:
                mean = sum(values) / len(values)
                axes.plot([mean, mean], [index - 0.32, index + 0.32], color=look["color"], linewidth=2.2)
        if reference is not None:
            label, value = reference
            axes.axvline(value, color=_INK, linestyle=(0, (5, 3)), linewidth=1.3, label=label)
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
        axes.set_yticks(range(len(groups)), list(groups))
        axes.set_ylim(len(groups) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.margins(x=0.06)
        axes.set_xlabel(xlabel)
        if percent:
            _percent_format(axes.xaxis)
        axes.grid(True, axis="x", color=_INK, alpha=0.12)
        axes.set_axisbelow(True)
    return svg(figure)


def surface_svg(
    x: Sequence[float],
    y: Sequence[float],
    values: Tensor,
    *,
    xlabel: str,
    ylabel: str,
    label: str,
    points: Mapping[str, tuple[float, float]],
    percent: bool = False,
) -> str:
    """Levels of a function on a plane, dark where it is low, as SVG; both axes have one scale.

    Args:
        x: places of the columns of `values`, rising.
        y: places of its rows, rising.
        values: `[len(y), len(x)]`, at least two each way.
        xlabel: what x is.
        ylabel: what y is.
        label: what the values are, beside the colours.
        points: places to mark, by name.
        percent: values are shares in [0, 1], shown in percent.

    Raises:
        ValueError: `values` has another shape.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if tuple(values.shape) != (len(y), len(x)) or min(values.shape) < 2:
        raise ValueError(f"values is {list(values.shape)}; expected [{len(y)}, {len(x)}], at least 2 each way")
    with _style():
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator, PercentFormatter

        figure = Figure(figsize=(6.4, 4.8), layout="constrained")
        axes = figure.subplots()
        # A value on the outermost level would be left white.
        low, high = float(values.min()), float(values.max())
        margin = 1e-6 * max(abs(low), abs(high), 1e-6)
        levels = MaxNLocator(14).tick_values(low - margin, high + margin)
        filled = axes.contourf(x, y, values.cpu().numpy(), levels=levels, cmap="viridis")
        axes.contour(filled, colors="white", linewidths=0.4, alpha=0.5)
        shares = PercentFormatter(1.0, symbol=" %") if percent else None
        bar = figure.colorbar(filled, ax=axes, label=label, format=shares)
        bar.outline.set_visible(False)
        for index, (name, (a, b)) in enumerate(points.items()):
            axes.plot(
                a, b, linestyle="", marker="oD^sv"[index % 5], markersize=8, color="white", markeredgecolor="black",
                label=name,
            )  # fmt: skip
        axes.set_aspect("equal")
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        if points:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2)
    return svg(figure)


def svg(figure: Figure) -> str:
    """A matplotlib figure as an `<svg>` element: no links, no fixed size, the page's text colour and font."""
    buffer = io.StringIO()
    with _style():
        figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # the same in every figure, and nothing refers to them
    text = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r" font-family: [^;\"]*;", "", text)
    return text.replace(_INK, "currentColor")


def png_uri(image: Tensor, cmap: str = "magma") -> str:
    """An image as a `data:` URI, one pixel per value; let the page scale it.

    Args:
        image: float `[H, W]`, scaled from its own minimum and maximum to the colours of `cmap`; or uint8
            `[1 or 3, H, W]`, grey or RGB as it is.
        cmap: matplotlib's name of a colour map.

    Raises:
        ValueError: another shape or dtype.
        ModuleNotFoundError: matplotlib is not installed.
    """
    with _style():
        from matplotlib.image import imsave

    buffer = io.BytesIO()
    if image.ndim == 2 and image.is_floating_point():
        imsave(buffer, image.detach().cpu().numpy(), cmap=cmap, format="png")
    elif image.ndim == 3 and image.shape[0] in (1, 3) and not image.is_floating_point():
        pixels = image.detach().cpu().expand(3, -1, -1).permute(1, 2, 0).contiguous()
        imsave(buffer, pixels.numpy(), format="png")
    else:
        raise ValueError(
            f"image is {image.dtype} {list(image.shape)}; expected float [H, W], or uint8 [1 or 3, H, W]"
        )
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def require_matplotlib() -> None:
    """Find out before hours of work, and not after them; what it takes of memory is then taken before any is measured.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    dots_svg({}, xlabel="")


@contextlib.contextmanager
def _style() -> Iterator[None]:
    """matplotlib's settings for a figure of a page; what the user's own are does not matter."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "figures need matplotlib, which is not installed; try `pip install 'hyperfast[demo]'`", name="matplotlib"
        ) from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def _look(index: int, *, marked: bool) -> dict[str, Any]:
    """Colour, stroke and marker of a line by its position."""
    turn, place = divmod(index, len(COLORS))
    marker = _MARKERS[turn % len(_MARKERS)] if marked else ""
    return {"color": COLORS[place], "linestyle": _STROKES[turn % len(_STROKES)], "marker": marker}


def _draw(axes: Axes, curve: Curve, index: int, *, faint: bool) -> None:
    mean, low, high = curve.band()
    epochs = range(1, len(mean) + 1)
    opacity = 0.08 if faint else 0.2  # many bands over one another hide the lines
    axes.fill_between(epochs, low, high, color=COLORS[index % len(COLORS)], alpha=opacity, linewidth=0)
    axes.plot(epochs, mean, **_look(index, marked=len(mean) == 1), linewidth=2, label=curve.label)


def _legend(axes: Axes) -> None:
    """Above the axes, where it can hide no line; in as many columns as the labels leave room for."""
    labels = axes.get_legend_handles_labels()[1]
    widest = max(map(len, labels), default=0)
    columns = 2 if len(labels) <= 6 else max(2, min(4, 64 // (widest + 6)))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2)


def _logarithmic(axes: Axes, which: str) -> None:
    """A logarithmic axis, x or y, whose labels are plain numbers, also where it spans less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _reach(curves: Sequence[Curve], reference: tuple[str, float] | None) -> tuple[float, float]:
    """The lowest mean and the highest value."""
    means = [value for curve in curves for value in curve.band()[0] if math.isfinite(value)]
    highs = [value for curve in curves for value in curve.band()[2] if math.isfinite(value)]
    if reference is not None:
        means.append(reference[1])
    return min(means, default=0.0), max([*means, *highs], default=1.0)


def _percent(axes: Axes, low: float, top: float) -> None:
    """Percent, from a little below `low` to a little above `top`, within 0 and 100."""
    margin = 0.06 * (top - low) + 1e-3
    axes.set_ylim(max(0.0, low - margin), min(1.005, top + margin))
    _percent_format(axes.yaxis)


def _percent_format(axis: Axis) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(xmax=1.0, symbol=" %"))
