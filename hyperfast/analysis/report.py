"""A report as one HTML page that needs nothing else: no network, no other files, no scripts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from hyperfast.analysis.figures import png_uri

if TYPE_CHECKING:
    from torch import Tensor

_CSS = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #5c6670; --line: #d9dee3; --page: #ffffff; --panel: #f5f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --soft: #9aa5b1; --line: #343c45; --page: #14181c; --panel: #1c2228; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; color: var(--ink); background: var(--page);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; }
p { margin: .5rem 0; max-width: 46rem; }
.soft, figcaption { color: var(--soft); }
code { font: .92em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 1rem 0; padding: .7rem 1rem;
  background: var(--panel); border-radius: .5rem; font-size: .92rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
table.data { width: 100%; }
.data th, .data td { padding: .4rem .7rem; text-align: right; border-bottom: 1px solid var(--line); }
.data th { font-weight: 600; vertical-align: bottom; white-space: pre-line; } .data td { white-space: nowrap; }
.data tr > :first-child { text-align: left; padding-left: 0; }
.wide { font-size: .9rem; } .wide th, .wide td { padding: .35rem .45rem; }
@media (max-width: 40rem) { .data { font-size: .86rem; } .data th, .data td { padding: .35rem .4rem; } }
figure { margin: 1rem 0; }
figcaption { font-size: .88rem; max-width: 46rem; padding-top: .4rem; }
.row { display: flex; flex-wrap: wrap; gap: 1rem 2rem; }
.row > figure { flex: 1 1 22rem; min-width: 0; margin: .5rem 0; }
svg { width: 100%; height: auto; display: block; }
.grid th { font-weight: 400; font-size: .8rem; color: var(--soft); padding: .1rem .2rem; white-space: nowrap; }
.grid th.group { font-weight: 600; color: var(--ink); font-size: .9rem; }
.grid td { padding: .12rem; } .grid .first { padding-left: 1rem; }
.grid img { display: block; width: 3.5rem; height: 3.5rem; image-rendering: pixelated; border-radius: .2rem; }
"""

_MANY_COLUMNS = 8

Cell = str | int | float | None


class Report:
    """Builds a page from the top down.

    Every method but `html` takes plain text and escapes it.

    Args:
        title: heading of the page and title of the window.
        lead: one sentence under it.

    Example:
        >>> report = Report("Demo", "What was done.")
        >>> report.facts({"command": "hyperfast demo"})
        >>> report.section("Results")
        >>> report.table(["method", "accuracy"], [["AT", "97.1 %"]])
        >>> report.write("runs/demo/report.html")
    """

    def __init__(self, title: str, lead: str = "") -> None:
        self.title = title
        self._body = [f"<h1>{escape(title)}</h1>"]
        if lead:
            self._body.append(f'<p class="soft">{escape(lead)}</p>')

    def facts(self, facts: Mapping[str, object]) -> None:
        """Names and values in two columns: the command, the machine, the settings."""
        pairs = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())
        self._body.append(f"<dl>{pairs}</dl>")

    def section(self, heading: str) -> None:
        """A heading; what is added next stands under it."""
        self._body.append(f"<h2>{escape(heading)}</h2>")

    def text(self, paragraph: str) -> None:
        """A paragraph."""
        self._body.append(f"<p>{escape(paragraph)}</p>")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str = "") -> None:
        """A table; the first column is left-aligned, the others to the right. None is shown as a dash.

        Raises:
            ValueError: a row has another number of cells than there are columns.
        """
        for row in rows:
            if len(row) != len(columns):
                raise ValueError(f"a row has {len(row)} cells, expected {len(columns)}: {', '.join(columns)}")
        head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{'–' if cell is None else escape(str(cell))}</td>" for cell in row) + "</tr>"
            for row in rows
        )
        kind = "data wide" if len(columns) > _MANY_COLUMNS else "data"
        self._body.append(
            f'<figure><div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>{_caption(caption)}</figure>"
        )

    def figures(self, *figures: tuple[str, str]) -> None:
        """Figures side by side, one below the other on a narrow screen; each is (SVG, caption)."""
        drawn = "".join(
            f"<figure>{picture}{_caption(caption)}</figure>" for picture, caption in figures
        )
        self._body.append(f'<div class="row">{drawn}</div>')

    def maps(
        self, images: Tensor, maps: Mapping[str, Mapping[str, Tensor]], labels: Sequence[str] = (), caption: str = ""
    ) -> None:
        """Images and, side by side, the attention maps of several networks for them; each map has its own scale.

        Args:
            images: uint8 `[B, C, H, W]`.
            maps: network -> tap -> float `[B, H_l, W_l]`, as `attention_maps` returns them.
            labels: of the images.
            caption: under the grid.

        Raises:
            ValueError: maps or labels for another number of images.
        """
        lengths = [len(labels)] * bool(labels) + [len(m) for taps in maps.values() for m in taps.values()]
        if any(length != len(images) for length in lengths):
            raise ValueError(f"there are {len(images)} images, but maps or labels for {sorted(set(lengths))}")
        groups = "".join(
            f'<th class="group first" scope="colgroup" colspan="{len(taps)}">{escape(network)}</th>'
            for network, taps in maps.items()
        )
        columns = [(tap, i == 0, values) for taps in maps.values() for i, (tap, values) in enumerate(taps.items())]
        names = "".join(f'<th scope="col"{_first(first)}>{escape(tap)}</th>' for tap, first, _ in columns)
        rows = []
        for index, image in enumerate(images):
            label = labels[index] if labels else f"image {index + 1}"
            cells = "".join(
                f"<td{_first(first)}>{_img(png_uri(values[index]), f'{tap}, {label}')}</td>"
                for tap, first, values in columns
            )
            rows.append(f"<tr><th scope='row'>{escape(label)}</th><td>{_img(png_uri(image), label)}</td>{cells}</tr>")
        self._body.append(
            f'<figure><div class="scroll"><table class="grid"><thead><tr><th></th><th></th>{groups}</tr>'
            f"<tr><th></th><th>input</th>{names}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
            f"{_caption(caption)}</figure>"
        )

    def images(self, rows: Mapping[str, Tensor], columns: Sequence[str], caption: str = "") -> None:
        """Images in a grid.

        Args:
            rows: by name, uint8 `[len(columns), C, H, W]`.
            columns: headings.
            caption: under the grid.

        Raises:
            ValueError: a row has another number of images than there are columns.
        """
        for name, images in rows.items():
            if len(images) != len(columns):
                raise ValueError(
                    f"row {name!r} has {len(images)} images, expected {len(columns)}: {', '.join(columns)}"
                )
        head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
        body = "".join(
            f'<tr><th scope="row">{escape(name)}</th>'
            + "".join(
                f"<td>{_img(png_uri(image), f'{name}, {column}')}</td>"
                for image, column in zip(images, columns, strict=True)
            )
            + "</tr>"
            for name, images in rows.items()
        )
        self._body.append(
            f'<figure><div class="scroll"><table class="grid"><thead><tr><th></th>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>{_caption(caption)}</figure>"
        )

    def html(self, markup: str) -> None:
        """Markup as it is: the caller answers for it."""
        self._body.append(markup)

    def render(self) -> str:
        """The page."""
        body = "\n".join(self._body)
        return (
            f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
        )

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the page; its folder is created. Returns the path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.render(), encoding="utf-8")
        return path


def _first(first: bool) -> str:
    return ' class="first"' if first else ""


def _caption(caption: str) -> str:
    # Outside of what scrolls sideways, so that it stays in view on a narrow screen.
    return f"<figcaption>{escape(caption)}</figcaption>" if caption else ""


def _img(uri: str, alt: str) -> str:
    return f'<img src="{uri}" alt="{escape(alt)}">'
