"""Attacks on networks whose gradients are known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hyperfast import models
from hyperfast.analysis import calibrate_epsilon, fgsm
from hyperfast.analysis.adversarial import attacked
from hyperfast.analysis.answers import LabelledImages, answers, spread

_MEAN, _STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)


def _linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 2))


def test_fgsm_on_a_linear_model_follows_the_signs_of_its_weights() -> None:
    network = _linear()
    images, labels = 0.3 + 0.4 * torch.rand(6, 3, 4, 4), torch.tensor([0, 1, 0, 1, 1, 0])
    changed = fgsm(network, images, labels, 0.02, mean=_MEAN, std=_STD)
    weight = network[1].weight.detach()
    # The loss grows where the logit of the other class does.
    away = (weight[1 - labels] - weight[labels]).sign().view(6, 3, 4, 4)
    torch.testing.assert_close(changed, images + 0.02 * away)


def test_iterated_steps_on_a_linear_model_add_up_and_stay_within_the_bound() -> None:
    network = _linear()
    images, labels = 0.3 + 0.4 * torch.rand(5, 3, 4, 4), torch.randint(2, (5,))
    once = fgsm(network, images, labels, 0.05, mean=_MEAN, std=_STD)
    torch.testing.assert_close(fgsm(network, images, labels, 0.05, mean=_MEAN, std=_STD, steps=4), once)
    # Three steps of 0.03 would go to 0.09.
    torch.testing.assert_close(
        fgsm(network, images, labels, 0.05, mean=_MEAN, std=_STD, steps=3, step_size=0.03), once
    )


def test_images_stay_images() -> None:
    images = torch.rand(4, 3, 4, 4).round()
    changed = fgsm(_linear(), images, torch.zeros(4, dtype=torch.int64), 0.1, mean=_MEAN, std=_STD)
    assert changed.min() == 0 and changed.max() == 1
    assert 0 < (changed - images).abs().max() <= 0.1 + 1e-6


def test_network_keeps_its_mode_statistics_and_gradients() -> None:
    network = models.create("resnet8")
    network.layer1.eval()
    modes = [part.training for part in network.modules()]
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    images, labels = torch.rand(4, 3, 16, 16), torch.arange(4)
    with torch.no_grad():
        changed = fgsm(network, images, labels, 0.01, mean=_MEAN, std=_STD, steps=2)
    assert not changed.requires_grad and not torch.equal(changed, images)
    assert [part.training for part in network.modules()] == modes
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_iterating_does_no_less_harm_than_one_step() -> None:
    network = models.create("resnet8")
    data = LabelledImages(torch.randint(256, (32, 3, 16, 16), dtype=torch.uint8), torch.arange(32) % 10, _MEAN, _STD)
    clean = answers(network, data)
    once, often = (attacked(network, data, 4 / 255, steps=steps, batch_size=10) for steps in (1, 8))
    assert clean.loss < once.loss < often.loss


def _brightness_threshold() -> tuple[nn.Module, LabelledImages]:
    """Whether a pixel is brighter than 100.25 / 255, and images of 100 / 255 to 119 / 255."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([[-1.0], [1.0]]))
        network[1].bias.copy_(torch.tensor([100.25 / 255, -100.25 / 255]))
    values = torch.arange(100, 120, dtype=torch.uint8)
    return network, LabelledImages(values.view(-1, 1, 1, 1), (values > 100).long(), (0.0,), (1.0,))


def test_calibration_finds_the_bound() -> None:
    network, data = _brightness_threshold()
    assert answers(network, data).accuracy == 1
    # 101 falls at 0.75 / 255, 102 at 1.75 / 255, 100 at 0.25 / 255: five are lost from 3.75 / 255 on.
    found = calibrate_epsilon(network, data, 0.75)
    assert found.accuracy == 0.75
    assert 3.75 / 255 <= found.epsilon < 4.75 / 255
    assert attacked(network, data, found.epsilon).accuracy == 0.75
    # Between two shares that can be reached the nearer one is.
    assert calibrate_epsilon(network, data, 0.76).accuracy == 0.75
    assert calibrate_epsilon(network, data, 1.0).epsilon == 0


def test_calibration_out_of_reach() -> None:
    network, data = _brightness_threshold()
    with pytest.raises(ValueError, match="accuracy is 0.5000, but at epsilon = 0.00784 it is still 0.8500; raise most"):
        calibrate_epsilon(network, data, 0.5, most=2 / 255)
    with torch.no_grad():
        network[1].bias.neg_()
    with pytest.raises(ValueError, match="accuracy is 0.9900, but the network has 0.9500 without any attack"):
        calibrate_epsilon(network, data, 0.99)


def test_messages() -> None:
    with pytest.raises(ValueError, match="epsilon is -0.1 and steps 1; expected at least 0 and 1"):
        fgsm(_linear(), torch.rand(1, 3, 4, 4), torch.zeros(1, dtype=torch.int64), -0.1, mean=_MEAN, std=_STD)
    network, data = _brightness_threshold()
    with pytest.raises(ValueError, match="there are 20 images and batch_size is 0; both must be at least 1"):
        answers(network, data, batch_size=0)
    with pytest.raises(ValueError, match="count is 0; expected at least 1 image"):
        spread(data, 0)


def test_answers_do_not_depend_on_the_batches() -> None:
    network = models.create("resnet8")
    data = LabelledImages(torch.randint(256, (10, 3, 16, 16), dtype=torch.uint8), torch.arange(10), _MEAN, _STD)
    whole, parts = (answers(network, data, batch_size=size) for size in (10, 3))
    assert torch.equal(whole.correct, parts.correct) and whole.correct.dtype == torch.bool
    assert whole.loss == pytest.approx(parts.loss, rel=1e-5)
    network.eval()
    images = (data.images / 255 - torch.tensor(_MEAN).view(3, 1, 1)) / torch.tensor(_STD).view(3, 1, 1)
    with torch.no_grad():
        logits = network(images)
    assert whole.accuracy == pytest.approx(float((logits.argmax(1) == data.labels).float().mean()))
    assert whole.loss == pytest.approx(float(nn.functional.cross_entropy(logits, data.labels)), rel=1e-5)


def test_a_spread_keeps_the_proportions_of_a_sorted_set() -> None:
    labels = torch.arange(3).repeat_interleave(10)
    data = LabelledImages(torch.zeros(30, 1, 1, 1, dtype=torch.uint8), labels, (0.0,), (1.0,))
    assert torch.bincount(spread(data, 6).labels).tolist() == [2, 2, 2]
    assert spread(data, 30) is data and spread(data, 99) is data
