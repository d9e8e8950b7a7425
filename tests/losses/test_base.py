"""Pairing, weighting and logging, the same for every loss over taps."""

import pytest
import torch

from hyperfast.losses import FeatureLoss
from hyperfast.surgery.taps import TapKey


class Squared(FeatureLoss):
    def per_tap(self, student, teacher, expected_grad=None):
        return torch.stack([(s - t).square().mean() for s, t in zip(student, teacher, strict=True)])


def maps(*shapes):
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def record(tensors):
    keys = TapKey("layer1", 0, "output"), TapKey("relu", 0, "output"), TapKey("relu", 1, "output")
    return dict(zip(keys, tensors, strict=True))


@pytest.fixture
def pair():
    shapes = (2, 3, 4, 4), (2, 5, 2, 2), (2, 5, 2, 2)
    return record(maps(*shapes)), record(maps(*shapes))


def values(pair):
    return Squared().per_tap(*(list(side.values()) for side in pair)).detach()


def test_default_is_the_mean_over_taps(pair):
    torch.testing.assert_close(Squared()(*pair), values(pair).mean())


@pytest.mark.parametrize(
    "weights", [(1.0, 0.0, 2.5), {"relu": 0.0, "layer1": 1.0, "relu#1": 2.5}, torch.tensor([1.0, 0.0, 2.5])]
)
def test_weights(pair, weights):
    torch.testing.assert_close(Squared(weights)(*pair), values(pair) @ torch.tensor([1.0, 0.0, 2.5]))


@pytest.mark.parametrize("weights", [None, (1.0, 0.0, 2.5), torch.tensor([1.0, 0.0, 2.5])])
def test_beta_scales_the_whole_loss(pair, weights):
    torch.testing.assert_close(Squared(weights, beta=7.0)(*pair), 7 * Squared(weights)(*pair))


@pytest.mark.parametrize("weights", [None, (1.0, 0.0, 2.5), torch.tensor([1.0, 0.0, 2.5])])
def test_the_expected_gradient_is_the_gradient(pair, weights):
    seen = []

    class Spy(Squared):
        def per_tap(self, student, teacher, expected_grad=None):
            losses = super().per_tap(student, teacher)
            losses.register_hook(lambda grad: seen.append((grad, expected_grad)))
            return losses

    Spy(weights, beta=0.3)(*pair).backward()
    assert torch.equal(*seen[0])


def test_weights_may_change_between_steps(pair):
    loss = Squared([1.0, 0.0, 0.0])
    first = loss(*pair)
    loss.weights = [0.0, 1.0, 0.0]
    torch.testing.assert_close(torch.stack([first, loss(*pair)]), values(pair)[:2])


def test_sequences_are_named_by_index(pair):
    sides = [list(side.values()) for side in pair]
    torch.testing.assert_close(Squared({"0": 1.0, "1": 0.0, "2": 0.0})(*sides), values(pair)[0])


def test_last_holds_the_unweighted_losses_without_a_graph(pair):
    loss = Squared([3.0, 0.0, 0.0])
    assert loss.last is None
    loss(*pair)
    torch.testing.assert_close(loss.last, values(pair), rtol=0, atol=0)
    assert loss.last_names == ["layer1", "relu", "relu#1"]
    assert not loss.last.requires_grad


def test_gradients_flow_to_the_student_only(pair):
    student, teacher = pair
    Squared()(student, teacher).backward()
    assert all(s.grad is not None for s in student.values())
    assert all(t.grad is None for t in teacher.values())


def test_compiled_with_fullgraph(pair):
    torch.compiler.reset()
    loss = Squared([1.0, 2.0, 3.0])
    expected = loss(*pair)
    torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="aot_eager")(*pair), expected)


def test_a_loss_must_say_what_it_computes():
    with pytest.raises(TypeError, match="per_tap"):
        FeatureLoss()


def test_unequal_numbers_of_taps(pair):
    student, teacher = pair
    message = r"1 student taps but 3 teacher taps.*Student: 0\. Teacher: layer1, relu, relu#1"
    with pytest.raises(ValueError, match=message):
        Squared()([student[TapKey("layer1", 0, "output")]], teacher)


def test_no_taps():
    with pytest.raises(ValueError, match="no taps were given"):
        Squared()([], [])


def test_batch_sizes(pair):
    student, teacher = pair
    with pytest.raises(ValueError, match=r"tap 'layer1': student map \[2, .*, teacher map \[1, .*batch sizes differ"):
        Squared()(student, {key: value[:1] for key, value in teacher.items()})


def test_devices(pair):
    student, teacher = pair
    with pytest.raises(ValueError, match="tap 'layer1': student on cpu, teacher on meta; move one"):
        Squared()(student, {key: value.to("meta") for key, value in teacher.items()})


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 2.0], "2 weights for 3 taps: layer1, relu, relu#1"),
        (torch.ones(2), r"weights is \[2\]; expected \[3\]"),
        ({"layer9": 1.0}, r"weights for taps that do not exist: \['layer9'\]. Taps: layer1, relu, relu#1"),
        ({"layer1": 1.0, "relu": 1.0}, r"taps without a weight: \['relu#1'\]"),
    ],
)
def test_weights_that_do_not_fit(pair, weights, message):
    with pytest.raises(ValueError, match=message):
        Squared(weights)(*pair)
