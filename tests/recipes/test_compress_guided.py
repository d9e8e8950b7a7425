"""The second phase of a compression: guidance by a teacher's answers, after reconstruction or jointly with it."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_task
import torch
from tiny_compression import settings
from torch import nn

from hyperfast.recipes import GuideConfig, compress
from hyperfast.recipes.guided import Guidance
from hyperfast.recipes.reconstruction import Targets, new_predictor
from hyperfast.surgery import cover


def guidance(guide: GuideConfig, network: nn.Module, teacher: nn.Module, **changes: Any) -> Guidance:
    config = settings(**changes)
    coverage = cover(network, policy="nern")
    targets = Targets.of(network.state_dict(), coverage, config)
    predictor = new_predictor(coverage, config, seed=3)
    return Guidance(predictor, targets, network.eval(), teacher, tiny_task.splits(), guide.resolved(config), config)


def test_guidance_differentiates_the_answers_of_the_reconstructed_network() -> None:
    """Against one backward through everything, written out; a batch has a row twice."""
    network, teacher = tiny_task.network(), tiny_task.network(seed=9)
    guide = GuideConfig(steps=4, batch_size=16, batch_rows=10)
    training = guidance(guide, network, teacher, permutation="cross-filter")
    rows = torch.tensor([0, 3, 3, 50, 80])
    training.sampler = lambda: rows  # type: ignore[assignment]
    images = training.inputs.batch(0)
    start = {n: p.detach().clone() for n, p in training.predictor.named_parameters()}
    training.step()
    got = {n: p.grad for n, p in training.predictor.named_parameters()}

    training.predictor.load_state_dict(start)
    predicted = training.predictor()
    multiplicity = torch.bincount(rows, minlength=len(predicted))[:, None]
    through = predicted.detach() + multiplicity * (predicted - predicted.detach())
    weights = training.targets.coverage.scatter(training.targets.permutation.invert(through))
    q = torch.func.functional_call(network, weights, (images,)).softmax(1)
    p = teacher.eval()(images).detach().softmax(1)
    loss = 0.01 * (p * (p.log() - (q + 1e-4).log())).sum() / len(images)
    torch.testing.assert_close(training.terms["loss"], loss.detach(), rtol=1e-4, atol=1e-7)
    expected = torch.autograd.grad(loss, list(training.predictor.parameters()))
    for (name, value), right in zip(got.items(), expected, strict=True):
        assert value is not None
        torch.testing.assert_close(value, right, rtol=1e-3, atol=1e-7, msg=name)


def test_joint_training_warms_up_with_reconstruction_alone() -> None:
    network = tiny_task.network()
    guide = GuideConfig(method="joint", steps=4, batch_size=16, warmup=1, beta=0.5, alpha=0.25)
    training = guidance(guide, network, network)
    training.step()
    assert set(training.read()) == {"loss", "reconstruction"}
    rmse = float(training.targets.rmse(training.predictor))
    training.step()
    terms = training.read()
    assert terms["reconstruction"] == pytest.approx(rmse, rel=1e-5)
    assert terms["loss"] == pytest.approx(terms["reconstruction"] + 0.25 * terms["kd"] + 0.5 * terms["fmd"], rel=1e-5)
    assert terms["kd"] > 0 and terms["fmd"] > 0


def test_guidance_brings_the_answers_nearer_to_the_teachers() -> None:
    network = tiny_task.network()
    with torch.no_grad():
        network.head[1].weight.mul_(20)  # type: ignore[operator,union-attr]
    guide = GuideConfig(steps=60, batch_size=80, lr=1e-2, alpha=1.0, optimizer="adam")
    training = guidance(guide, network, network, hidden=24)
    seen = []
    for _ in range(60):
        training.step()
        seen.append(training.read()["loss"])
    assert sum(seen[-5:]) < 0.7 * sum(seen[:5])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "nern"}, "method is 'nern'; choose one of 'kd', 'joint'"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; choose one of 'ranger', 'adam'"),
        ({"amp": "fp16"}, "amp is 'fp16'; choose one of 'none', 'bf16'"),
        ({"batch_rows": 0}, "batch_rows is 0; expected at least 1, or None"),
        ({"alpha": 0.0}, "alpha is 0.0; expected above 0"),
        ({"lr": -1.0}, "lr is -1.0; expected above 0"),
        ({"warmup": -1}, "warmup is -1; expected at least 0"),
        ({"batch_size": 0}, "batch_size is 0; expected at least 1"),
        ({"image": (3, 0, 8)}, r"image is \(3, 0, 8\); expected three positive numbers"),
        ({"epochs": 1, "steps": 2}, "epochs is 1 and steps is 2; give one of them"),
    ],
)
def test_guidance_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GuideConfig(**changes)


def test_guidance_that_does_not_fit() -> None:
    network = tiny_task.network()
    with pytest.raises(ValueError, match="phase 2 shows images to the networks, but there is no data"):
        compress(network, settings(guide=GuideConfig()))
    with pytest.raises(ValueError, match="noise has no epochs; give steps"):
        compress(network, settings(guide=GuideConfig(noise=True, image=(3, 8, 8))))
    other = tiny_task.network(classes=5)
    with pytest.raises(ValueError, match="the teacher gives 5 logits and the network 4"):
        compress(network, settings(guide=GuideConfig()), tiny_task.splits(), other)
    with pytest.raises(ValueError, match="a teacher is given, but there is no second phase"):
        compress(network, settings(), tiny_task.splits(), other)
    for select in ("val", "test"):
        with pytest.raises(ValueError, match=f"select is '{select}', but there are no such images"):
            compress(network, settings(select=select))
