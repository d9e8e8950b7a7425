"""Distillation between convolutional networks and networks over tokens: every method that is meant for it, by name."""

import pytest
import tiny_task
import torch
from torch import Tensor, nn

from hyperfast import models
from hyperfast.losses import Connector, OneForAll, TokenMap
from hyperfast.recipes import METHODS, Distillation, DistillConfig, LossTerm, distill

BETWEEN_ARCHITECTURES = ["ofa", "ickd", "hcl", "icd", "frequency", "infonce", "wcord", "sinkd"]
LAST_TOKENS = ["stages.1", "stages.3"]  # as many as the convolutional network has stages


def transformer(seed: int = 9) -> nn.Module:
    """16 tokens of 12 channels from 8x8 images, four stages."""
    torch.manual_seed(seed)
    return models.create("vit_tiny32", num_classes=4, width=12, depth=4, patch=2, heads=2, image_size=8)


def mixer(width: int = 12) -> nn.Module:
    return models.create("mixer_tiny32", num_classes=4, width=width, depth=4, patch=2, image_size=8)


def total_of(
    term: LossTerm, name: str, student: nn.Module, teacher: nn.Module
) -> tuple[Distillation, Tensor, dict[str, Tensor]]:
    made = Distillation(student, teacher, DistillConfig({name: term}, 0.0), torch.rand(2, 3, 8, 8))
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 3, 1])
    with made.watch(student):
        found = made(student, images, labels, 0.0)
    return made, found.total, dict(found.terms)


def term_of(name: str, teacher_at: list[str] | None) -> LossTerm:
    """Only the stages have other names in both networks."""
    return LossTerm(teacher_at=teacher_at if METHODS[name].at == "stages" and name != "ofa" else None)


@pytest.mark.parametrize("name", BETWEEN_ARCHITECTURES)
def test_a_convolutional_student_of_a_transformer(name: str) -> None:
    student = tiny_task.network(dropout=0.0)
    made, total, terms = total_of(term_of(name, LAST_TOKENS), name, student, transformer())
    losses, beta = terms[name], METHODS[name].beta
    torch.testing.assert_close(total, beta * (losses.sum() if name == "ofa" else losses.mean()))
    total.backward()
    assert total > 0 and all(p.grad is not None for p in made.modules.parameters())
    assert student.layer1[0].weight.grad.any()  # type: ignore[union-attr]


@pytest.mark.parametrize("name", BETWEEN_ARCHITECTURES)
def test_a_mixer_as_the_student_of_a_convolutional_network(name: str) -> None:
    student = mixer()
    term = term_of(name, ["layer1", "layer2"])
    if term.teacher_at:
        term = LossTerm(at=LAST_TOKENS, teacher_at=term.teacher_at)
    made, total, _ = total_of(term, name, student, tiny_task.network(seed=9))
    total.backward()
    assert total > 0 and all(p.grad is not None for p in made.modules.parameters())
    assert student.embed.weight.grad.any()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "shapes"),
    [("hcl", [[12, 4, 4]] * 2), ("ickd", [[12, 8, 8]] * 2), ("frequency", [[12, 8, 8]] * 2), ("icd", None)],
)
def test_what_leads_from_maps_to_tokens(name: str, shapes: list[list[int]] | None) -> None:
    made, *_ = total_of(LossTerm(teacher_at=LAST_TOKENS), name, tiny_task.network(), transformer())
    term = made.modules[name]
    connectors = [module for module in term.student_side if isinstance(module, Connector)]  # type: ignore[union-attr]
    if shapes is None:
        assert not list(term.parameters())
    else:
        assert [list(connector.eval()(torch.randn(1, 8, 8, 8)).shape[1:]) for connector in connectors] == shapes
        assert [type(module) for module in term.teacher_side] == [TokenMap] * 2  # type: ignore[union-attr]


def test_tokens_of_one_shape_need_nothing_between_them() -> None:
    made, *_ = total_of(LossTerm(), "hcl", mixer(), transformer())
    assert not list(made.modules.parameters())
    made, total, _ = total_of(LossTerm(), "hcl", mixer(width=8), transformer())
    connectors = [module for module in made.modules.modules() if isinstance(module, Connector)]
    assert [connector.layer.weight.shape[:2] for connector in connectors] == [(12, 8)] * 4  # type: ignore[union-attr]
    total.backward()
    assert all(p.grad is not None for p in made.modules.parameters())


def test_tokens_of_no_square_image_are_named() -> None:
    message = r"loss 'hcl', tap 'a': a map has 3 tokens; expected those of a square image"

    class Three(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.a, self.fc = nn.Linear(64, width), nn.Linear(width, 4)

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.fc(self.a(images.flatten(2)).mean(1))
            return logits

    with pytest.raises(ValueError, match=message):
        total_of(LossTerm(at="a"), "hcl", Three(6), Three(8))


def test_the_exits_of_one_for_all_are_trained_with_the_student() -> None:
    student, config = tiny_task.network(), DistillConfig({"ofa": LossTerm(options={"gamma": 1.5})})
    made = Distillation(student, transformer(), config, torch.rand(2, 3, 8, 8))
    loss = made.modules["ofa"].loss
    assert isinstance(loss, OneForAll) and loss.gamma == 1.5
    assert [projector.width for projector in loss.projectors] == [12, 12]
    result = distill(student, transformer(), tiny_task.splits(), tiny_task.config(epochs=2), config)
    assert result.test_accuracy_last is not None
