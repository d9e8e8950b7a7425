"""Charts and pictures as text."""

from __future__ import annotations

import base64
import io
import math
import re
import sys
from xml.etree import ElementTree

import pytest
import torch

from hyperfast.analysis import Curve, Line, curves_svg, dots_svg, lines_svg, png_uri, require_matplotlib, surface_svg

pytest.importorskip("matplotlib")


def test_band_is_mean_lowest_and_highest_of_the_finite_values() -> None:
    mean, low, high = Curve("a", [[1.0, 2.0, 3.0], [3.0, math.nan]]).band()
    assert (mean, low, high) == ([2.0, 2.0, 3.0], [1.0, 2.0, 3.0], [3.0, 2.0, 3.0])


def test_chart_is_one_svg_element_in_the_colours_of_the_page() -> None:
    curves = [Curve("first", [[0.2, 0.5, 0.8], [0.3, 0.6, 0.9]]), Curve("second <&>", [[0.1, 0.2]])]
    text = curves_svg(curves, ylabel="accuracy", percent=True, reference=("teacher", 0.95))
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "width" not in root.attrib and "viewBox" in root.attrib
    shown = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"first", "second <&>", "teacher", "accuracy", "epoch"} <= shown
    assert any(label and label.endswith("%") for label in shown)
    assert "currentColor" in text and "#010203" not in text
    assert "font-family" not in text and "<metadata" not in text


def test_chart_does_not_depend_on_the_users_settings_and_leaves_them() -> None:
    import matplotlib

    curves = [Curve("a", [[2.0, 1.0]])]
    expected = curves_svg(curves, ylabel="loss", log=True)
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True}):
        assert curves_svg(curves, ylabel="loss", log=True) == expected
        assert matplotlib.rcParams["font.size"] == 30


@pytest.mark.parametrize("curve", [Curve("nothing", []), Curve("gaps", [[math.nan, math.nan]])])
def test_chart_of_nothing_is_empty_not_an_error(curve: Curve) -> None:
    assert curves_svg([curve], ylabel="loss", percent=True).startswith("<svg")


def _shown(text: str) -> set[str | None]:
    return {element.text for element in ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}text")}


def test_lines_over_any_x() -> None:
    lines = [Line("a", [1, 10, 100], [0.5, math.nan, 0.9]), Line("b", [1.0, 50.0], [0.6, 0.7])]
    shown = _shown(lines_svg(lines, xlabel="cutoff", ylabel="S", percent=True, log_x=True, reference=("plain", 0.8)))
    assert {"a", "b", "plain", "cutoff", "S", "1", "10", "100"} <= shown
    assert any(label and label.endswith(" %") for label in shown)
    layers = _shown(lines_svg([Line("a", [1, 2], [10.0, 20.0])], xlabel="layer", ylabel="S", whole=True))
    assert {"1", "2"} <= layers and not layers & {"1.2", "1.5", "1.50"}
    with pytest.raises(ValueError, match="line 'a' has 2 places but 1 values"):
        Line("a", [1, 2], [1.0])


def test_dots_stand_beside_their_names() -> None:
    groups = {"first": [0.5, 0.75], "none": [], "third <&>": [0.9]}
    drawn = dots_svg(groups, xlabel="accuracy", percent=True, reference=("teacher", 0.95))
    shown = _shown(drawn)
    assert {"first", "none", "third <&>", "accuracy", "teacher"} <= shown
    assert any(label and label.endswith(" %") for label in shown)
    assert drawn == dots_svg(groups, xlabel="accuracy", percent=True, reference=("teacher", 0.95))
    assert dots_svg({}, xlabel="accuracy").startswith("<svg")


def test_more_lines_than_colours_are_told_apart_by_their_strokes() -> None:
    names = [f"line {index}" for index in range(20)]
    drawn = curves_svg([Curve(name, [[1.0, 2.0]]) for name in names], ylabel="loss")
    looks = re.findall(r'fill: none; (?:stroke-dasharray: [^;]*; [^"]*)?stroke: #[0-9a-f]{6}[^"]*', drawn)
    assert len(set(looks)) >= len(names) and set(names) <= _shown(drawn)


@pytest.mark.parametrize("value", [0.06, 0.0, 1e-9, 3.0])
def test_surface_is_coloured_everywhere(value: float) -> None:
    """Also where it is flat, and where the largest value is a level."""
    values = torch.full((3, 4), value)
    values[1, 1] = 0.0
    points = {"w": (1.0, 1.0)}
    drawn = surface_svg(range(4), range(3), values, xlabel="u", ylabel="v", label="error", points=points, percent=True)
    shown = _shown(drawn)
    assert {"u", "v", "error", "w"} <= shown


def test_surface_has_no_white_rim() -> None:
    from matplotlib.figure import Figure

    levels: list[list[float]] = []
    original = Figure.savefig

    def look(figure: Figure, *args: object, **kwargs: object) -> None:
        levels.append(list(figure.axes[0].collections[0].levels))
        original(figure, *args, **kwargs)

    values = torch.tensor([[0.04, 0.05], [0.05, 0.06]], dtype=torch.float64) + 1e-12
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", look)
        surface_svg([0, 1], [0, 1], values, xlabel="u", ylabel="v", label="e", points={})
    assert levels[0][0] < values.min() and values.max() < levels[0][-1]


def test_surface_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"values is \[2, 3\]; expected \[3, 2\], at least 2 each way"):
        surface_svg([0, 1], [0, 1, 2], torch.zeros(2, 3), xlabel="u", ylabel="v", label="e", points={})


def test_picture_keeps_every_pixel() -> None:
    from matplotlib.image import imread

    image = torch.arange(48, dtype=torch.uint8).view(3, 4, 4)
    kind, encoded = png_uri(image).split(",")
    assert kind == "data:image/png;base64"
    decoded = torch.from_numpy(imread(io.BytesIO(base64.b64decode(encoded)))[..., :3] * 255).round().byte()
    assert torch.equal(decoded.permute(2, 0, 1), image)


def test_picture_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"image is torch.float32 \[2, 3, 3\]; expected float \[H, W\]"):
        png_uri(torch.rand(2, 3, 3))


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'hyperfast\[demo\]'"):
        curves_svg([Curve("a", [[1.0]])], ylabel="loss")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'hyperfast\[demo\]'"):
        require_matplotlib()
