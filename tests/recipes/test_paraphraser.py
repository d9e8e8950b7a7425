"""Pretraining lowers the loss, repeats its maps, freezes, and says what is wrong with its arguments."""

import pytest
import torch
import torch.nn.functional as F

from hyperfast.losses import Paraphraser
from hyperfast.recipes import pretrain_paraphrasers


@pytest.mark.parametrize("loss", ["l1", "mse"])
def test_it_learns_and_is_frozen(loss):
    maps = [[torch.randn(4, 6, 5, 5).relu(), torch.randn(4, 4, 3, 3).relu()] for _ in range(2)]
    paraphrasers, steps = [Paraphraser(6, k=1.0), Paraphraser(4)], []
    before = [parameter.clone() for p in paraphrasers for parameter in p.parameters()]
    losses = pretrain_paraphrasers(paraphrasers, maps, 40, loss=loss, lr=0.05, on_step=steps.append)
    assert losses.shape == (40, 2) and not losses.requires_grad and steps == list(range(1, 41))
    assert (losses[-2:].mean(0) < losses[:2].mean(0)).all()
    after = [parameter for p in paraphrasers for parameter in p.parameters()]
    assert not any(parameter.requires_grad for parameter in after)
    assert not any(p.training for p in paraphrasers)
    assert not any(map(torch.equal, before, after))


def test_first_value_is_the_reconstruction_error_before_training():
    features, paraphraser = torch.randn(2, 4, 3, 3), Paraphraser(4)
    with torch.no_grad():
        expected = F.mse_loss(paraphraser(features), features)
    assert pretrain_paraphrasers([paraphraser], [[features]], 1, loss="mse")[0, 0] == expected


def test_a_generator_that_is_long_enough():
    maps = ([torch.randn(2, 4, 3, 3)] for _ in range(3))
    assert len(pretrain_paraphrasers([Paraphraser(4)], maps, 3)) == 3


def test_maps_are_taken_again_from_the_beginning():
    class Maps:
        given = 0

        def __iter__(self):
            for _ in range(2):
                self.given += 1
                yield [torch.randn(2, 4, 3, 3)]

    maps = Maps()
    pretrain_paraphrasers([Paraphraser(4)], maps, 5)
    assert maps.given == 5


@pytest.mark.parametrize(
    ("maps", "steps", "options", "message"),
    [
        (2, 3, {}, "maps ended after 2 of 3 steps and gave nothing when begun anew"),
        (0, 3, {}, "maps ended after 0 of 3 steps"),
        (2, 0, {}, "steps is 0; expected at least 1"),
        (2, 1, {"loss": "l2"}, "loss is 'l2'; choose one of 'l1', 'mse'"),
    ],
)
def test_bad_arguments(maps, steps, options, message):
    with pytest.raises(ValueError, match=message):
        pretrain_paraphrasers([Paraphraser(4)], ([torch.randn(1, 4, 3, 3)] for _ in range(maps)), steps, **options)


def test_a_paraphraser_for_every_map():
    with pytest.raises(ValueError, match="2 maps for 1 paraphrasers; give one of each tap"):
        pretrain_paraphrasers([Paraphraser(4)], [[torch.randn(1, 4, 3, 3)] * 2], 1)
