"""The modules over Gram matrices; the arithmetic itself is tested in tests/ops."""

import pytest
import torch
from helpers import golden as load_golden
from torch import nn

from hyperfast.losses import FlowOfSolution, RelationalDistillation, SimilarityPreserving
from hyperfast.surgery import taps

GOLDEN = load_golden()
LOSSES = [SimilarityPreserving, RelationalDistillation, FlowOfSolution]


def golden(name):
    return [GOLDEN[f"in.{name}{i}"] for i in range(3)]


def pair(count=3):
    return tuple([torch.randn(5, 4 + i, 6, 6) for i in range(count)] for _ in range(2))


def test_sum_over_the_taps_is_repdistiller():
    loss = SimilarityPreserving(weights=[1.0] * 3)(golden("s"), golden("t"))
    torch.testing.assert_close(loss, GOLDEN["sp_rep.loss"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("case", "options"), [("rkd_rep", {}), ("rkd_rep_d", {"distance": 1.0, "angle": 0.0})])
def test_relations_are_repdistillers(case, options):
    loss = RelationalDistillation(**options)(golden("s")[2:], golden("t")[2:])
    torch.testing.assert_close(loss, GOLDEN[f"{case}.loss"], rtol=1e-12, atol=1e-12)


def test_the_flow_between_two_taps_is_repdistillers():
    loss = FlowOfSolution(pairs=[(0, 1)], beta=50)(golden("s"), golden("t"))
    torch.testing.assert_close(loss, 50 * GOLDEN["fsp_rep.loss"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_default_weights_are_a_mean(loss):
    student, teacher = pair()
    mean, each = loss(), loss(weights=[1.0] * (2 if loss is FlowOfSolution else 3))
    torch.testing.assert_close(each(student, teacher), mean(student, teacher) * len(mean.last))


def test_weights_of_pairs_by_name():
    student, teacher = pair()
    loss = FlowOfSolution(pairs=[(0, 2), (1, 0)], weights={"1>0": 3.0, "0>2": 0.0})
    torch.testing.assert_close(loss(student, teacher), 3 * FlowOfSolution(pairs=[(1, 0)])(student, teacher))
    assert loss.last_names == ["0>2", "1>0"] and loss.last.shape == (2,)
    with pytest.raises(ValueError, match=r"weights for taps that do not exist: \['2>0'\]. Taps: 0>2, 1>0"):
        FlowOfSolution(pairs=[(0, 2), (1, 0)], weights={"2>0": 1.0})(student, teacher)


def test_options_reach_the_operations():
    student, teacher = pair()
    differ = [
        (SimilarityPreserving(), SimilarityPreserving(beta=2)),
        (RelationalDistillation(), RelationalDistillation(normalize=True)),
        (RelationalDistillation(), RelationalDistillation(distance=0.0)),
        (FlowOfSolution(), FlowOfSolution(reduction="sum")),
        (FlowOfSolution(), FlowOfSolution(normalize=True)),
    ]
    for one, other in differ:
        assert one(student, teacher) != other(student, teacher)
    pooled = [student[0], torch.randn(5, 4, 3, 3)], [teacher[0], torch.randn(5, 4, 3, 3)]
    assert FlowOfSolution()(*pooled) != FlowOfSolution(pool="max")(*pooled)


@pytest.mark.parametrize(
    "loss",
    [
        SimilarityPreserving(beta=3),
        RelationalDistillation(normalize=True),
        RelationalDistillation(10.0, 0.0),
        FlowOfSolution([(0, 2), (2, 1)], pool="max", normalize=True, beta=3),
    ],
)
def test_a_compressed_teacher_is_the_teacher(loss):
    student, teacher = pair()
    student = [s.requires_grad_() for s in student]
    expected = loss(student, teacher)
    named = {f"layer{i}": t.requires_grad_() for i, t in enumerate(teacher)}
    known = loss.compress(named)
    assert not any(k.requires_grad for k in known)
    found = loss(student, statistics=known)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, student), torch.autograd.grad(expected, student), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_teacher_or_statistics(loss):
    student, teacher = pair()
    known = loss().compress(teacher)
    with pytest.raises(ValueError, match=r"both given; give the teacher's maps, or what compress\(\) made of them"):
        loss()(student, teacher, statistics=known)
    with pytest.raises(ValueError, match="neither given"):
        loss()(student)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_on_taps_of_two_networks_a_step_lowers_the_loss(loss):
    def network():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 3, stride=2), nn.ReLU())

    student, teacher, images = network(), network().eval(), torch.randn(6, 3, 9, 9)
    distillation, optimiser = loss(), torch.optim.SGD(student.parameters(), lr=0.02)
    values = []
    for _ in range(3):
        with taps(student, teacher, at=["0", "2"]) as record:
            student(images)
            with torch.no_grad():
                teacher(images)
        value = distillation(record.student, record.teacher)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        values.append(value.item())
    assert values[0] > values[1] > values[2]
    assert distillation.last_names == (["0>2"] if loss is FlowOfSolution else ["0", "2"])


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_compiled_with_fullgraph(loss):
    torch.compiler.reset()
    module = loss()
    expected = module(*pair_of_64())
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*pair_of_64()), expected)


def pair_of_64():
    torch.manual_seed(2)
    return tuple([m.double() for m in side] for side in pair())


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_bad_maps_are_named_by_tap(loss):
    with pytest.raises(ValueError, match=r"tap '0': .*the batch sizes differ"):
        loss()([torch.randn(2, 3, 4, 4)] * 2, [torch.randn(3, 3, 4, 4)] * 2)


def test_one_tap_has_no_flow():
    with pytest.raises(ValueError, match="one tap; the flow is that between two"):
        FlowOfSolution()([torch.randn(2, 3, 4, 4)], [torch.randn(2, 3, 4, 4)])


def test_repr_shows_the_options():
    assert repr(SimilarityPreserving()) == "SimilarityPreserving()"
    assert (
        repr(RelationalDistillation(1.0, 2.0, True))
        == "RelationalDistillation(distance=1.0, angle=2.0, normalize=True)"
    )
    assert repr(RelationalDistillation()) == "RelationalDistillation(distance=25.0, angle=50.0)"
    expected = "FlowOfSolution(pairs=[(0, 1)], pool='max', reduction='mean', normalize=False)"
    assert repr(FlowOfSolution([(0, 1)], pool="max")) == expected
