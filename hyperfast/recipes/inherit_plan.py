"""What is to be inherited from a teacher, and what becomes of each of its layers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from hyperfast.nn import GateRow, InheritReport, InheritRow
from hyperfast.nn.inherited import GateInput
from hyperfast.recipes import checkpoint
from hyperfast.recipes.layer_cost import WHOLE, LayerCost
from hyperfast.surgery.low_rank import Split

PLANS = "plans.json"


@dataclass(frozen=True)
class InheritConfig:
    """How a network is made of its teacher; most as `hyperfast.inherit` has it.

    Attributes:
        rank: of every layer. One of rank, energy and budget is given.
        energy: share of its squared singular values that each layer keeps.
        budget: parameters of the whole network.
        heads: of each layer.
        init: exact: the layer of low rank whatever the gates say; paper: one over the number of heads of that.
        split: where the singular values go: balanced, up (to the heads) or down.
        gate: random or zero (uniform gates, for which heads must differ: deviation).
        gate_input: what the gates read: the compressed feature, or the layer's input.
        deviation: noise that tells the heads apart, in standard deviations of their values; 0.005 to 0.01 in InherAct.
        include: globs over the names of the layers to replace.
        exclude: globs of those to leave.
        classifier: replace the last linear layer too.
        only_smaller: leave a layer that would grow.
        calibration: batches of training images from which each layer's inputs are learned, so that the error of its
            outputs is the smallest, and not that of its weights; 0: none.
        recalibrate: batches of training images over which batch norms take new statistics before the training; 0: they
            keep those of the full layers.
    """

    rank: int | None = None
    energy: float | None = None
    budget: int | None = None
    heads: int = 3
    init: Literal["exact", "paper"] = "exact"
    split: Split = "balanced"
    gate: Literal["random", "zero"] = "random"
    gate_input: GateInput = "compressed"
    deviation: float = 0.0
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    classifier: bool = False
    only_smaller: bool = True
    calibration: int = 0
    recalibrate: int = 0

    def __post_init__(self) -> None:
        for name in ("calibration", "recalibrate"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number of batches, or 0 for none")

    @property
    def name(self) -> str:
        """Such as r16-h3, e0.9-h3 or b200000-h1."""
        sizes = {"r": self.rank, "e": self.energy, "b": self.budget}
        given = next((f"{letter}{value!r}" for letter, value in sizes.items() if value is not None), "")
        return f"{given}-h{self.heads}"

    def keywords(self) -> dict[str, Any]:
        """As `hyperfast.inherit` takes them, but for the batches."""
        values = {field.name: getattr(self, field.name) for field in fields(InheritConfig)}
        return {name: value for name, value in values.items() if name not in ("calibration", "recalibrate")}


@dataclass(frozen=True)
class TuneConfig:
    r"""What an inherited network is fine-tuned by: :math:`\mathrm{CE}`, or
    :math:`0.1 \, \mathrm{CE} + 9 \, T^2 \, \mathrm{KL}(teacher, student)`.

    Attributes:
        kd: follow the teacher's logits too; None: where the network keeps less of the energy than `enough`. The paper
            finds that it helps at low ranks and hurts at high ones.
        cross_entropy_weight: of the labels, with the teacher.
        kd_weight: of the logits.
        temperature: T.
        balance: weight of a term that keeps the heads in even use (`nn.load_balance_loss`); 0.01 in InherAct.
        enough: share of the energy, the mean over the replaced layers, from which on labels alone do.
        kd_clip: the gradient's L2 norm is clipped to this, with the teacher, where the settings of the training do not
            say otherwise: without, such training was found unstable at the paper's learning rate.
    """

    kd: bool | None = None
    cross_entropy_weight: float = 0.1
    kd_weight: float = 9.0
    temperature: float = 2.0
    balance: float = 0.0
    enough: float = 0.9
    kd_clip: float = 1.0

    def __post_init__(self) -> None:
        for name in ("cross_entropy_weight", "balance"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        for name in ("kd_weight", "temperature", "kd_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if not 0 <= self.enough <= 1:
            raise ValueError(f"enough is {self.enough}; expected a share of the energy in [0, 1]")


@dataclass(frozen=True)
class InheritPlan:
    """What became of a teacher, before any training.

    Attributes:
        config: how it was made.
        teacher: SHA-256 of the teacher.
        report: what became of every layer.
        costs: of every layer and of the network.
        batch: images of a forward pass of `costs`.
        accuracy: on the validation images, or where there are none, the test images; None without images.
    """

    config: InheritConfig
    teacher: str
    report: InheritReport
    costs: tuple[LayerCost, ...]
    batch: int
    accuracy: float | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> InheritPlan:
        """Back from `asdict` and JSON."""
        rows = tuple(InheritRow(**{**row, "shape": tuple(row["shape"])}) for row in values["report"]["rows"])
        config: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values["config"].items()
        }
        return cls(
            InheritConfig(**config),
            values["teacher"],
            InheritReport(rows, values["report"]["parameters"], values["report"]["inherited"]),
            tuple(LayerCost(**cost) for cost in values["costs"]),
            values["batch"],
            values["accuracy"],
        )


def load_plans(folder: Path) -> dict[str, InheritPlan]:
    """The plans of a sweep by name; none where there is none.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / PLANS
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {name: InheritPlan.from_json(plan) for name, plan in values.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or was not written by this hyperfast ({error!r})") from error


def save_plans(folder: Path, plans: Mapping[str, InheritPlan]) -> None:
    """Write the plans of a sweep, all or nothing."""
    checkpoint.write_json(folder / PLANS, {name: asdict(plan) for name, plan in plans.items()})


def layer_table(plan: InheritPlan, gates: Sequence[GateRow] = ()) -> tuple[list[str], list[list[str | None]]]:
    """Columns and rows of the table of all layers, the network last; with `gates` what the heads do after training."""
    costs = {cost.name: cost for cost in plan.costs}
    heads = {row.name: row for row in gates}
    columns = ["layer", "became", "energy\nkept", "parameters", "after", "MFLOP", "after", "ms", "after"]
    if gates:
        columns += ["gate\nentropy", "heads'\nusage", "heads'\ncosine"]
    rows = [
        [
            row.name,
            f"rank {row.rank} of {row.full_rank}" if row.reason is None else f"as it was: {row.reason}",
            f"{row.energy:.3f}" if row.reason is None else None,
            *_before_and_after(row.parameters, row.inherited, row.reason is None),
            *_cost(costs.get(row.name), row.reason is None),
        ]
        for row in plan.report.rows
    ]
    report = plan.report
    replaced = sum(row.reason is None for row in report.rows)
    rows.append(
        [
            WHOLE,
            f"{replaced} of {len(report.rows)} layers",
            f"{report.energy:.3f}",
            *_before_and_after(report.parameters, report.inherited, True),
            *_cost(costs.get(WHOLE), True),
        ]
    )
    if gates:
        for row in rows:
            found = heads.get(str(row[0]))
            numbers = (None,) * 3 if found is None else (found.entropy, found.usage, found.similarity)
            row += [None if number is None else f"{number:.3f}" for number in numbers]
    return columns, rows


def _before_and_after(before: int, after: int, replaced: bool) -> list[str | None]:
    return [f"{before:,}", f"{after:,}" if replaced else None]


def _cost(cost: LayerCost | None, replaced: bool) -> list[str | None]:
    if cost is None:
        return [None] * 4
    before, after = (f"{flops / 1e6:,.2f}" for flops in (cost.flops, cost.inherited_flops))
    times = f"{cost.ms:.3f}", f"{cost.inherited_ms:.3f}"
    return [before, after if replaced else None, times[0], times[1] if replaced else None]
