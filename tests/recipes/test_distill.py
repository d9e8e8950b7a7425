from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_task
import torch
import torch.nn.functional as F
from helpers import on_threads
from torch import nn

import hyperfast
from hyperfast import losses
from hyperfast.nn import hypernetize
from hyperfast.recipes import METHODS, Distillation, DistillConfig, LossTerm, TapWeights, distill, train
from hyperfast.surgery import taps


class Crash(Exception):
    pass


@pytest.fixture(scope="module")
def teacher() -> tiny_task.Network:
    """Wider than the students, and good at the task."""
    model = tiny_task.network(seed=9, width=12)
    with on_threads(1):
        result = train(model, tiny_task.splits(), tiny_task.config(epochs=6))
    assert result.test_accuracy_last is not None and result.test_accuracy_last > 0.9
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    images = tiny_task.image_set(16, 5)
    return images.images.float() / 255, images.labels


def total_of(config: DistillConfig, teacher: nn.Module, student: nn.Module, progress: float = 0.0) -> Any:
    objective = Distillation(student, teacher, config, batch()[0][:2], label_smoothing=0.1)
    with objective.watch(student):
        return objective, objective(student, *batch(), progress)


def test_the_total_is_the_weighted_sum(teacher: tiny_task.Network) -> None:
    student = tiny_task.network(dropout=0.0)
    config = DistillConfig({"at": LossTerm(beta=50.0)}, cross_entropy_weight=0.5, kd_weight=0.25, temperature=3.0)
    objective, found = total_of(config, teacher, student)
    images, labels = batch()
    teacher.eval()
    with taps(student, teacher) as read:
        logits, teacher_logits = student(images), teacher(images)
        cross_entropy = F.cross_entropy(logits, labels, label_smoothing=0.1)
        kd = losses.LogitDistillation(3.0)(logits, teacher_logits)
        at = hyperfast.functional.attention_transfer([*read.student.values()], [*read.teacher.values()])
    assert torch.allclose(found.total, 0.5 * cross_entropy + 50 * at.mean() + 0.25 * kd)
    assert torch.allclose(found.terms["at"], at) and torch.allclose(found.terms["kd"], kd)
    assert objective.tap_names("at") == ["layer1", "layer2"] and objective.tap_names("kd") is None


def test_default_is_attention_transfer_with_weight_1000(teacher: tiny_task.Network) -> None:
    _, found = total_of(DistillConfig(), teacher, tiny_task.network())
    expected = found.terms["cross_entropy"] + 1000 * found.terms["at"].mean()
    assert torch.allclose(found.total, expected)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_by_name(teacher: tiny_task.Network, name: str) -> None:
    student = tiny_task.network(width=12, dropout=0.0)
    config = DistillConfig({name: LossTerm()}, cross_entropy_weight=0.0)
    _, found = total_of(config, teacher, student)
    losses = found.terms[name]
    if name.startswith("hcd"):
        expected = losses @ torch.tensor([1.0, 1.0, 6.0, 1.0])
    else:
        expected = losses.sum() if name in ("fmd", "ofa") else losses.mean()
    assert torch.allclose(found.total, METHODS[name].beta * expected)
    found.total.backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in student.parameters())


@pytest.mark.parametrize("schedule", ["uniform", "travelling"])
def test_losses_between_gram_matrices(schedule: str) -> None:
    terms = {"sp": LossTerm(), "rkd": LossTerm(), "fsp": LossTerm()}
    tap_weights = TapWeights(schedule, sigma=0.5, minimum=0.0)
    config = DistillConfig(terms, cross_entropy_weight=0.0, tap_weights=tap_weights, at="stages")
    objective, found = total_of(config, tiny_task.network(seed=9), tiny_task.network(), progress=1.0)
    assert objective.tap_names("sp") == objective.tap_names("rkd") == ["layer1", "layer2"]
    assert objective.tap_names("fsp") == ["layer1>layer2"]
    share = torch.tensor([0.5, 0.5]) if schedule == "uniform" else torch.softmax(torch.tensor([-2.0, 0.0]), 0)
    expected = found.terms["sp"] @ (3000 * share) + found.terms["rkd"] @ share + 50 * found.terms["fsp"].sum()
    assert torch.allclose(found.total, expected, rtol=1e-5)
    assert found.total > 0


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_tap_weights_travel(teacher: tiny_task.Network, progress: float) -> None:
    schedule = TapWeights("travelling", sigma=0.5, minimum=0.0)
    config = DistillConfig({"at": LossTerm(beta=2.0)}, cross_entropy_weight=0.0, tap_weights=schedule)
    _, found = total_of(config, teacher, tiny_task.network(), progress)
    assert torch.allclose(found.total, 2 * (schedule(2, progress) * found.terms["at"]).sum())


def test_no_gradient_reaches_the_teacher_and_it_is_left_as_it_was(teacher: tiny_task.Network) -> None:
    teacher.train()
    before = copy.deepcopy(teacher.state_dict())
    _, found = total_of(DistillConfig(kd_weight=1.0), teacher, tiny_task.network())
    found.total.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert teacher.training and teacher.layer1[2].inplace


@pytest.mark.parametrize(
    "config",
    [
        DistillConfig(),
        DistillConfig(kd_weight=1.0, losses={}),
        DistillConfig(cross_entropy_weight=0.0, losses={}, kd_weight=1.0),
        DistillConfig(at=["*.2:input"], tap_weights=TapWeights("travelling")),
    ],
    ids=["attention", "logits", "logits alone", "travelling"],
)
def test_a_student_learns_from_a_teacher(tmp_path: Path, teacher: tiny_task.Network, config: DistillConfig) -> None:
    result = distill(
        tiny_task.network(), teacher, tiny_task.splits(), tiny_task.config(epochs=6), config, folder=tmp_path
    )
    assert result.test_accuracy_best is not None and result.test_accuracy_best > 0.8
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first, last = lines[0], [line for line in lines if line["kind"] == "train"][-1]
    for name in config.losses:
        assert len(first[name]) == 2
        assert sum(last[name].values()) < sum(first[name].values())
    if config.kd_weight:
        assert last["kd"] < first["kd"]


def test_a_hypernetised_student_learns_and_keeps_its_step_factors_when_resumed(
    tmp_path: Path, teacher: tiny_task.Network
) -> None:
    def student(seed: int) -> nn.Module:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return hypernetize(tiny_task.network(seed))

    def crash(step: int) -> None:
        if step == 9:
            raise Crash

    data, settings = tiny_task.splits(), tiny_task.config(epochs=4, checkpoint_every=4)
    whole, resumed = student(0), student(5)
    distill(whole, teacher, data, settings, folder=tmp_path / "whole")
    with pytest.raises(Crash):
        distill(student(0), teacher, data, settings, folder=tmp_path / "cut", on_step=crash)
    result = distill(resumed, teacher, data, settings, folder=tmp_path / "cut", resume=True)
    expected = whole.state_dict()
    assert [name for name, tensor in resumed.state_dict().items() if not torch.equal(tensor, expected[name])] == []
    assert result.test_accuracy_last is not None and result.test_accuracy_last > 0.8


def test_resuming_with_another_distillation_is_refused(tmp_path: Path, teacher: tiny_task.Network) -> None:
    data, settings = tiny_task.splits(), tiny_task.config(epochs=1)
    distill(tiny_task.network(), teacher, data, settings, folder=tmp_path)
    with pytest.raises(ValueError, match=r"distillation was .*'kd_weight': 0\.0.* and is now .*'kd_weight': 2\.0"):
        other = DistillConfig(kd_weight=2.0)
        distill(tiny_task.network(), teacher, data, settings, other, folder=tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"distillation was .* and is now None"):
        train(tiny_task.network(), data, settings, folder=tmp_path, resume=True)


def test_settings_that_cannot_be_are_named() -> None:
    with pytest.raises(ValueError, match=r"there is no loss 'fitnet' \(did you mean fitnets\?\); choose from 'at'"):
        DistillConfig({"fitnet": LossTerm()})
    with pytest.raises(ValueError, match=r"kd_weight is -1\.0; it must not be negative"):
        DistillConfig(kd_weight=-1.0)
    with pytest.raises(ValueError, match=r"weights among its options, and tap_weights has the schedule 'travelling'"):
        DistillConfig({"at": LossTerm(options={"weights": [1.0]})}, tap_weights=TapWeights("travelling"))
    with pytest.raises(ValueError, match="nothing to minimise"):
        DistillConfig({}, cross_entropy_weight=0.0)


def test_taps_and_classes_that_do_not_fit_are_named(teacher: tiny_task.Network) -> None:
    data, settings = tiny_task.splits(), tiny_task.config(epochs=1)
    with pytest.raises(ValueError, match="matches no module"):
        distill(tiny_task.network(), teacher, data, settings, DistillConfig(at=["stage9"]))
    with pytest.raises(ValueError, match="2 student taps but 1 teacher taps"):
        distill(tiny_task.network(), teacher, data, settings, DistillConfig(teacher_at=["layer1"]))
    with pytest.raises(ValueError, match="the same images and the same classes"):
        distill(tiny_task.network(classes=5), teacher, data, settings, DistillConfig({}, kd_weight=1.0))


def test_the_objective_needs_its_taps(teacher: tiny_task.Network) -> None:
    objective = Distillation(tiny_task.network(), teacher, DistillConfig(), batch()[0])
    with pytest.raises(RuntimeError, match=r"inside its watch\(\) block"):
        objective(tiny_task.network(), *batch(), 0.0)
