"""A page and tables about a network and what was reconstructed from it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from hyperfast.analysis.answers import Images
from hyperfast.analysis.figures import Line, lines_svg, surface_svg
from hyperfast.analysis.network_study import ORIGINAL, NetworkStudy, Progress, StudyConfig, example_images, study
from hyperfast.analysis.report import Cell, Report
from hyperfast.analysis.spectra import Setting


def network_report(
    original: nn.Module,
    reconstructed: Mapping[str, nn.Module],
    data: Images | None = None,
    *,
    out: str | os.PathLike[str],
    train: Images | None = None,
    config: StudyConfig | None = None,
    title: str = "Reconstructed networks",
    facts: Mapping[str, object] | None = None,
    progress: Progress = lambda step, text: None,
) -> NetworkStudy:
    """Write `report.html`, which needs nothing else, and its numbers as CSV files beside it.

    Args:
        original: the network.
        reconstructed: by name, in order, such as rounds.
        data: test images; without them only the weights are compared.
        out: the folder; it is created.
        train: training images, for a landscape of their own.
        config: what is measured, default `StudyConfig()`.
        title: of the page.
        facts: what else stands at its top: the command, the sizes, the machine.
        progress: as in `study`.

    Returns:
        What was measured.

    Raises:
        ValueError: as `study`.
        ModuleNotFoundError: matplotlib (extra `hyperfast[demo]`) or Pillow (`hyperfast[images]`) is not installed.
    """
    result = study(original, reconstructed, data, train=train, config=config, progress=progress)
    result.write_csv(out)
    page(result, data, title=title, facts=facts or {}).write(Path(out) / "report.html")
    return result


def page(result: NetworkStudy, data: Images | None, *, title: str, facts: Mapping[str, object]) -> Report:
    """The page about a study; `data` for the picture of the corruptions."""
    report = Report(title, f"{len(result.rmse)} reconstructed from one network, compared with it.")
    settings: dict[str, object] = {**facts, "layers compared": len(result.layers)}
    if result.answers:
        settings["images"] = len(result.answers[ORIGINAL].correct)
    report.facts(settings)
    report.section("Summary")
    _summary(report, result)
    report.section("Weights")
    _weights(report, result)
    if result.lines:
        report.section("Lines between networks")
        _lines(report, result)
    if result.planes:
        report.section("Loss landscape")
        _planes(report, result)
    if result.low_pass:
        report.section("Modulated spectra")
        _modulation(report, result)
    if result.attacks or result.corruptions:
        report.section("Robustness")
        _robustness(report, result, data)
    return report


def _summary(report: Report, result: NetworkStudy) -> None:
    columns = ["network", "RMSE", "gain of S, last half"]
    if result.answers:
        columns += ["accuracy", "loss", f"int{result.config.bits} accuracy", "only original", "only this", "p"]
    rows: list[list[Cell]] = []
    for network in result.s_ratios:
        gain = result.round_scores.get(network)
        row: list[Cell] = [network, _number(result.rmse.get(network)), _number(gain, "+.4f")]
        if result.answers:
            answer, test = result.answers[network], result.tests.get(network)
            row += [_percent(answer.accuracy), f"{answer.loss:.4f}", _percent(result.quantized[network])]
            row += [test.only_first, test.only_second, f"{test.p_value:.3g}"] if test else [None, None, None]
        rows.append(row)
    caption = (
        "RMSE: root of the mean square over all compared weights. S: the share of a layer's energy in the first half "
        "of its singular values; its gain is averaged over the last half of the layers."
    )
    if result.answers:
        caption += (
            f" int{result.config.bits}: weights rounded, one scale per output channel, activations in floats. Only: "
            "images that one of the two has right and the other wrong; p is that of McNemar's exact two-sided test."
        )
    report.table(columns, rows, caption)


def _weights(report: Report, result: NetworkStudy) -> None:
    places = list(range(1, len(result.layers) + 1))
    original = result.s_ratios[ORIGINAL]
    gains = [
        Line(name, places, [result.s_ratios[name][layer] - original[layer] for layer in result.layers])
        for name in result.rmse
    ]
    means = [Line(name, places, [row.mean_absolute for row in rows]) for name, rows in result.differences.items()]
    squares = [Line(name, places, [row.rmse for row in rows]) for name, rows in result.differences.items()]
    report.figures(
        (
            lines_svg(gains, xlabel="layer", ylabel="S − S of the original", whole=True, reference=(ORIGINAL, 0.0)),
            "Singular value ratio by layer. Above zero the weights are smoother than the original's.",
        ),
        (
            lines_svg([Line(ORIGINAL, places, list(original.values()))], xlabel="layer", ylabel="S", whole=True),
            "Singular value ratio of the original.",
        ),
    )
    report.figures(
        (lines_svg(means, xlabel="layer", ylabel="mean |w − w′|", whole=True), "Mean absolute difference by layer."),
        (lines_svg(squares, xlabel="layer", ylabel="RMSE", whole=True), "Root of the mean square by layer."),
    )
    if len(result.round_scores) > 1:
        rounds = list(range(1, len(result.round_scores) + 1))
        score = Line("mean over the last half of the layers", rounds, list(result.round_scores.values()))
        report.figures(
            (
                lines_svg([score], xlabel="reconstruction, in order", ylabel="S − S of the original", whole=True),
                "Gain of the singular value ratio over the reconstructions: " + ", ".join(result.round_scores) + ".",
            )
        )
    rows: list[list[Cell]] = []
    for place, layer in zip(places, result.layers, strict=True):
        added = (f"{result.s_ratios[name][layer] - original[layer]:+.4f}" for name in result.rmse)
        rows.append([f"{place} {layer}", f"{original[layer]:.4f}", *added])
    report.table(["layer", "S", *result.rmse], rows, "S of the original, and what each reconstruction adds.")


def _lines(report: Report, result: NetworkStudy) -> None:
    def lines(value: str) -> list[Line]:
        return [
            Line(name, [point.alpha for point in points], [getattr(point, value) for point in points])
            for name, points in result.lines.items()
        ]

    accuracy = result.answers[ORIGINAL].accuracy
    report.figures(
        (
            lines_svg(lines("accuracy"), xlabel="α", ylabel="accuracy", percent=True, reference=(ORIGINAL, accuracy)),
            "Accuracy of (1 − α) original + α reconstruction.",
        ),
        (lines_svg(lines("rmse"), xlabel="α", ylabel="RMSE"), "Distance to the original on the same way."),
    )


def _planes(report: Report, result: NetworkStudy) -> None:
    names = ", ".join(result.plane_points)
    report.text(
        f"The plane through {names}: distances are those between weights. The running statistics of norms are the "
        f"original's everywhere; {result.config.plane_images} images at most."
    )
    for images, plane in result.planes.items():
        points = dict(zip(result.plane_points, plane.points, strict=True))
        report.figures(
            *(
                (
                    surface_svg(
                        plane.x,
                        plane.y,
                        plane.values[kind],
                        xlabel=f"from {result.plane_points[0]} to {result.plane_points[1]}",
                        ylabel=f"towards {result.plane_points[2]}",
                        label=kind,
                        points=points,
                        percent=kind == "error",
                    ),
                    f"{kind.capitalize()} on {images} images.",
                )
                for kind in plane.values
            )
        )


def _modulation(report: Report, result: NetworkStudy) -> None:
    def lines(sweeps: Mapping[str, list[Setting]]) -> list[Line]:
        return [
            Line(block, [setting.value for setting in settings], [setting.accuracy for setting in settings])
            for block, settings in sweeps.items()
        ]

    reference = (ORIGINAL, result.answers[ORIGINAL].accuracy)
    report.figures(
        (
            lines_svg(
                lines(result.low_pass), xlabel="cutoff frequency D₀", ylabel="accuracy", percent=True, log_x=True,
                reference=reference,
            ),
            "The original with the kernels of one block through a Gaussian low pass.",
        ),
        (
            lines_svg(
                lines(result.singular_values), xlabel="factor", ylabel="accuracy", percent=True, reference=reference
            ),
            f"The original with the last {result.config.last} singular values of every convolution of one block "
            "multiplied by a factor.",
        ),
    )  # fmt: skip


def _robustness(report: Report, result: NetworkStudy, data: Images | None) -> None:
    networks = list(result.answers)
    columns, rows = ["accuracy under", *networks], []
    rows.append(["nothing", *(_percent(result.answers[name].accuracy) for name in networks)])
    for attack, accuracies in result.attacks.items():
        rows.append([attack, *(_percent(accuracies[name]) for name in networks)])
    if result.corruptions:
        rows.append(["corruptions, mean", *(_percent(result.mean_corruption(name)) for name in networks)])
    for corruption, by_network in result.corruptions.items():
        means = (sum(by_network[name]) / len(by_network[name]) for name in networks)
        rows.append([corruption.replace("_", " "), *map(_percent, means)])
    caption = ""
    if result.attacks:
        caption = (
            f"Attacks: every pixel by at most {result.epsilon * 255:.3f} / 255, each network against itself, "
            f"I-FGSM in {result.config.steps} steps. "
        )
    if result.corruptions:
        caption += f"Corruptions: mean over severities {', '.join(map(str, result.config.severities))}."
    report.table(columns, rows, caption)
    if result.corruptions:
        severities = list(result.config.severities)
        mean = [
            Line(name, severities, [_mean_at(result, name, index) for index in range(len(severities))])
            for name in networks
        ]
        report.figures(
            (
                lines_svg(mean, xlabel="severity", ylabel="accuracy", percent=True, whole=True),
                "Accuracy averaged over the corruptions.",
            )
        )
        if data is not None:
            pictures = example_images(data, list(result.corruptions), severities, result.config.seed)
            report.images(
                {name.replace("_", " "): images for name, images in pictures.items()},
                ["original", *(f"severity {severity}" for severity in severities)],
                "One of the images under every corruption.",
            )


def _mean_at(result: NetworkStudy, network: str, index: int) -> float:
    values = [by_network[network][index] for by_network in result.corruptions.values()]
    return sum(values) / len(values)


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _number(value: float | None, form: str = ".5f") -> str | None:
    return None if value is None else format(value, form)
