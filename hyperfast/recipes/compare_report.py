"""A comparison as a table, as files and as one page."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperfast.analysis import Line, Report, curves_svg, dots_svg, lines_svg
from hyperfast.recipes.comparison import final

if TYPE_CHECKING:
    from hyperfast.recipes.comparison import ComparedRun, Comparison, PairedDifference
    from hyperfast.recipes.result import TrainResult
    from hyperfast.recipes.seed_runs import SeedRuns

PAGE = "report.html"
_DECIMALS = 2
_MIB = 2**20
_ENVIRONMENT = ("hyperfast", "python", "torch", "triton", "processor", "cuda", "gpu", "backend", "environment")
_ACCURACIES = {
    "val_accuracy_best": "validation\u00a0%,\nbest epoch",
    "val_accuracy_last": "validation\u00a0%,\nlast epoch",
    "test_accuracy_best": "test %,\nbest epoch",
    "test_accuracy_last": "test %,\nlast epoch",
}


def write_results(comparison: Comparison, make_page: Callable[[Comparison], Report]) -> Path:
    """Write `results.csv`, `results.json` and `report.html` into the folder of a comparison; returns the page."""
    rows = [_teacher_row(comparison), *(_run_row(comparison, run) for run in comparison.runs)]
    with (comparison.folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[-1]), restval="")
        writer.writeheader()
        writer.writerows(rows)
    baseline = comparison.baseline
    paired = [] if baseline is None else comparison.paired(baseline)
    values = {
        "teacher": {"val_accuracy": comparison.teacher.validation, "test_accuracy": comparison.teacher.test},
        "target": comparison.target,
        "runs": rows[1:],
        "paired": [
            {"method": p.method, "baseline": p.baseline, "n": len(p.differences), "mean": p.mean, "std": p.std,
             "differences": p.differences}
            for p in paired
        ],
        "methods": comparison.methods,
        "settings": comparison.settings,
        "environments": comparison.environments,
    }  # fmt: skip
    (comparison.folder / "results.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return make_page(comparison).write(comparison.folder / PAGE)


def table(comparison: Comparison, brief: bool = False) -> tuple[list[str], list[list[str | None]]]:
    """Columns and rows of the table, the teacher first; accuracies are mean and standard deviation over the seeds.

    Columns have line breaks where a terminal needs them; where it is narrow, `brief` leaves out the last epoch.
    """
    teacher = comparison.teacher
    known = {"val": teacher.validation, "test": teacher.test}
    accuracies = {field: name for field, name in _ACCURACIES.items() if known[field.split("_")[0]] is not None}
    if brief:
        accuracies = {field: name for field, name in accuracies.items() if field.endswith("best")}
    columns = ["method", "runs", *accuracies.values()]
    if comparison.target is not None:
        columns.append("epochs to\n95 % of\nteacher")
    columns += ["ms per\nstep", "peak\nMiB", *(["launches"] if comparison.launches else [])]
    first: list[str | None] = ["teacher", None]
    for field in accuracies:
        share = known[field.split("_")[0]]
        first.append(f"{100 * share:.{_DECIMALS}f}" if share is not None and field.endswith("best") else None)
    rows = [first + [None] * (len(columns) - len(first))]
    for method in comparison.methods:
        runs = comparison.of(method)
        row: list[str | None] = [method, _counts(comparison, method)]
        row += [runs.percent(field, _DECIMALS) for field in accuracies]
        if comparison.target is not None:
            row.append(runs.epochs_to_reach(comparison.target) if runs.results else None)
        row += [_median(runs, "ms_per_step", 1, ".1f"), _median(runs, "peak_memory", _MIB, ",.0f")]
        if comparison.launches:
            row.append(f"{comparison.launches[method]:,}" if method in comparison.launches else None)
        rows.append(row)
    return columns, rows


def paired_table(pairs: Sequence[PairedDifference]) -> tuple[list[str], list[list[str | None]]]:
    """Columns and rows of the differences to the baseline, in points of a percent, with those of each seed."""
    seeds = sorted({seed for pair in pairs for seed in pair.differences})
    columns = ["method", f"minus {pairs[0].baseline}" if pairs else "", "n", *(f"seed {seed}" for seed in seeds)]
    rows: list[list[str | None]] = []
    for pair in pairs:
        spread = "" if pair.std is None else f" ± {100 * pair.std:.{_DECIMALS}f}"
        each = [pair.differences.get(seed) for seed in seeds]
        row: list[str | None] = [pair.method, f"{100 * pair.mean:+.{_DECIMALS}f}{spread}", str(len(pair.differences))]
        rows.append([*row, *(None if value is None else f"{100 * value:+.{_DECIMALS}f}" for value in each)])
    return columns, rows


def failed(comparison: Comparison) -> dict[str, str]:
    """Why runs have failed: the first message of each method, under what failed."""
    found: dict[str, str] = {}
    for method in comparison.methods:
        runs = [run for run in comparison.runs if run.method == method and run.state == "failed"]
        if runs:
            seeds = ", ".join(str(run.seed) for run in runs)
            found[f"{method}, seed{'s' * (len(runs) > 1)} {seeds}"] = f"failed: {runs[0].error}"
    return found


def page(comparison: Comparison) -> Report:
    """The page about a comparison."""
    seeds = sorted({run.seed for run in comparison.runs})
    states = [run.state for run in comparison.runs]
    model = comparison.settings.get("student", {}).get("model")
    report = Report(
        f"Methods compared{f' on {model}' if model else ''}",
        f"{len(comparison.methods)} methods, seeds {', '.join(map(str, seeds))}: {states.count('finished')} of "
        f"{len(states)} runs finished.",
    )
    report.section("Results")
    report.table(*table(comparison), caption(comparison))
    if failures := failed(comparison):
        report.facts(failures)
    baseline = comparison.baseline
    if baseline is not None and (pairs := comparison.paired(baseline)):
        report.section(f"Against {baseline}, seed by seed")
        judged = "validation" if comparison.teacher.test is None else "test"
        report.table(
            *paired_table(pairs),
            f"Accuracy on the {judged} images, weights of the best epoch, minus that of {baseline} with the same seed, "
            f"in points of a percent: mean and standard deviation of the differences, and each of them. n is the "
            "number of seeds that both have finished.",
        )
    methods = training_section(report, comparison)
    if methods:
        report.section("Accuracy and cost")
        _accuracy_and_cost(report, comparison, methods)
    settings_section(report, comparison)
    return report


def training_section(report: Report, comparison: Comparison) -> list[SeedRuns]:
    """The curves of the methods of which a run has finished; returns these."""
    methods = [runs for method in comparison.methods if (runs := comparison.of(method)).results]
    if methods:
        report.section("Training")
        _curves(report, comparison, methods)
    return methods


def settings_section(report: Report, comparison: Comparison) -> None:
    """What the methods minimise, the settings and the machine."""
    report.section("Methods")
    report.text("What each of them minimises, with its weights:")
    report.facts({name: _objective(method) for name, method in comparison.methods.items()})
    report.section("Settings")
    report.facts({name: _flat_text(value) for name, value in comparison.settings.items()})
    report.section("Machine")
    report.facts(_machine(comparison.environments))


def _curves(report: Report, comparison: Comparison, methods: Sequence[SeedRuns]) -> None:
    figures = []
    if comparison.teacher.validation is not None:
        accuracy = curves_svg(
            [method.curve("val_accuracy") for method in methods],
            ylabel="validation accuracy",
            percent=True,
            reference=("teacher", comparison.teacher.validation),
        )
        figures.append((accuracy, "Validation accuracy. Line: mean of the seeds; band: lowest to highest."))
    losses = [method.curve("train_loss") for method in methods]
    positive = all(value > 0 for curve in losses for run in curve.runs for value in run)
    figures.append(
        (
            curves_svg(losses, ylabel="training loss", log=positive),
            "Training loss with all terms of a method and their weights: its shape can be compared, its height cannot.",
        )
    )
    report.figures(*figures)


def _accuracy_and_cost(report: Report, comparison: Comparison, methods: Sequence[SeedRuns]) -> None:
    judged = "validation" if comparison.teacher.test is None else "test"
    best = comparison.teacher.validation if comparison.teacher.test is None else comparison.teacher.test
    reference = None if best is None else ("teacher", best)
    reached = {method.name: [a for result in method.results if (a := final(result)) is not None] for method in methods}
    if not any(reached.values()):
        return
    dots = dots_svg(reached, xlabel=f"{judged} accuracy", percent=True, reference=reference)
    points = [
        Line(method.name, [method.median("ms_per_step")], [statistics.mean(reached[method.name])])
        for method in methods
        if reached[method.name]
    ]
    cost = lines_svg(points, xlabel="ms per step", ylabel=f"{judged} accuracy", percent=True, reference=reference)
    report.figures(
        (dots, f"Accuracy on the {judged} images, weights of the best epoch. Dot: a seed; stroke: their mean."),
        (cost, "Mean accuracy against the time of a training step: up and to the left is better."),
    )


def caption(comparison: Comparison) -> str:
    """What the columns of `table` are."""
    images = comparison.settings["images"]
    gpu = bool(comparison.launches)
    text = (
        "Mean and standard deviation over the seeds. The best epoch is chosen on the "
        f"{images['val']:,} validation images, the {images['test']:,} test images have no say in it. Epochs: mean of "
        "the runs that reach 95 % of the teacher's validation accuracy. ms: median of a training step, data included, "
        "validation and checkpoints not. "
    )
    if gpu:
        return text + "Memory: peak allocated on the GPU. Launches: kernels of one training step, copies not counted."
    return text + "Memory: peak of the whole process, Python, PyTorch and the images included."


def _teacher_row(comparison: Comparison) -> dict[str, Any]:
    return {
        "method": "teacher",
        "val_accuracy_best": comparison.teacher.validation,
        "test_accuracy_best": comparison.teacher.test,
    }


def _run_row(comparison: Comparison, run: ComparedRun) -> dict[str, Any]:
    """A run in numbers; the same columns whatever came of it."""
    result: TrainResult | None = run.result
    names = ("best_epoch", *_ACCURACIES, "steps", "ms_per_step", "peak_memory")
    epochs = None if result is None or comparison.target is None else result.epochs_to_reach(comparison.target)
    return {
        "method": run.method,
        "seed": run.seed,
        "state": run.state,
        **{name: None if result is None else getattr(result, name) for name in names},
        "epochs_to_target": epochs,
        "launches": comparison.launches.get(run.method),
        "folder": run.folder.name,
        "error": run.error,
    }


def _counts(comparison: Comparison, method: str) -> str:
    """How many runs have finished, and of how many where that is not all."""
    states = [run.state for run in comparison.runs if run.method == method]
    finished = states.count("finished")
    return f"{finished}" if finished == len(states) else f"{finished} of {len(states)}"


def _median(runs: SeedRuns, field: str, scale: int, form: str) -> str | None:
    return format(runs.median(field) / scale, form) if runs.results else None


def _objective(method: Mapping[str, Any] | None) -> str:
    if method is None:
        return "labels"
    return " + ".join(name if weight == 1 else f"{weight:g} × {name}" for name, weight in method["weights"].items())


def _machine(environments: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Where several machines were at work, all that they have in common once, and the rest side by side."""
    found = {name: [e[name] for e in environments if name in e] for name in _ENVIRONMENT}
    return {name: "; ".join(dict.fromkeys(values)) for name, values in found.items() if values}


def _flat_text(value: Any) -> str:
    """`{"lr": 0.1, "augment": {"pad": 4}}` as `lr 0.1, augment.pad 4`; None is left out."""
    return ", ".join(f"{name} {leaf}".strip() for name, leaf in _leaves(value))


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list | tuple):
        if value:
            yield path, " ".join(map(_short, value))
    elif value is not None:
        yield path, _short(value)
