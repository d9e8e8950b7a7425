"""Where conditions come from, and what is refused."""

import pytest
import torch

from hyperfast.nn import ConstantCondition, ExternalCondition, LearnedCondition, PerLayerCondition, hypernetize

from .networks import images, small_net


def theta(student, condition=None):
    return torch.cat([part.flatten() for part in student.generate(condition).values()])


def test_constant_is_one_half_and_saved():
    student = hypernetize(small_net(), condition_size=2)
    assert student.state_dict()["condition.value"].tolist() == [0.5, 0.5]
    assert torch.equal(theta(student), theta(student, torch.tensor([0.5, 0.5])))
    chosen = hypernetize(small_net(), condition=ConstantCondition(2, [0.25, 1.0]))
    assert torch.equal(theta(chosen), theta(chosen, torch.tensor([0.25, 1.0])))
    with pytest.raises(ValueError, match=r"the constant condition is 1.5; expected values in \[0, 1\]"):
        ConstantCondition(1, 1.5)


def test_learned_stays_on_the_manifold_of_constant_norm():
    student = hypernetize(small_net(), condition="learned", condition_size=3)
    assert torch.equal(theta(student), theta(student, torch.full((3,), 0.5)))
    with torch.no_grad():
        student.condition.logit.normal_(0, 10)
    encoding = student.encode(student.condition()[None])
    assert encoding.norm().item() == pytest.approx(3**0.5)


def test_per_layer_rows_move_their_own_layer_only():
    student = hypernetize(small_net(), condition="per_layer", condition_size=2)
    assert student.condition.offsets.tolist() == [0, 112, 137]
    own = student.condition().detach()
    assert torch.equal(theta(student), theta(student, own))
    moved = own.clone()
    moved[1] = 1 - moved[1]
    before, after = student.generate(own), student.generate(moved)
    assert torch.equal(before["0.weight"], after["0.weight"]) and torch.equal(before["0.bias"], after["0.bias"])
    assert not torch.equal(before["5.weight"], after["5.weight"])
    student.generate()["5.weight"].sum().backward()
    assert student.condition.logit.grad[0].count_nonzero() == 0
    assert student.condition.logit.grad[1].all()


def test_per_target_has_a_row_for_every_parameter():
    student = hypernetize(small_net(), condition="per_target")
    assert student.condition.offsets.tolist() == [0, 108, 112, 132, 137]
    assert "condition=per_target(size=1, 4 rows)" in repr(student)


def test_per_layer_lengths_must_fit():
    with pytest.raises(ValueError, match="the condition has rows for 10 weights, but 137 are generated"):
        hypernetize(small_net(), condition=PerLayerCondition([4, 6]))


def test_external_must_be_given():
    student = hypernetize(small_net(), condition="external", condition_size=2)
    with pytest.raises(ValueError, match=r"external condition: call it with condition=a tensor \[2\] or \[B, 2\]"):
        student(images())
    with pytest.raises(ValueError, match="external condition"):
        student.materialize()
    assert student(images(), condition=torch.rand(2)).shape == (6, 5)


def test_stochastic_draws_in_training_and_is_fixed_in_eval_mode():
    student = hypernetize(small_net(), condition="stochastic")
    assert not torch.equal(theta(student), theta(student))
    given = torch.tensor([0.3])
    assert torch.equal(theta(student, given), theta(student, given))
    student.eval()
    assert torch.equal(theta(student), theta(student, torch.tensor([0.5])))


@pytest.mark.parametrize("kind", [ConstantCondition, LearnedCondition, ExternalCondition])
def test_a_condition_may_be_passed_as_a_module(kind):
    student = hypernetize(small_net(), condition=kind(4))
    assert student.trunk[0].in_features == 8
    assert student(images(), condition=torch.rand(4)).shape == (6, 5)


@pytest.mark.parametrize("encoding", ["cos|sin", "z|1-z"])
@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan"), float("inf")])
def test_values_outside_the_unit_interval(encoding, value):
    student = hypernetize(small_net(), condition_size=2, encoding=encoding)
    with pytest.raises(
        ValueError, match=r"condition holds a value outside \[0, 1\] or NaN; the encoding .*: got \[0.5"
    ):
        student(images(), condition=torch.tensor([0.5, value]))
    with pytest.raises(ValueError, match="condition holds a value outside"):
        student.generate(torch.full((300, 2), value))


def test_without_an_encoding_any_finite_value_is_good():
    student = hypernetize(small_net(), encoding="none")
    student(images(), condition=torch.tensor([-3.0]))
    with pytest.raises(ValueError, match="condition holds a value that is not finite"):
        student(images(), condition=torch.tensor([float("nan")]))


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("constant", torch.rand(3), r"condition is \[3\]; this hypernetwork takes \[2\] or \[B, 2\]"),
        ("constant", torch.rand(()), r"condition is \[\]; this"),
        ("learned", torch.rand(1, 1, 2), r"condition is \[1, 1, 2\]; this"),
        ("per_layer", torch.rand(2), r"condition is \[2\]; this hypernetwork takes \[2, 2\] or \[B, 2, 2\]"),
        ("per_layer", torch.rand(3, 2), r"condition is \[3, 2\]; this"),
        ("constant", torch.ones(2, dtype=torch.int64), "condition is torch.int64; expected a floating point tensor"),
        (
            "constant",
            torch.rand(2, device="meta"),
            "condition is on meta but the hypernetwork on cpu; use condition.to",
        ),
    ],
)
def test_conditions_that_do_not_fit(kind, given, message):
    student = hypernetize(small_net(), condition=kind, condition_size=2)
    with pytest.raises(ValueError, match=message):
        student(images(), condition=given)


def test_a_number_is_no_condition():
    with pytest.raises(TypeError, match="condition is a float; expected a floating point tensor"):
        hypernetize(small_net())(images(), condition=0.5)


def test_gradients_reach_a_given_condition():
    student = hypernetize(small_net(), condition_size=2)
    condition = torch.rand(3, 2, requires_grad=True)
    student(images(), condition=condition).square().sum().backward()
    assert condition.grad.all()
