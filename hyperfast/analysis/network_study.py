"""A network and what was reconstructed from it, measured side by side."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from hyperfast.analysis.adversarial import attacked, calibrate_epsilon
from hyperfast.analysis.answers import Answers, Images, answers, spread
from hyperfast.analysis.corruptions import CORRUPTIONS, corrupted
from hyperfast.analysis.differences import LayerDifference, layer_differences, rmse
from hyperfast.analysis.interpolation import LinePoint, interpolation
from hyperfast.analysis.landscape import Landscape, Plane, landscape
from hyperfast.analysis.paired import McNemar, mcnemar
from hyperfast.analysis.quantization import quantized_accuracy
from hyperfast.analysis.spectra import Setting, low_pass_sweep, round_score, s_ratios, singular_value_sweep
from hyperfast.analysis.weights import changed, matrices

Progress: TypeAlias = Callable[[int, str], None]
Rows: TypeAlias = "list[dict[str, str | int | float]]"

ORIGINAL = "original"


@dataclass(frozen=True)
class StudyConfig:
    """What is measured, and how finely.

    Attributes:
        images: at most so many, evenly spread over the set, for accuracies.
        plane_images: the same for every place of the landscape.
        alphas: places on the line between two networks, 0 for no lines.
        grid: places along either axis of the landscape, 0 for none.
        epsilon: bound of the attacks in [0, 1].
        fgsm_accuracy: instead of `epsilon`: the accuracy that FGSM is to leave the original.
        steps: of I-FGSM, 0 for no attacks.
        corruptions: names of `CORRUPTIONS`; the default is the usual fifteen.
        severities: of each of them.
        blocks: paths of blocks of the original whose spectra are modulated.
        cutoffs: of the low pass.
        factors: of the last singular values.
        last: how many singular values are multiplied.
        bits: of the integers that weights are rounded to.
        seed: of the corruptions.
        batch_size: images at a time.

    Raises:
        ValueError: a number that is out of range, or an unknown corruption.
    """

    images: int = 10_000
    plane_images: int = 1_000
    alphas: int = 11
    grid: int = 9
    epsilon: float = 1 / 255
    fgsm_accuracy: float | None = None
    steps: int = 10
    corruptions: Sequence[str] = tuple(name for name, kind in CORRUPTIONS.items() if not kind.extra)
    severities: Sequence[int] = (1, 2, 3, 4, 5)
    blocks: Sequence[str] = ()
    cutoffs: Sequence[float] = (1, 1.5, 2, 3, 5, 8, 12, 18, 27, 40)
    factors: Sequence[float] = (0, 0.2, 0.4, 0.6, 0.8, 0.9, 1)
    last: int = 15
    bits: int = 8
    seed: int = 0
    batch_size: int = 500

    def __post_init__(self) -> None:
        for name, least in (("images", 1), ("plane_images", 1), ("steps", 0), ("epsilon", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {least}")
        for name in ("alphas", "grid"):
            if getattr(self, name) < 0 or getattr(self, name) == 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0, or at least 2")
        unknown = [name for name in self.corruptions if name not in CORRUPTIONS]
        if unknown:
            raise ValueError(f"corruptions has {unknown[0]!r}; choose from {', '.join(CORRUPTIONS)}")


@dataclass(eq=False)
class NetworkStudy:
    """What was measured. Networks are named; the first is `ORIGINAL`.

    Attributes:
        config: how.
        layers: names of the weights that are compared: those that any reconstruction changed.
        s_ratios: network -> layer -> `s_ratio`.
        differences: reconstruction -> layers against the original.
        rmse: reconstruction -> over all layers.
        round_scores: reconstruction -> `round_score`; empty with a single layer.
        answers: network -> answers on the images.
        tests: reconstruction -> McNemar's test, the original first.
        quantized: network -> accuracy with integer weights.
        lines: reconstruction -> the line from the original to it.
        planes: set of images -> landscape through the original, the first and the last reconstruction.
        plane_points: the networks of the landscapes.
        low_pass: block -> accuracy of the original over cutoffs.
        singular_values: block -> accuracy of the original over factors.
        epsilon: the bound that was used.
        attacks: `"FGSM"` and `"I-FGSM"` -> network -> accuracy.
        corruptions: name -> network -> accuracy by severity.
    """

    config: StudyConfig
    layers: list[str]
    s_ratios: dict[str, dict[str, float]]
    differences: dict[str, list[LayerDifference]]
    rmse: dict[str, float]
    round_scores: dict[str, float]
    answers: dict[str, Answers] = field(default_factory=dict)
    tests: dict[str, McNemar] = field(default_factory=dict)
    quantized: dict[str, float] = field(default_factory=dict)
    lines: dict[str, list[LinePoint]] = field(default_factory=dict)
    planes: dict[str, Landscape] = field(default_factory=dict)
    plane_points: tuple[str, ...] = ()
    low_pass: dict[str, list[Setting]] = field(default_factory=dict)
    singular_values: dict[str, list[Setting]] = field(default_factory=dict)
    epsilon: float = 0.0
    attacks: dict[str, dict[str, float]] = field(default_factory=dict)
    corruptions: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def mean_corruption(self, network: str) -> float:
        """Accuracy averaged over corruptions and severities."""
        values = [value for networks in self.corruptions.values() for value in networks[network]]
        return sum(values) / len(values)

    def tables(self) -> dict[str, Rows]:
        """Every number as rows, by the name of a file; those that have none are left out."""
        return {name: rows for name, rows in self._tables().items() if rows}

    def _tables(self) -> dict[str, Rows]:
        networks = list(self.s_ratios)
        summary: Rows = []
        for network in networks:
            row: dict[str, str | int | float] = {"network": network}
            row["rmse"] = self.rmse.get(network, 0.0)
            if network in self.round_scores:
                row["s_ratio_gain_last_half"] = self.round_scores[network]
            if network in self.answers:
                row |= {"accuracy": self.answers[network].accuracy, "loss": self.answers[network].loss}
                row[f"accuracy_int{self.config.bits}"] = self.quantized[network]
            if network in self.tests:
                row |= self.tests[network]._asdict()
            summary.append(row)
        layers: Rows = [
            {
                "network": network,
                "s_ratio": self.s_ratios[network][row.name],
                "s_ratio_original": self.s_ratios[ORIGINAL][row.name],
                **row._asdict(),
            }
            for network, rows in self.differences.items()
            for row in rows
        ]
        return {
            "summary": summary,
            "layers": layers,
            "interpolation": [
                {"network": network, **point._asdict()} for network, line in self.lines.items() for point in line
            ],
            "landscape": [row for name, plane in self.planes.items() for row in _plane_rows(name, plane)],
            "modulation": [
                {"kind": kind, "block": block, **setting._asdict()}
                for kind, sweeps in (("low_pass", self.low_pass), ("singular_values", self.singular_values))
                for block, settings in sweeps.items()
                for setting in settings
            ],
            "attacks": [
                {"attack": attack, "epsilon": self.epsilon, "network": network, "accuracy": accuracy}
                for attack, accuracies in self.attacks.items()
                for network, accuracy in accuracies.items()
            ],
            "corruptions": [
                {"corruption": name, "severity": severity, "network": network, "accuracy": accuracy}
                for name, by_network in self.corruptions.items()
                for network, accuracies in by_network.items()
                for severity, accuracy in zip(self.config.severities, accuracies, strict=True)
            ],
        }
    def write_csv(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write every table as a CSV file; the folder is created. Returns the paths.

        Tables that an earlier study left there and that this one does not have are removed.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for name, rows in self._tables().items():
            path = folder / f"{name}.csv"
            if not rows:
                path.unlink(missing_ok=True)
                continue
            columns = list(dict.fromkeys(column for row in rows for column in row))
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(rows)
            paths.append(path)
        return paths


def study_steps(reconstructions: int, config: StudyConfig, *, with_data: bool, sets: int = 1) -> int:
    """How many steps `study` will report; `sets` counts the sets of images of its landscapes."""
    networks = 1 + reconstructions
    if not with_data:
        return networks
    steps = networks + 2 * networks + reconstructions * config.alphas
    steps += sets * config.grid**2 if reconstructions > 1 else 0
    steps += len(config.blocks) * (len(config.cutoffs) + len(config.factors))
    steps += (2 * networks + (config.fgsm_accuracy is not None)) if config.steps else 0
    return steps + len(config.corruptions) * len(config.severities) * networks


def study(
    original: nn.Module,
    reconstructed: Mapping[str, nn.Module],
    data: Images | None = None,
    *,
    train: Images | None = None,
    config: StudyConfig | None = None,
    progress: Progress = lambda step, text: None,
) -> NetworkStudy:
    """Compare a network with what was reconstructed from it: rounds, methods or sizes.

    Args:
        original: the network. Neither it nor the others are changed.
        reconstructed: by name, in order; networks of the same architecture.
        data: test images; without them only the weights are compared.
        train: training images, for a landscape of their own.
        config: default `StudyConfig()`.
        progress: `progress(steps_done, text)`; there will be `study_steps` of them.

    Raises:
        ValueError: no reconstruction, one that is called `"original"`, networks of several architectures, or numbers
            that are not finite.
        ModuleNotFoundError: `jpeg_compression` without Pillow, extra `hyperfast[images]`.
    """
    config = config or StudyConfig()
    if not reconstructed or ORIGINAL in reconstructed:
        raise ValueError(
            f"reconstructed has {', '.join(reconstructed) or 'no network'}; expected at least one, none of them "
            f"called {ORIGINAL!r}"
        )
    steps = _Steps(progress)
    networks = {ORIGINAL: original, **reconstructed}
    layers = changed(original, list(reconstructed.values()))
    plane = _plane(networks, config) if data is not None else None
    ratios = {}
    for name, network in networks.items():
        ratios[name] = s_ratios(matrices(network, layers))
        steps.done(f"spectra of {name}")
    result = NetworkStudy(
        config,
        layers,
        ratios,
        {name: layer_differences(original, network, layers) for name, network in reconstructed.items()},
        {name: rmse(original, network, layers) for name, network in reconstructed.items()},
        {name: round_score(ratios[ORIGINAL], ratios[name]) for name in reconstructed if len(layers) > 1},
    )
    if data is not None:
        chosen = spread(data, config.images)
        _ask(result, networks, chosen, steps)
        _add_lines(result, networks, chosen, steps)
        if plane is not None:
            result.plane_points = _plane_points(networks)
            sets = {"test": data} if train is None else {"test": data, "train": train}
            for name, part in sets.items():
                result.planes[name] = _landscape(
                    original, plane, spread(part, config.plane_images), name, config, steps
                )
        _modulate(result, original, chosen, steps)
        _attack(result, networks, chosen, steps)
        _corrupt(result, networks, chosen, steps)
    return result


class _Steps:
    """Counts what is done."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._done = progress, 0

    def done(self, text: str) -> None:
        self._done += 1
        self._progress(self._done, text)


def _accuracy(result: NetworkStudy, data: Images, steps: _Steps, text: str) -> Callable[[nn.Module], float]:
    def evaluate(module: nn.Module) -> float:
        accuracy = answers(module, data, batch_size=result.config.batch_size).accuracy
        steps.done(text)
        return accuracy

    return evaluate


def _ask(result: NetworkStudy, networks: Mapping[str, nn.Module], data: Images, steps: _Steps) -> None:
    bits = result.config.bits
    for name, network in networks.items():
        result.answers[name] = answers(network, data, batch_size=result.config.batch_size)
        steps.done(f"accuracy of {name}")
        evaluate = _accuracy(result, data, steps, f"{name} with {bits}-bit weights")
        result.quantized[name] = quantized_accuracy(network, evaluate, bits=bits)
        if name != ORIGINAL:
            result.tests[name] = mcnemar(result.answers[ORIGINAL].correct, result.answers[name].correct)


def _add_lines(result: NetworkStudy, networks: Mapping[str, nn.Module], data: Images, steps: _Steps) -> None:
    count = result.config.alphas
    if not count:
        return
    alphas = [index / (count - 1) for index in range(count)]
    for name, network in networks.items():
        if name != ORIGINAL:
            evaluate = _accuracy(result, data, steps, f"line to {name}")
            result.lines[name] = interpolation(
                networks[ORIGINAL], network, evaluate, alphas=alphas, names=result.layers
            )


def _plane_points(networks: Mapping[str, nn.Module]) -> tuple[str, str, str]:
    """The original, the first reconstruction and the last."""
    names = list(networks)
    return names[0], names[1], names[-1]


def _plane(networks: Mapping[str, nn.Module], config: StudyConfig) -> Plane | None:
    if len(networks) < 3 or not config.grid:
        return None
    return Plane.through(*(networks[name] for name in _plane_points(networks)))


def _landscape(
    original: nn.Module, plane: Plane, data: Images, name: str, config: StudyConfig, steps: _Steps
) -> Landscape:
    def measure(module: nn.Module) -> dict[str, float]:
        found = answers(module, data, batch_size=config.batch_size)
        steps.done(f"landscape of {name} images")
        return {"loss": found.loss, "error": 1 - found.accuracy}

    x, y = plane.grid(config.grid)
    return landscape(original, plane, measure, x=x, y=y)


def _modulate(result: NetworkStudy, original: nn.Module, data: Images, steps: _Steps) -> None:
    config = result.config
    for block in config.blocks:
        evaluate = _accuracy(result, data, steps, f"spectra of {block}")
        result.low_pass[block] = low_pass_sweep(original, block, config.cutoffs, evaluate)
        result.singular_values[block] = singular_value_sweep(
            original, block, config.factors, evaluate, last=config.last
        )


def _attack(result: NetworkStudy, networks: Mapping[str, nn.Module], data: Images, steps: _Steps) -> None:
    config = result.config
    if not config.steps:
        return
    result.epsilon = config.epsilon
    if config.fgsm_accuracy is not None:
        original = networks[ORIGINAL]
        result.epsilon = calibrate_epsilon(original, data, config.fgsm_accuracy, batch_size=config.batch_size).epsilon
        steps.done("bound of the attacks")
    for attack, count in (("FGSM", 1), ("I-FGSM", config.steps)):
        found = result.attacks.setdefault(attack, {})
        for name, network in networks.items():
            found[name] = attacked(network, data, result.epsilon, steps=count, batch_size=config.batch_size).accuracy
            steps.done(f"{attack} on {name}")


def _corrupt(result: NetworkStudy, networks: Mapping[str, nn.Module], data: Images, steps: _Steps) -> None:
    config = result.config
    for kind in config.corruptions:
        found: dict[str, list[float]] = {name: [] for name in networks}
        for severity in config.severities:
            damaged = corrupted(data, kind, severity, seed=config.seed)
            evaluate = _accuracy(result, damaged, steps, f"{kind}, severity {severity}")
            for name, network in networks.items():
                found[name].append(evaluate(network))
        result.corruptions[kind] = found


def _plane_rows(name: str, plane: Landscape) -> Rows:
    columns: dict[str, list[list[float]]] = {kind: values.tolist() for kind, values in plane.values.items()}
    return [
        {"images": name, "x": a, "y": b, **{kind: values[j][i] for kind, values in columns.items()}}
        for j, b in enumerate(plane.y)
        for i, a in enumerate(plane.x)
    ]


def example_images(data: Images, names: Sequence[str], severities: Sequence[int], seed: int) -> dict[str, Tensor]:
    """One image of the set under every corruption: uint8 `[1 + len(severities), 3, H, W]`, as it is first."""
    one = spread(data, 1)
    return {
        name: torch.cat([one.images, *(corrupted(one, name, severity, seed=seed).images for severity in severities)])
        for name in names
    }
