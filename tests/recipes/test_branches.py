"""A loss with branches behind the student's taps as a part of a distillation."""

import json
from pathlib import Path

import pytest
import tiny_task
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperfast.losses import BranchLoss
from hyperfast.recipes import METHODS, Distillation, DistillConfig, LossTerm, TapWeights
from hyperfast.recipes.distill_config import Method
from hyperfast.recipes.training import fit


class Exits(BranchLoss):
    """A linear exit per tap: cross-entropy with the labels, plus the squared distance of the networks' logits."""

    def __init__(self, channels: list[int], embedding: int, classes: int, beta: float, scale: float = 1.0) -> None:
        super().__init__(beta=beta)
        self.exits = nn.ModuleList(nn.Linear(width + embedding, classes) for width in channels)
        self.scale = scale

    @classmethod
    def for_maps(cls, student, teacher, classes, **options):
        (embedding,) = teacher.values()
        return cls([features.shape[1] for features in student.values()], embedding.shape[1], classes, **options)

    def forward(self, student, teacher, student_logits, teacher_logits, labels):
        (embedding,) = teacher.values()
        distance = F.mse_loss(student_logits, teacher_logits)

        def per_tap(_: Tensor) -> Tensor:
            pooled = [torch.cat((features.mean((2, 3)), embedding), 1) for features in student.values()]
            exits = [F.cross_entropy(made(x), labels) for made, x in zip(self.exits, pooled, strict=True)]
            return self.scale * (torch.stack(exits) + distance)

        return self._weighted([str(key) for key in student], student_logits, per_tap)


@pytest.fixture(autouse=True)
def exits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss by name."""
    method = Method(Exits.for_maps, 2.0, same=None, branches=True, teacher_at="embedding")
    monkeypatch.setitem(METHODS, "exits", method)


def objective(config: DistillConfig, student: nn.Module) -> Distillation:
    return Distillation(student, tiny_task.network(seed=9), config, torch.rand(2, 3, 8, 8))


@pytest.mark.parametrize("schedule", ["uniform", "travelling"])
def test_a_loss_with_branches_sees_logits_labels_and_the_teachers_embedding(schedule: str) -> None:
    student = tiny_task.network(width=12, dropout=0.0)
    weights = TapWeights(schedule, sigma=0.5, minimum=0.0)
    made = objective(DistillConfig({"exits": LossTerm(options={"scale": 3.0})}, 0.0, tap_weights=weights), student)
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 3, 1])
    with made.watch(student):
        found = made(student, images, labels, 1.0, measure=True)
    found.total.backward()
    values, share = found.terms["exits"], weights(2, 1.0)
    assert made.tap_names("exits") == ["layer1", "layer2"]
    assert torch.allclose(found.total, 2 * (values * share).sum()) and (values > 3 * 0.1).all()
    assert all(parameter.grad is not None for parameter in made.modules.parameters())
    assert student.layer1[0].weight.grad.any() and set(made.gradient_norms(1.0, 0)["exits"]) == {"layer1", "layer2"}


def test_its_branches_are_trained_with_the_student() -> None:
    student = tiny_task.network(dropout=0.0)
    made = objective(DistillConfig({"exits": LossTerm()}), student)
    before = [parameter.detach().clone() for parameter in made.modules.parameters()]
    fit(student, made, tiny_task.splits(), tiny_task.config(epochs=1))
    changed = [not torch.equal(*pair) for pair in zip(before, made.modules.parameters(), strict=True)]
    assert len(changed) == 4 and all(changed)


# Complementary distillation


@pytest.mark.parametrize("name", ["hcd", "hcd_stable"])
def test_complementary_distillation_stands_in_the_place_of_the_labels(name: str) -> None:
    student = tiny_task.network(width=12, dropout=0.0)
    made = objective(DistillConfig({name: LossTerm(span=(0.0, 0.5))}, kd_weight=0.5), student)
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 3, 1])
    with made.watch(student):
        found, after = made(student, images, labels, 0.0), made(student, images, labels, 0.75)
    weights = torch.tensor([1.0, 1.0, 6.0, 1.0])
    assert torch.allclose(found.total, found.terms[name] @ weights + 0.5 * found.terms["kd"])
    assert -1 <= found.terms[f"{name}_similarity"] <= 1 + 1e-6
    assert torch.allclose(after.total, after.terms["cross_entropy"] + 0.5 * after.terms["kd"])
    assert made.tap_names(name) == ["gt", "kd", "sdd", "ol"] and made.tap_names(f"{name}_similarity") is None


def test_complementary_distillation_trains_its_branches(tmp_path: Path) -> None:
    student = tiny_task.network(dropout=0.0)
    config = DistillConfig({"hcd_stable": LossTerm(options={"stages": ["layer2"], "sub_logits": 2})})
    made = objective(config, student)
    before = {name: parameter.detach().clone() for name, parameter in made.modules.named_parameters()}
    fit(student, made, tiny_task.splits(), tiny_task.config(epochs=1), folder=tmp_path)
    assert all(not torch.equal(before[name], parameter) for name, parameter in made.modules.named_parameters())
    (logged, *_) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert set(logged["hcd_stable"]) == {"gt", "kd", "sdd", "ol"} and isinstance(logged["hcd_stable_similarity"], float)
    assert logged["hcd_stable_grad_norm"]["layer2"] > 0


def test_complementary_distillation_has_no_shares_by_tap() -> None:
    config = DistillConfig({"hcd": LossTerm()}, tap_weights=TapWeights("travelling"))
    with pytest.raises(ValueError, match="has the schedule 'travelling', but loss 'hcd' has no losses by tap, only gt"):
        objective(config, tiny_task.network())


def test_complementary_distillation_needs_the_teachers_embedding_alone() -> None:
    config = DistillConfig({"hcd": LossTerm(teacher_at="stages")})
    with pytest.raises(ValueError, match="2 maps of the teacher were given: layer1, layer2; expected one, its"):
        objective(config, tiny_task.network())
