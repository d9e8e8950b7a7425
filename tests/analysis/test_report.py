"""The self-contained page."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest
import torch

from hyperfast.analysis import Curve, Report, curves_svg

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("matplotlib")

_VOID = {"meta", "img", "br", "link"}


class _Page(HTMLParser):
    """Text, attributes that load something, and whether every element is closed."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.loaded: list[str] = []
        self.open: list[str] = []
        self.feed(markup)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _report() -> Report:
    report = Report("A <title>", "A lead & more.")
    report.facts({"command": "hyperfast <demo>"})
    report.section("Results")
    report.table(["method", "accuracy"], [["MIP", "97 %"], ["<AT>", None]], "A caption.")
    report.figures((curves_svg([Curve("a", [[1.0, 2.0]])], ylabel="loss"), "One."))
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    maps = {"teacher": {"layer1": torch.rand(2, 4, 4)}, "student": {"layer1": torch.rand(2, 4, 4)}}
    report.maps(images, maps, ["3", "8"], "Two.")
    report.text("1 < 2")
    report.html("<p><b>bold</b></p>")
    return report


def test_page_is_well_formed_and_loads_nothing() -> None:
    page = _Page(_report().render())
    assert page.open == []
    assert page.loaded
    assert all(target.startswith(("data:image/png;base64,", "#")) for target in page.loaded)
    markup = re.sub(r'xmlns(:\w+)?="[^"]*"', "", _report().render())
    assert not re.search(r"https?://|@import|<script|url\((?!#)", markup)


def test_text_is_escaped_and_markup_is_not() -> None:
    text = "".join(_Page(_report().render()).text)
    for expected in ("A <title>", "A lead & more.", "hyperfast <demo>", "<AT>", "–", "A caption.", "1 < 2", "bold"):
        assert expected in text


def test_write_makes_the_folder(tmp_path: Path) -> None:
    path = _report().write(tmp_path / "new" / "report.html")
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_rows_and_columns_must_agree() -> None:
    with pytest.raises(ValueError, match="a row has 1 cells, expected 2: method, accuracy"):
        Report("x").table(["method", "accuracy"], [["MIP"]])


def test_images_stand_in_a_grid() -> None:
    report = Report("x")
    report.images({"<snow>": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}, ["as it is", "severity 1"], "A caption.")
    page = _Page(report.render())
    assert page.open == [] and len(page.loaded) == 2
    assert {"<snow>", "as it is", "severity 1", "A caption."} <= set(page.text)
    with pytest.raises(ValueError, match="row 'snow' has 1 images, expected 2: a, b"):
        report.images({"snow": torch.zeros(1, 3, 4, 4, dtype=torch.uint8)}, ["a", "b"])


def test_maps_and_images_must_agree() -> None:
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"there are 2 images, but maps or labels for \[2, 3\]"):
        Report("x").maps(images, {"teacher": {"layer1": torch.rand(3, 4, 4)}}, ["a", "b"])
