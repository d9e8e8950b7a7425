"""Pictures and README tables, drawn from the result files and from nothing else.

    python bench/plot.py                 docs/assets/bench-<op>-<device>.png
    python bench/plot.py --readme        fill the tables of README.md
    python bench/plot.py --check         exit status 1 where README.md is not what --readme would write

A table stands between two markers, `<!-- bench:generate-cpu -->` and `<!-- /bench -->`, named after its result file.
`bench:losses-cpu` is one table of all losses.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import store
from machine import ROOT
from registry import NAMES, operation
from store import Row, ratio

_MARKED = re.compile(r"(<!-- bench:([\w-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
_LOSSES = ("attention_transfer", "activation_boundary", "channel_wise_distillation", "unit_distance", "fitnets")
_LOSSES += ("flow_of_solution", "similarity_preserving", "relational_distance_angle", "cross_entropy_distillation")
_OURS, _OTHERS = "#2a78d6", "#b9bec6"


def result_files(results: Path) -> list[Path]:
    """Result files in the order of the registry, those of unknown operations last."""

    def position(path: Path) -> tuple[int, str]:
        name = path.stem.rpartition("-")[0]
        return (NAMES.index(name) if name in NAMES else len(NAMES), path.stem)

    return sorted(results.glob("*-*.csv"), key=position)


def by_case(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by case and mode, in the file's order."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["case"], row["mode"]), []).append(row)
    return found


def markdown(rows: Sequence[Row]) -> str:
    """The rows of one file as a table, the machine below it."""
    if not rows:
        return "Not measured yet.\n"
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("case", lambda row: row["case"] + (" (CUDA graph)" if row["mode"] == "graph" else "")),
        ("provider", lambda row: f"**{row['provider']}**" if row["provider"] == store.OURS else row["provider"]),
        ("median ms (20 % to 80 %)", _median_and_quantiles),
        ("times ours", lambda row: _ratio_text(row, rows)),
        ("peak MiB", lambda row: row["peak_mib"]),
        ("of copy bandwidth", lambda row: f"{float(row['percent_copy']):.0f} %" if row["percent_copy"] else ""),
        ("kernels", lambda row: row["kernels"]),
    ]
    cells = {name: [text(row) for row in rows] for name, text in columns}
    cells = {name: column for name, column in cells.items() if any(column)}
    lines = [f"| {' | '.join(cells)} |", f"|{'|'.join('---' if i < 2 else '--:' for i in range(len(cells)))}|"]
    lines += [f"| {' | '.join(line)} |" for line in zip(*cells.values(), strict=True)]
    return "\n".join(lines) + "\n\n" + "\n\n".join(_footnotes(rows)) + "\n"


def _median_and_quantiles(row: Row) -> str:
    if row["repeats"] == "1":
        return f"{float(row['median_ms']):,.0f} (once)"
    return f"{row['median_ms']} ({row['p20_ms']} to {row['p80_ms']})"


def losses(results: Path, device: str) -> str:
    """All losses in one table, a line per case. The first of the eager forms is that of the projects."""
    header = ["loss", "case", "hyperfast, ms", "as projects write it", "best eager form", "torch.compile", "peak MiB"]
    lines, measured = [f"| {' | '.join(header)} |", "|---|---|--:|--:|--:|--:|--:|"], []
    for name in _LOSSES:
        for (case, mode), rows in by_case(store.read(results / f"{name}-{device}.csv")).items():
            eager = [row for row in rows if row["provider"].startswith("eager")]
            if mode != "eager" or rows[0]["provider"] != store.OURS or not eager:
                continue
            best = min(eager, key=lambda row: float(row["median_ms"]))
            compiled = next((row for row in rows if row["provider"] == "torch.compile"), None)
            others = [_time_and_ratio(row, rows) for row in (eager[0], best, compiled)]
            memory = f"{rows[0]['peak_mib']}, theirs {eager[0]['peak_mib']}"
            title = operation(name).title.split(",")[0]
            lines.append(f"| {' | '.join([title, case, '**' + rows[0]['median_ms'] + '**', *others, memory])} |")
            measured += rows
    if not measured:
        return "Not measured yet.\n"
    commits: dict[str, dict[str, None]] = {}
    for row in measured:
        commits.setdefault(_machine(row, "{}"), {})[row["commit"]] = None
    notes = [machine.format(", ".join(found)) + "." for machine, found in commits.items()]
    return "\n".join(lines) + "\n\n" + "\n\n".join(notes) + "\n"


def _time_and_ratio(row: Row | None, rows: Sequence[Row]) -> str:
    if row is None:
        return ""
    times = _ratio_text(row, rows)
    return row["median_ms"] + (f" ({times}x)" if times else "")


def _ratio_text(row: Row, rows: Sequence[Row]) -> str:
    found = ratio(row, rows)
    return "" if found is None or row["provider"] == store.OURS else f"{found:.2f}"


def _footnotes(rows: Sequence[Row]) -> list[str]:
    """One line per machine and set of versions; ratios are within one run in any case."""
    notes = []
    for row in rows:
        notes.append(
            f"{_machine(row, row['commit'])}; measured ceilings: copy {float(row['copy_gbps']):.1f} GB/s, "
            f"float32 matrix product {float(row['matmul_gflops']):.0f} GFLOP/s."
        )
    return list(dict.fromkeys(notes))


def _machine(row: Row, commit: str) -> str:
    versions = f"torch {row['torch']}" + (f", CUDA {row['cuda']}" if row["cuda"] else "")
    return (
        f"{row['processor']}, {row['threads']} threads, {versions}, hyperfast {row['hyperfast']} "
        f"({commit}), {row['date'][:10]}"
    )


def fill(text: str, results: Path) -> str:
    """`text` with every marked table replaced by what its result file holds."""
    if not _MARKED.search(text):
        names = ", ".join(path.stem for path in result_files(results)) or "none yet"
        raise ValueError(
            "there is no marked place for a table; put '<!-- bench:NAME -->' and '<!-- /bench -->' on lines of their "
            f"own, with NAME one of the result files: {names}"
        )

    def table(match: re.Match[str]) -> str:
        kind, _, device = match.group(2).rpartition("-")
        rows = losses(results, device) if kind == "losses" else markdown(store.read(results / f"{match.group(2)}.csv"))
        return f"{match.group(1)}\n{rows}\n{match.group(3)}"

    return _MARKED.sub(table, text)


def draw(rows: Sequence[Row], target: Path) -> None:
    """Bars of the medians, whiskers from the 20 to the 80 % quantile, ratios at the bars; one panel per case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = by_case(rows)
    heights = [len(part) for part in cases.values()]
    figure, panels = plt.subplots(
        len(cases), 1, figsize=(8, sum(heights) * 0.38 + len(cases) * 0.75 + 0.5), squeeze=False, layout="constrained",
        height_ratios=heights,
    )  # fmt: skip
    for panel, ((case, mode), part) in zip(panels[:, 0], cases.items(), strict=True):
        medians = [float(row["median_ms"]) for row in part]
        whiskers = [
            [max(0.0, m - float(row["p20_ms"])) for m, row in zip(medians, part, strict=True)],
            [max(0.0, float(row["p80_ms"]) - m) for m, row in zip(medians, part, strict=True)],
        ]
        colours = [_OURS if row["provider"].split("-")[0] == store.OURS else _OTHERS for row in part]
        panel.barh(range(len(part)), medians, color=colours, height=0.68)
        panel.errorbar(medians, range(len(part)), xerr=whiskers, fmt="none", ecolor="#3d434b", elinewidth=1, capsize=3)
        for place, (row, median) in enumerate(zip(part, medians, strict=True)):
            times = _ratio_text(row, rows)
            label = f"{float(row['median_ms']):g} ms" + (f"   {times}x" if times else "")
            panel.text(max(median, float(row["p80_ms"])), place, "  " + label, va="center", fontsize=9)
        panel.set_yticks(range(len(part)), [row["provider"] for row in part], fontsize=9)
        panel.invert_yaxis()
        panel.set_title(case + (" (CUDA graph)" if mode == "graph" else ""), loc="left", fontsize=10)
        panel.set_xlim(0, max(max(medians), *(float(row["p80_ms"]) for row in part)) * 1.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(axis="x", labelsize=8)
    panels[-1, 0].set_xlabel("milliseconds, less is better", fontsize=9)
    name = rows[0]["op"]
    title = operation(name).title if name in NAMES else name
    figure.suptitle(f"{title}\n{rows[0]['processor']}", x=0.01, ha="left", fontsize=10.5, fontweight="bold")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130, metadata={"Software": None})
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw, or fill or check the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=store.RESULTS, help="folder of the result files")
    parser.add_argument("--assets", type=Path, default=ROOT / "docs" / "assets", help="folder of the pictures")
    parser.add_argument("--readme", type=Path, nargs="?", const=ROOT / "README.md", help="fill its tables")
    parser.add_argument("--check", type=Path, nargs="?", const=ROOT / "README.md", help="is it up to date?")
    options = parser.parse_args(arguments)
    file = options.check or options.readme
    if file is None:
        for path in result_files(options.results):
            draw(store.read(path), options.assets / f"bench-{path.stem}.png")
            print(f"bench-{path.stem}.png")
        return 0
    before = file.read_text(encoding="utf-8")
    try:
        after = fill(before, options.results)
    except ValueError as error:
        parser.error(f"{file.name}: {error}")
    if options.check:
        if before != after:
            print(f"{file.name} is not what bench/results says; run: python bench/plot.py --readme")
        return int(before != after)
    file.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
