"""Networks inherited from a teacher: plans, what they are tuned by, sweeps that are gone on with, and the page."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_task
import torch
from torch import nn

from hyperfast.nn import InheritedConv2d, inherit
from hyperfast.recipes import Comparison, InheritConfig, InheritPlan, TuneConfig, inherit_sweep, train
from hyperfast.recipes.inherit import FineTuning, make_plan, start
from hyperfast.recipes.inherit_plan import layer_table, load_plans
from hyperfast.recipes.inherit_report import page, sweep_table
from hyperfast.recipes.layer_cost import WHOLE, layer_costs
from hyperfast.recipes.metrics import read_metrics

pytest.importorskip("matplotlib")

CONFIG = tiny_task.config(epochs=2, lr_steps=(0.5,))
SMALL = InheritConfig(rank=1, heads=2)
LARGE = InheritConfig(energy=0.95, heads=1, only_smaller=False, recalibrate=2)


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    torch.set_num_threads(1)
    model = tiny_task.network(seed=9)
    train(model, tiny_task.splits(), tiny_task.config(epochs=4))
    return model


def sweep(folder: Path, teacher: nn.Module, *candidates: InheritConfig, **more: Any) -> tuple[Comparison, list[str]]:
    """The comparison, and the runs that were made."""
    made: list[str] = []
    comparison = inherit_sweep(
        teacher,
        more.pop("data", tiny_task.splits()),
        candidates or (SMALL, LARGE),
        more.pop("config", CONFIG),
        folder=folder,
        on_run=lambda run: made.append(run.folder.name),
        **more,
    )
    return comparison, made


@pytest.fixture(scope="module")
def swept(teacher: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    torch.set_num_threads(1)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    state = torch.get_rng_state()
    started: list[tuple[str, int]] = []
    comparison, made = sweep(
        tmp_path_factory.mktemp("sweep"),
        teacher,
        tuning=TuneConfig(balance=0.5),
        seeds=(0, 1),
        on_start=lambda name, seed, network: started.append((name, seed)),
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert started == [("r1-h2", 0), ("e0.95-h1", 0), ("r1-h2", 1), ("e0.95-h1", 1)]
    assert made == [f"{name}-seed{seed}" for name, seed in started]
    return comparison


def test_a_network_that_keeps_little_follows_its_teacher(swept: Comparison) -> None:
    assert [run.state for run in swept.runs] == ["finished"] * 4
    assert swept.methods["r1-h2"]["weights"] == {"labels": 0.1, "kd": 9.0, "balance": 0.5}
    assert swept.methods["e0.95-h1"]["weights"] == {"labels": 1.0, "balance": 0.5}
    first = read_metrics(swept.runs[0].folder)[0]
    assert {"cross_entropy", "kd", "balance"} <= first.keys() and first["balance"] >= 0
    assert first["loss"] == pytest.approx(0.1 * first["cross_entropy"] + 9 * first["kd"] + 0.5 * first["balance"])
    assert "kd" not in read_metrics(swept.runs[1].folder)[0]


def test_gradients_are_clipped_where_the_teacher_is_followed(teacher: nn.Module) -> None:
    data, (network, report) = tiny_task.splits(), start(teacher, SMALL, None, CONFIG)
    norms: list[float | None] = []

    def tuned(kd: bool, **settings: Any) -> float | None:
        def fit(*given: Any, **_: Any) -> Any:
            norms.append(given[3].clip_grad_norm)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hyperfast.recipes.inherit.fit", fit)
            FineTuning(SMALL, TuneConfig(), kd, 1).train(network, teacher, data, replace(CONFIG, **settings))
        return norms[-1]

    assert report.energy < 0.9
    assert tuned(True) == 1.0 and tuned(False) is None and tuned(True, clip_grad_norm=5.0) == 5.0


def test_plans_say_what_became_of_the_layers(swept: Comparison, teacher: nn.Module) -> None:
    plans = load_plans(swept.folder)
    plan = plans["r1-h2"]
    _, report = inherit(teacher, rank=1, heads=2)
    assert plan.config == SMALL and plan.report == report and isinstance(plan.report.rows[0].shape, tuple)
    assert plan.accuracy is not None and plan.batch == 64
    assert swept.methods["r1-h2"]["parameters"] == report.inherited
    columns, rows = layer_table(plan)
    assert columns[:3] == ["layer", "became", "energy\nkept"] and len(columns) == len(rows[0])
    assert rows[0][:2] == ["layer1.0", "rank 1 of 8"] and rows[2][1] == "as it was: it is the classifier"
    assert rows[-1][0] == WHOLE and rows[-1][1] == "2 of 3 layers"
    assert rows[-1][3:5] == [f"{report.parameters:,}", f"{report.inherited:,}"]


def test_heads_are_diagnosed_after_the_training(swept: Comparison) -> None:
    several, one = (json.loads((run.folder / "gates.json").read_text()) for run in swept.runs[:2])
    assert [row["name"] for row in several] == ["layer1.0", "layer2.0"] and one == []
    assert all(0 <= row["entropy"] <= 1 and -1 <= row["similarity"] <= 1 for row in several)


def test_the_page(swept: Comparison) -> None:
    text = (swept.folder / "report.html").read_text()
    for words in (
        "Networks inherited from a teacher",
        "Accuracy against size",
        "2 heads",
        "1 head<",
        "r1-h2",
        "heads&#x27;",
    ):
        assert words in text
    assert "0.1 × labels + 9 × kd + 0.5 × balance" in text and "0 of 4" not in text
    assert not re.search(r"(src|href)=.?http", text)
    columns, rows = sweep_table(swept, load_plans(swept.folder))
    assert columns[:6] == ["network", "parameters", "energy", "at once,\n%", "forward,\nms", "runs"]
    assert [row[0] for row in rows] == ["teacher", "r1-h2", "e0.95-h1"] and all(
        len(row) == len(columns) for row in rows
    )


def test_a_page_before_any_run_has_finished(swept: Comparison) -> None:
    runs = tuple(replace(run, result=None, folder=Path("nowhere")) for run in swept.runs)
    text = page(replace(swept, runs=runs), load_plans(swept.folder)).render()
    assert "0 of 4 runs finished" in text and "Accuracy against size" not in text


def test_a_sweep_is_gone_on_with(swept: Comparison, teacher: nn.Module) -> None:
    timed = load_plans(swept.folder)["r1-h2"].costs
    more = InheritConfig(rank=2, heads=2)
    comparison, made = sweep(swept.folder, teacher, SMALL, more, tuning=TuneConfig(balance=0.5), seeds=(0,))
    assert made == ["r2-h2-seed0"] and len(comparison.runs) == 5
    assert load_plans(swept.folder)["r1-h2"].costs == timed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuning": TuneConfig()}, "method r1-h2.weights.balance was 0.5 and is now None"),
        ({"config": replace(CONFIG, lr=0.3)}, "training.lr was 0.02 and is now 0.3"),
    ],
)
def test_other_settings_are_refused(
    changes: dict[str, Any], message: str, swept: Comparison, teacher: nn.Module
) -> None:
    before = (swept.folder / "plans.json").read_text()
    with pytest.raises(ValueError, match=message):
        sweep(swept.folder, teacher, SMALL, **{"tuning": TuneConfig(balance=0.5), **changes})
    with pytest.raises(ValueError, match="method r1-h2.inherit.deviation was 0.0 and is now 0.1"):
        sweep(swept.folder, teacher, replace(SMALL, deviation=0.1), tuning=TuneConfig(balance=0.5))
    assert (swept.folder / "plans.json").read_text() == before


def test_calibration_and_recalibration_show_training_images(teacher: nn.Module) -> None:
    data = tiny_task.splits()
    torch.manual_seed(0)
    plain, _ = start(teacher, SMALL, data, CONFIG)
    torch.manual_seed(0)
    calibrated, _ = start(teacher, replace(SMALL, calibration=2, recalibrate=2), data, CONFIG)
    for name in ("layer1.0.down.weight", "layer1.1.running_mean"):
        assert not torch.allclose(plain.state_dict()[name], calibrated.state_dict()[name])
    with pytest.raises(ValueError, match="calibration and recalibrate show images to the network; give data"):
        start(teacher, replace(SMALL, recalibrate=2), None, CONFIG)


def test_costs_are_counted_and_timed(teacher: nn.Module) -> None:
    student, _ = inherit(teacher, rank=2, heads=3, classifier=True, only_smaller=False)
    images = torch.randn(5, 3, 8, 8)
    names = ["layer1.0", "layer2.0", "head.1"]
    costs = {cost.name: cost for cost in layer_costs(teacher, student, images, names, repeats=1)}
    assert list(costs) == [*names, WHOLE]
    conv, linear = costs["layer2.0"], costs["head.1"]
    assert conv.flops == 2 * 8 * 8 * 9 * 64
    assert conv.inherited_flops == 2 * (2 * 8 * 9 * 64 + 3 * 2 + 3 * 8 * 2 + 8 * 2 * 64)
    assert linear.flops == 2 * 128 * 4 and linear.inherited_flops == 2 * (128 * 2 + 3 * 2 + 3 * 4 * 2)
    assert costs[WHOLE].flops == sum(costs[name].flops for name in names)
    assert all(cost.ms > 0 and cost.inherited_ms > 0 for cost in costs.values())
    same = layer_costs(teacher, teacher, images, ["layer1.0"], repeats=1)[0]
    assert (same.flops, same.ms) == (same.inherited_flops, same.inherited_ms)
    assert isinstance(student.get_submodule("layer1.0"), InheritedConv2d)


def test_a_plan_without_validation_images(teacher: nn.Module) -> None:
    data = tiny_task.splits()
    none = data.val.subset(torch.arange(0))
    assert make_plan(teacher, SMALL, replace(data, val=none, test=none), CONFIG).accuracy is None
    plan = make_plan(teacher, SMALL, replace(data, val=none), CONFIG)
    assert isinstance(plan, InheritPlan) and plan.accuracy is not None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InheritConfig(rank=1, calibration=-1), "calibration is -1; give a number of batches"),
        (lambda: TuneConfig(balance=-1), "balance is -1; it must not be negative"),
        (lambda: TuneConfig(kd_weight=0), "kd_weight is 0; it must be positive"),
        (lambda: TuneConfig(enough=2), r"enough is 2; expected a share of the energy in \[0, 1\]"),
    ],
)
def test_settings_that_make_no_sense(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_candidates_that_cannot_be(teacher: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a candidate is given twice: r1-h2, r1-h2"):
        sweep(tmp_path / "new", teacher, SMALL, SMALL)
    with pytest.raises(ValueError, match="rank is 0; it must be at least 1"):
        sweep(tmp_path / "new", teacher, InheritConfig(rank=0))
    assert not (tmp_path / "new").exists()
    (tmp_path / "plans.json").write_text("{")
    with pytest.raises(ValueError, match="plans.json is damaged or was not written by this hyperfast"):
        sweep(tmp_path, teacher, SMALL)
