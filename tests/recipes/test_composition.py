"""Losses side by side: each with its own taps, connectors, weights, part of the training; what is logged of them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_task
import torch
from torch import Tensor, nn

from hyperfast import losses
from hyperfast.data import Augment, DeviceLoader
from hyperfast.losses import Connector, Paraphraser, Translator
from hyperfast.nn import hypernetize
from hyperfast.recipes import Distillation, DistillConfig, LossTerm, TapWeights, distill
from hyperfast.surgery import taps


class Crash(Exception):
    pass


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def batch() -> tuple[Tensor, Tensor]:
    images = tiny_task.image_set(16, 5)
    return images.images.float() / 255, images.labels


def objective_of(config: DistillConfig, student: nn.Module, teacher: nn.Module) -> Distillation:
    return Distillation(student, teacher, config, batch()[0][:2])


def logged(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def only(**terms: LossTerm) -> DistillConfig:
    return DistillConfig(terms, cross_entropy_weight=0.0)


def test_each_loss_reads_where_it_is_meant_to() -> None:
    student, teacher = tiny_task.network(), tiny_task.network(seed=9)
    own = LossTerm(at=["layer2"])
    objective = objective_of(only(at=LossTerm(), ab=LossTerm(), rkd=LossTerm(), sp=own), student, teacher)
    with objective.watch(student):
        objective(student, *batch(), 0.0)
    assert objective.tap_names("at") == ["layer1", "layer2"]
    assert objective.tap_names("ab") == ["layer1.2:input", "layer2.2:input"]
    assert objective.tap_names("rkd") == ["head.1:input"]
    assert objective.tap_names("sp") == ["layer2"]


def test_taps_of_the_whole_distillation_and_of_a_loss() -> None:
    config = DistillConfig({"at": LossTerm(), "ab": LossTerm(at="activations")}, at="layer1", teacher_at="layer2")
    assert config.points("at") == ("layer1", "layer2")
    assert config.points("ab") == ("activations", None)
    assert DistillConfig({"jacobian": LossTerm()}, at="layer1").points("jacobian") == (None, None)


@pytest.mark.parametrize("name", ["ab", "cwd", "fitnets", "fsp", "ft", "fmd", "ickd", "hcl", "frequency"])
def test_a_connector_where_channels_differ(name: str) -> None:
    student, teacher = tiny_task.network(dropout=0.0), tiny_task.network(seed=9, width=12)
    objective = objective_of(only(**{name: LossTerm()}), student, teacher)
    connectors = [module for module in objective.modules.modules() if isinstance(module, Connector)]
    assert [connector.layer.weight.shape[:2] for connector in connectors] == [(12, 8)] * 2  # type: ignore[union-attr]
    assert {connector.kind for connector in connectors} == {"regressor" if name == "fitnets" else "conv"}
    with objective.watch(student):
        objective(student, *batch(), 0.0).total.backward()
    assert all(p.grad is not None and p.grad.any() for c in connectors for p in c.layer.parameters())
    assert student.layer1[0].weight.grad.any()  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["at", "sp", "rkd", "icd", "sinkd"])
def test_no_connector_where_the_loss_needs_none(name: str) -> None:
    student, teacher = tiny_task.network(), tiny_task.network(seed=9, width=12)
    objective = objective_of(only(**{name: LossTerm()}), student, teacher)
    assert not list(objective.modules.parameters())


def test_connectors_always_and_never() -> None:
    student, teacher = tiny_task.network(), tiny_task.network(seed=9)
    assert not list(objective_of(only(fitnets=LossTerm()), student, teacher).modules.parameters())
    always = objective_of(only(fitnets=LossTerm(connector="always")), student, teacher)
    assert sum(isinstance(module, Connector) for module in always.modules.modules()) == 2
    message = r"loss 'cwd', tap 'layer1': the student's map is \[8, 8, 8\], the teacher's \[12, 8, 8\]"
    with pytest.raises(ValueError, match=message):
        objective_of(only(cwd=LossTerm(connector="none")), student, tiny_task.network(seed=9, width=12))


def test_connectors_are_the_same_for_the_same_seed_and_leave_the_random_state() -> None:
    student, teacher = tiny_task.network(), tiny_task.network(seed=9, width=12)
    state = torch.get_rng_state()
    first, second = (objective_of(only(cwd=LossTerm()), student, teacher).modules.state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_making_the_objective_leaves_the_student_as_it_was() -> None:
    student = tiny_task.network()
    student.train()
    student.layer1.eval()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    objective_of(only(at=LossTerm()), student, tiny_task.network(seed=9))
    assert student.training and student.layer2.training and not student.layer1.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def test_a_connector_is_trained_and_resumed(tmp_path: Path) -> None:
    def crash(step: int) -> None:
        if step == 9:
            raise Crash

    def run(folder: str, seed: int, **options: Any) -> nn.Module:
        student = tiny_task.network(seed)
        distill(student, teacher, data, settings, config, folder=tmp_path / folder, **options)
        return student

    teacher, data = tiny_task.network(seed=9, width=12), tiny_task.splits()
    settings, config = tiny_task.config(epochs=3, checkpoint_every=4), DistillConfig({"fitnets": LossTerm()})
    expected = run("whole", 0).state_dict()
    with pytest.raises(Crash):
        run("cut", 0, on_step=crash)
    found = run("cut", 5, resume=True).state_dict()
    assert [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])] == []
    fitnets = [sum(line["fitnets"].values()) for line in logged(tmp_path / "whole")]
    assert fitnets[-1] < fitnets[0]


def test_weights_and_shares_are_those_of_the_loss() -> None:
    student, teacher = tiny_task.network(dropout=0.0), tiny_task.network(seed=9)
    weights = {"weights": {"layer1": 0.0, "layer2": 2.0}}
    travelling = TapWeights("travelling", sigma=0.5, minimum=0.0)
    config = only(at=LossTerm(1.0, options=weights), sp=LossTerm(3.0, tap_weights=travelling))
    objective = objective_of(config, student, teacher)
    with objective.watch(student):
        found = objective(student, *batch(), 1.0)
    expected = 2 * found.terms["at"][1] + 3 * (travelling(2, 1.0) * found.terms["sp"]).sum()
    assert torch.allclose(found.total, expected)


def test_a_loss_counts_in_its_part_of_the_training(tmp_path: Path) -> None:
    config = DistillConfig({"ab": LossTerm(span=(0.0, 0.4)), "at": LossTerm(span=(0.4, 1.0))}, labels_from=0.4)
    student, teacher = tiny_task.network(), tiny_task.network(seed=9)
    objective = objective_of(config, student, teacher)
    with objective.watch(student):
        early, late, end = (objective(student, *batch(), progress) for progress in (0.0, 0.5, 1.0))
    assert set(early.terms) == {"cross_entropy", "ab"} and set(late.terms) == set(end.terms) == {"cross_entropy", "at"}
    assert torch.allclose(early.total, 10 * early.terms["ab"].mean())
    assert torch.allclose(late.total, late.terms["cross_entropy"] + 1000 * late.terms["at"].mean())
    distill(student, teacher, tiny_task.splits(), tiny_task.config(epochs=2), config, folder=tmp_path)
    lines = logged(tmp_path)
    assert "ab" in lines[0] and "at" not in lines[0]
    assert "at" in lines[-1] and "ab" not in lines[-1]


def test_the_teacher_rests_where_nothing_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = tiny_task.network(), tiny_task.network(seed=9)
    objective = objective_of(only(at=LossTerm(span=(0.0, 0.5))), student, teacher)
    calls: list[int] = []
    objective.teacher.register_forward_hook(lambda *_: calls.append(1))
    with objective.watch(student):
        for progress in (0.0, 0.4, 0.5, 0.9):
            objective(student, *batch(), progress)
    assert len(calls) == 2


def test_gradient_norms_are_those_of_each_loss_by_each_map(tmp_path: Path) -> None:
    student, teacher = tiny_task.network(dropout=0.0), tiny_task.network(seed=9)
    objective = objective_of(DistillConfig({"at": LossTerm(), "cwd": LossTerm()}), student, teacher)
    with objective.watch(student):
        objective(student, *batch(), 0.0, measure=True).total.backward()
        found = objective.gradient_norms(1.0, 1)
        objective(student, *batch(), 0.0).total.backward()
        assert objective.gradient_norms(1.0, 2) == {}
    with taps(student, teacher.eval()) as read:
        student(batch()[0]), teacher(batch()[0])
        maps = list(read.student.values())
        alone = [
            losses.AttentionTransfer(beta=1000.0)(read.student, read.teacher),
            losses.ChannelWiseDistillation(beta=3.0)(read.student, read.teacher),
        ]
    for name, loss in zip(("at", "cwd"), alone, strict=True):
        # By the map itself, not by what comes after it.
        own = torch.autograd.grad(loss, maps[-1], retain_graph=True)[0]
        assert found[name]["layer2"] == pytest.approx(float(own.norm()), rel=1e-4)
        assert set(found[name]) == {"layer1", "layer2"} and found[name]["layer1"] > 0
    distill(student, teacher, tiny_task.splits(), tiny_task.config(epochs=1), only(at=LossTerm()), folder=tmp_path)
    assert all(set(line["at_grad_norm"]) == {"layer1", "layer2"} for line in logged(tmp_path))


def test_gradient_norms_are_without_the_scale_of_the_loss() -> None:
    student, teacher = tiny_task.network(dropout=0.0), tiny_task.network(seed=9)
    objective = objective_of(only(at=LossTerm()), student, teacher)
    norms = []
    with objective.watch(student):
        for scale in (1.0, 1024.0):
            (scale * objective(student, *batch(), 0.0, measure=True).total).backward()
            norms.append(objective.gradient_norms(scale, 1)["at"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


class DeadEnd(tiny_task.Network):
    """The second stage does not depend on anything that is trained."""

    def forward(self, images: Tensor) -> Tensor:
        features = self.layer1(images)
        self.layer2(torch.zeros_like(features))
        logits: Tensor = self.head(nn.functional.adaptive_avg_pool2d(features, 4).flatten(1))
        return logits


def test_a_tap_that_contributes_nothing_is_named_once() -> None:
    student, teacher = DeadEnd(), tiny_task.network(seed=9)
    student.layer2.requires_grad_(False)
    objective = objective_of(only(at=LossTerm()), student, teacher)
    with objective.watch(student):
        objective(student, *batch(), 0.0, measure=True).total.backward()
        message = "tap 'layer2' contributes nothing to loss 'at': its gradient is 0 in step 50"
        with pytest.warns(UserWarning, match=message):
            assert objective.gradient_norms(1.0, 50)["at"]["layer2"] == 0
        objective(student, *batch(), 0.0, measure=True).total.backward()
        objective.gradient_norms(1.0, 100)  # a warning would be an error


def test_a_tap_without_weight_is_not_complained_of() -> None:
    student, teacher = tiny_task.network(), tiny_task.network(seed=9)
    config = only(at=LossTerm(options={"weights": [0.0, 1.0]}))
    objective = objective_of(config, student, teacher)
    with objective.watch(student):
        objective(student, *batch(), 0.0, measure=True).total.backward()
        assert objective.gradient_norms(1.0, 1)["at"]["layer1"] == 0


def test_jacobians_go_through_generated_weights_beside_other_losses() -> None:
    torch.manual_seed(0)
    student = hypernetize(tiny_task.network(dropout=0.0), hidden=(4, 4))
    config = DistillConfig({"jacobian": LossTerm(), "at": LossTerm()}, kd_weight=1.0)
    objective = objective_of(config, student, tiny_task.network(seed=9))
    with objective.watch(student):
        found = objective(student, *batch(), 0.0)
    terms = found.terms
    expected = terms["cross_entropy"] + terms["kd"] + 20 * terms["jacobian"].sum() + 1000 * terms["at"].mean()
    assert torch.allclose(found.total, expected, rtol=1e-5)
    assert objective.tap_names("jacobian") == ["logits"]
    found.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


def test_jacobians_of_taps_and_with_noise() -> None:
    student, teacher = tiny_task.network(dropout=0.0), tiny_task.network(seed=9)
    objective = objective_of(only(jacobian=LossTerm(at="stages", options={"noise": 0.1})), student, teacher)
    with objective.watch(student):
        objective(student, *batch(), 0.0)
    assert objective.tap_names("jacobian") == ["layer1", "layer2"]


def test_jacobians_are_not_of_compiled_students() -> None:
    settings = tiny_task.config(compile=True)
    with pytest.raises(ValueError, match="the loss 'jacobian' takes gradients of gradients.*set compile=False"):
        distill(tiny_task.network(), tiny_task.network(), tiny_task.splits(), settings, only(jacobian=LossTerm()))


def test_paraphrasers_learn_first_and_are_resumed(tmp_path: Path) -> None:
    def crash(step: int) -> None:
        if step == 1:
            raise Crash

    teacher, data, settings = tiny_task.network(seed=9, width=12), tiny_task.splits(), tiny_task.config(epochs=2)
    config = DistillConfig({"ft": LossTerm()}, paraphraser_epochs=2.0, paraphraser_k=0.25)
    objective = objective_of(config, tiny_task.network(), teacher)
    term: Any = objective.modules["ft"]
    assert [type(m) for m in (*term.student_side, *term.teacher_side)] == [Translator] * 2 + [Paraphraser] * 2
    assert [p.factors for p in term.teacher_side] == [3, 3]
    whole, cut = tiny_task.network(), tiny_task.network(seed=5)
    distill(whole, teacher, data, settings, config, folder=tmp_path / "whole")
    with pytest.raises(Crash):  # before the first checkpoint of the training itself
        distill(tiny_task.network(), teacher, data, settings, config, folder=tmp_path / "cut", on_step=crash)
    assert (tmp_path / "cut" / "checkpoint.safetensors").exists()
    distill(cut, teacher, data, settings, config, folder=tmp_path / "cut", resume=True)
    expected = whole.state_dict()
    assert [name for name, tensor in cut.state_dict().items() if not torch.equal(tensor, expected[name])] == []


def test_pretraining_makes_the_paraphrasers_better_and_freezes_them() -> None:
    teacher, data = tiny_task.network(seed=9, width=12), tiny_task.splits()
    config = DistillConfig({"ft": LossTerm()}, paraphraser_epochs=4.0)
    objective = objective_of(config, tiny_task.network(), teacher)
    loader = DeviceLoader(data.train, 16, device="cpu", train=True, augment=Augment(0, False))
    images, _ = next(loader.epoch())

    def errors() -> list[float]:
        with torch.no_grad(), taps(objective.teacher) as read:
            objective.teacher(images)
            term: Any = objective.modules["ft"]
            pairs = zip(term.teacher_side, read.student.values(), strict=True)
            return [float((p(features) - features).abs().mean()) for p, features in pairs]

    before = errors()
    assert objective.prepare(loader, resumed=False, progress=False)
    after = errors()
    assert all(a < b for a, b in zip(after, before, strict=True))
    assert not objective.prepare(loader, resumed=True, progress=False) and errors() == after
    paraphrasers: Any = objective.modules["ft"].teacher_side  # type: ignore[union-attr]
    assert not any(parameter.requires_grad for parameter in paraphrasers.parameters())


def test_maps_that_no_translator_fits() -> None:
    config = DistillConfig({"ft": LossTerm(at="embedding")}, paraphraser_epochs=1.0)
    with pytest.raises(ValueError, match=r"loss 'ft', tap 'head.1:input': .* a translator wants maps \(C, H, W\)"):
        objective_of(config, tiny_task.network(), tiny_task.network(width=12))


def test_a_cached_teacher_says_the_same() -> None:
    teacher, data = tiny_task.network(seed=9), tiny_task.splits()
    settings = tiny_task.config(epochs=2, augment=Augment(0, False))
    terms = {"at": LossTerm(), "ab": LossTerm(), "fsp": LossTerm()}
    results = []
    for cached in (False, True):
        student = tiny_task.network()
        distill(student, teacher, data, settings, DistillConfig(terms, kd_weight=1.0, cache_teacher=cached))
        results.append(nn.utils.parameters_to_vector(student.parameters()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_a_cached_teacher_is_asked_once_per_image() -> None:
    student, teacher = tiny_task.network(dropout=0.0), tiny_task.network(seed=9)
    objective = objective_of(DistillConfig({"ab": LossTerm()}, kd_weight=1.0, cache_teacher=True), student, teacher)
    loader = DeviceLoader(tiny_task.splits().train, 16, device="cpu", train=True, augment=Augment(0, False))
    calls: list[int] = []
    objective.teacher.register_forward_hook(lambda *_: calls.append(1))
    objective.prepare(loader, resumed=False, progress=False)
    assert len(calls) == len(loader)
    with objective.watch(student):
        for index, (images, labels) in enumerate(loader.epoch(3)):
            found = objective(student, images, labels, 0.0, indices=loader.indices(3, index))
            plain = objective(student, images, labels, 0.0)
            assert torch.allclose(found.total, plain.total, rtol=1e-4)
    assert len(calls) == 2 * len(loader)


@pytest.mark.parametrize(
    ("config", "augment", "message"),
    [
        (only(at=LossTerm()), Augment(1, False), r"but the images are augmented \(Augment\(pad=1, flip=False\)\)"),
        (only(cwd=LossTerm()), Augment(0, False), "'cwd' needs whole maps of the teacher; leave out one of them"),
        (only(sp=LossTerm()), Augment(0, False), "'sp' compares the images of a batch with each other"),
    ],
)
def test_what_cannot_be_cached(config: DistillConfig, augment: Augment, message: str) -> None:
    cached = DistillConfig(config.losses, cross_entropy_weight=0.0, cache_teacher=True)
    settings = tiny_task.config(augment=augment)
    with pytest.raises(ValueError, match=message):
        distill(tiny_task.network(), tiny_task.network(seed=9), tiny_task.splits(), settings, cached)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LossTerm(span=(0.5, 0.5)), r"span is \(0.5, 0.5\); expected two shares of the training"),
        (lambda: LossTerm(connector="maybe"), "connector is 'maybe'; choose 'auto', 'always' or 'none'"),
        (lambda: DistillConfig(labels_from=1.0), r"labels_from is 1.0; expected a share of the training in \[0, 1\)"),
        (lambda: DistillConfig(paraphraser_epochs=2.0), "only the loss 'ft' has paraphrasers"),
        (lambda: DistillConfig(paraphraser_epochs=-1.0), "paraphraser_epochs is -1.0; it must not be negative"),
    ],
)
def test_settings_that_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
