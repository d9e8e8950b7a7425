"""The page about networks that were inherited from one teacher."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hyperfast.analysis import Line, Report, lines_svg
from hyperfast.nn import GateRow
from hyperfast.recipes.compare_report import caption, failed, settings_section, table, training_section
from hyperfast.recipes.comparison import final
from hyperfast.recipes.inherit_plan import InheritPlan, layer_table
from hyperfast.recipes.layer_cost import WHOLE, LayerCost

if TYPE_CHECKING:
    from hyperfast.recipes.comparison import Comparison
    from hyperfast.recipes.seed_runs import SeedRuns

GATES = "gates.json"


def page(comparison: Comparison, plans: Mapping[str, InheritPlan]) -> Report:
    """The page about a sweep; `plans` by the names of its methods."""
    states = [run.state for run in comparison.runs]
    model = comparison.settings.get("student", {}).get("model")
    some = next(iter(plans.values()))
    report = Report(
        f"Networks inherited from {model or 'a teacher'}",
        f"A teacher of {some.report.parameters:,} parameters in low rank with gated heads; "
        f"{states.count('finished')} of {len(states)} runs finished.",
    )
    report.section("Results")
    report.table(
        *sweep_table(comparison, plans),
        "r: rank, e: energy, b: budget; h: heads. Energy: mean over the replaced layers of the share of the squared "
        "singular values that each keeps. At once: accuracy before the training. Forward: milliseconds of a forward "
        f"pass of {some.batch} images on this machine. {caption(comparison)}",
    )
    if failures := failed(comparison):
        report.facts(failures)
    methods = [runs for method in comparison.methods if (runs := comparison.of(method)).results]
    _accuracy_against_size(report, comparison, plans, methods)
    training_section(report, comparison)
    report.section("Layers")
    for name in comparison.methods:
        if name in plans:
            gates = _gates(comparison, name)
            report.table(*layer_table(plans[name], gates), _layer_caption(name, plans[name], bool(gates)))
    settings_section(report, comparison)
    return report


def sweep_table(
    comparison: Comparison, plans: Mapping[str, InheritPlan], brief: bool = False
) -> tuple[list[str], list[list[str | None]]]:
    """Columns and rows of the table, the teacher first: what each network is, then `compare_report.table`."""
    columns, rows = table(comparison, brief)
    known = [plans.get(str(row[0])) for row in rows]
    some = next(iter(plans.values()))
    added = [[f"{some.report.parameters:,}", None, None, _forward(_whole(some), teacher=True)]]
    for plan in known[1:]:
        if plan is None:
            added.append([None] * 4)
            continue
        share = None if plan.accuracy is None else f"{100 * plan.accuracy:.2f}"
        size = f"{plan.report.inherited:,}"
        added.append([size, f"{plan.report.energy:.3f}", share, _forward(_whole(plan), teacher=False)])
    names = ["parameters", "energy", "at once,\n%", "forward,\nms"]
    return (
        ["network", *names, *columns[1:]],
        [[row[0], *more, *row[1:]] for row, more in zip(rows, added, strict=True)],
    )


def _accuracy_against_size(
    report: Report, comparison: Comparison, plans: Mapping[str, InheritPlan], methods: Sequence[SeedRuns]
) -> None:
    """One line per number of heads; against parameters, and against the time of a forward pass."""
    points: dict[int, list[tuple[int, float, float]]] = {}
    for method in methods:
        reached = [accuracy for result in method.results if (accuracy := final(result)) is not None]
        plan = plans.get(method.name)
        if plan is not None and reached:
            point = plan.report.inherited, _whole(plan).inherited_ms, statistics.mean(reached)
            points.setdefault(plan.config.heads, []).append(point)
    if not points:
        return
    judged = "validation" if comparison.teacher.test is None else "test"
    best = comparison.teacher.validation if comparison.teacher.test is None else comparison.teacher.test
    reference = None if best is None else ("teacher", best)
    some = next(iter(plans.values()))
    report.section("Accuracy against size")
    pictures = []
    for place, xlabel, words in (
        (0, "parameters", f"the teacher has {some.report.parameters:,} parameters"),
        (1, f"ms of a forward pass of {some.batch} images", f"the teacher takes {_whole(some).ms:.1f} ms"),
    ):
        lines = []
        for heads, found in sorted(points.items()):
            ordered = sorted(found, key=lambda point: point[place])
            x, y = [point[place] for point in ordered], [point[2] for point in ordered]
            lines.append(Line(f"{heads} head{'s' * (heads > 1)}", x, y))
        drawn = lines_svg(
            lines, xlabel=xlabel, ylabel=f"{judged} accuracy", percent=True, log_x=not place, reference=reference
        )
        pictures.append((drawn, f"Mean accuracy on the {judged} images, weights of the best epoch; {words}."))
    report.figures(*pictures)


def _gates(comparison: Comparison, name: str) -> list[GateRow]:
    """What the heads do in the first run that has finished."""
    for run in comparison.runs:
        if run.method == name and (run.folder / GATES).exists():
            return [GateRow(**row) for row in json.loads((run.folder / GATES).read_text(encoding="utf-8"))]
    return []


def _layer_caption(name: str, plan: InheritPlan, gates: bool) -> str:
    text = (
        f"{name}: every convolution and linear layer of the teacher. MFLOP: millions of operations per image. ms: "
        f"median of a forward pass of {plan.batch} images on this machine, layer by layer."
    )
    if gates:
        text += (
            " After the training, at the best weights of the first run: entropy of the gates (1: heads mixed evenly "
            "for every image, 0: one head), of their mean over the images (1: all heads in even use), and mean cosine "
            "between two heads."
        )
    return text


def _whole(plan: InheritPlan) -> LayerCost:
    return next(cost for cost in plan.costs if cost.name == WHOLE)


def _forward(cost: LayerCost, teacher: bool) -> str:
    return f"{cost.ms if teacher else cost.inherited_ms:.1f}"
