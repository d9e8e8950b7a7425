"""The module: sub-logits behind the stages against the formula as written, presets, diagnostics, and every message."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hyperfast import functional
from hyperfast.losses import ComplementaryDistillation, StageProjector

CLASSES, EMBEDDING, BATCH = 5, 6, 4
SHAPES = {"layer1": (3, 8, 8), "layer2": (4, 4, 4), "layer3": (7, 2, 2)}


def make(**options):
    torch.manual_seed(0)
    loss = ComplementaryDistillation(options.pop("shapes", SHAPES), EMBEDDING, CLASSES, **options).double()
    with torch.no_grad():  # sub-logits of the size of logits
        loss.weight.mul_(50)
        loss.bias.normal_()
    return loss


def inputs(shapes=SHAPES):
    """Maps of the student, the teacher's embedding, both logits, labels."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    student = {name: draw(BATCH, *shape).requires_grad_() for name, shape in shapes.items()}
    teacher = {"fc:input": draw(BATCH, EMBEDDING).requires_grad_()}
    logits, teacher_logits = draw(BATCH, CLASSES).requires_grad_(), draw(BATCH, CLASSES).requires_grad_()
    return student, teacher, logits, teacher_logits, torch.tensor([0, 4, 1, 1])


def literal_answers(loss, student, embedding):
    """As the paper draws it: vectors put together, two linear layers per stage, blocks of classes."""
    stages = []
    for index, name in enumerate(loss.stages):
        width = EMBEDDING
        first = torch.cat((loss.student_half[index].weight, loss.teacher_half.weight[index * width :][:width]), 1)
        bias = loss.teacher_half.bias[index * width :][:width]
        both = torch.cat((loss.projectors[index](student[name]), embedding), 1)
        answers = F.linear(F.linear(both, first, bias).relu(), loss.weight[index].t(), loss.bias[index, 0])
        stages.append(answers.reshape(BATCH, loss.sub_logits, loss.classes))
    return torch.stack(stages, 1)


# Values


@pytest.mark.parametrize("count", [1, 2, 4])
def test_sub_logits_are_those_of_the_concatenation(count):
    loss, (student, teacher, *_) = make(sub_logits=count), inputs()
    found = loss.answers(student, teacher)
    assert found.shape == (BATCH, 3, count, CLASSES)
    torch.testing.assert_close(found, literal_answers(loss, student, teacher["fc:input"]), rtol=1e-12, atol=1e-12)
    assert found.std() > 0.1


@pytest.mark.parametrize("preset", ["parity", "stable"])
def test_the_total_is_that_of_the_operation(preset):
    loss, given = make(preset=preset, beta=0.5), inputs()
    student, teacher, logits, teacher_logits, labels = given
    options = {
        "parity": {"temperature": 1.0, "detach_target": False, "orthogonality": "fused", "reduction": "sum"},
        "stable": {"temperature": 3.0, "detach_target": True, "orthogonality": "sub", "reduction": "mean"},
    }[preset]
    answers = literal_answers(loss, student, teacher["fc:input"])
    expected = functional.sub_logit_distillation(
        logits, teacher_logits, answers, labels, (0.5, 0.5, 3, 0.5), label_smoothing=0.1, **options
    )
    leaves = [*student.values(), logits, *loss.parameters()]
    wanted = torch.autograd.grad(expected.total, leaves)
    total = loss(*given)
    torch.testing.assert_close(total, expected.total, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss.last, expected.components.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss.similarity, expected.similarity.detach(), rtol=1e-12, atol=1e-12)
    assert loss.last_names == ["gt", "kd", "sdd", "ol"] and loss.last_weights.tolist() == [0.5, 0.5, 3, 0.5]
    found = torch.autograd.grad(total, leaves, materialize_grads=True)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert all(gradient.any() for gradient in found)


def test_nothing_flows_to_the_teacher():
    given = inputs()
    make()(*given).backward()
    assert given[1]["fc:input"].grad is None and given[3].grad is None and given[2].grad.any()


def test_options_replace_those_of_the_preset():
    loss, given = make(preset="stable", temperature=1.0, reduction="sum", orthogonality="fused"), inputs()
    same = make(detach_target=True)
    assert loss.options == same.options and loss(*given) == same(*given)


def test_weights_by_name():
    given = inputs()
    loss = make(weights={"gt": 0.0, "kd": 0.0, "sdd": 2.0, "ol": 0.0})
    torch.testing.assert_close(loss(*given).detach(), 2 * loss.last[2])


def test_the_similarity_of_equal_sub_logits_is_1():
    loss, given = make(orthogonality="sub"), inputs()
    with torch.no_grad():
        loss.weight.copy_(loss.weight[:, :, :CLASSES].repeat(1, 1, 4))
        loss.bias.copy_(loss.bias[:, :, :CLASSES].repeat(1, 1, 4))
    assert loss.diagnostics() == {}
    loss(*given)
    torch.testing.assert_close(loss.diagnostics()["similarity"], torch.ones((), dtype=torch.float64))


# Stages


def test_stages_that_were_chosen_keep_their_projectors():
    loss, (student, *others) = make(stages=["layer3", "layer1"]), inputs()
    assert loss.stages == ["layer1", "layer3"] and loss.warned == {"layer2"}
    convolutions = [[m for m in p.modules() if isinstance(m, nn.Conv2d)] for p in loss.projectors]
    assert [len(found) for found in convolutions] == [8, 1]  # two separable convolutions, and a 1x1
    assert loss.answers(student, others[0]).shape[1] == 2
    loss(student, *others).backward()
    assert student["layer2"].grad is None and student["layer1"].grad.any()


@pytest.mark.parametrize(("last", "width"), [(4, 6), (7, 7)])
def test_projectors_have_the_larger_width(last, width):
    loss = make(shapes={"a": (3, 4, 4), "b": (last, 2, 2)})
    assert [projector.width for projector in loss.projectors] == [width, width]


def test_tokens():
    shapes = {"a": (17, 8), "b": (17, 12)}
    loss, given = make(shapes=shapes), inputs(shapes)
    loss(*given).backward()
    assert all(isinstance(projector, StageProjector) for projector in loss.projectors)
    assert [half.in_features for half in loss.student_half] == [8, 12]
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in loss.parameters())


def test_a_loss_made_for_maps():
    student, teacher, *_ = given = inputs()
    loss = ComplementaryDistillation.for_maps(student, teacher, CLASSES, sub_logits=2, preset="stable").double()
    assert loss.stages == [*SHAPES] and loss.sub_logits == 2 and loss.preset == "stable"
    assert loss.teacher_half.in_features == EMBEDDING and loss(*given).isfinite()
    pooled = {"map": teacher["fc:input"].detach()[:, :, None, None].expand(-1, -1, 2, 2)}
    other = ComplementaryDistillation.for_maps(student, pooled, CLASSES).double()
    torch.testing.assert_close(other.answers(student, pooled), other.answers(student, teacher))


# Labels


def test_soft_labels():
    *given, labels = inputs()
    soft = F.one_hot(labels, CLASSES) * 0.4 + 0.12
    assert make(soft_labels="argmax")(*given, soft.double()) == make()(*given, labels)
    with pytest.raises(ValueError, match=r"labels are torch.float64 \[4, 5\], probabilities of classes"):
        make()(*given, soft.double())


# Numerics


def test_the_linear_layers_start_small():
    torch.manual_seed(0)
    loss = ComplementaryDistillation({"a": (64, 2, 2)}, 64, 100)
    for weight in (loss.student_half[0].weight, loss.teacher_half.weight, loss.weight):
        assert 0.8 < float(weight.detach().std()) / 0.02 < 0.95
    assert not loss.teacher_half.bias.any() and not loss.bias.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    loss = make(preset="stable").float()
    student, teacher, logits, teacher_logits, labels = inputs()
    maps = {name: features.detach().float().requires_grad_() for name, features in student.items()}
    embedding = {"fc:input": teacher["fc:input"].detach().float()}
    with torch.autocast("cpu", dtype=dtype):
        total = loss(maps, embedding, logits.detach().to(dtype).requires_grad_(), teacher_logits.float(), labels)
    assert total.dtype == torch.float32 and total.isfinite()
    total.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in loss.parameters())


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sub_logits": 0}, "sub_logits is 0; expected a positive number of them per stage"),
        ({"shapes": {}}, "shapes has no stages; the loss needs the map of at least one"),
        ({"stages": ["layer4"]}, "behind 'layer4' among stages, which there is not; choose from 'layer1', 'layer2'"),
        ({"stages": []}, "there is to be a branch behind no stages; choose from 'layer1'"),
        ({"preset": "fast"}, "preset is 'fast'; choose one of 'parity', 'stable'"),
        ({"soft_labels": "mean"}, "soft_labels is 'mean'; choose one of 'refuse', 'argmax'"),
        ({"theta": 2.0}, "theta is 2.0; expected a cosine"),
        ({"orthogonality": "all"}, "orthogonality is 'all'; choose one of 'fused', 'sub'"),
        ({"shapes": {"a": (3,)}}, r"the map is \[3\] without the batch"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_an_unknown_option():
    with pytest.raises(TypeError, match="there is no option 'temprature'; a preset has 'temperature', 'detach_target'"):
        make(temprature=2.0)


def test_maps_that_are_not_there():
    loss, (student, teacher, *others) = make(), inputs()
    short = {name: student[name] for name in ("layer1", "layer2")}
    with pytest.raises(ValueError, match="there is no map of stage 'layer3'; given were layer1, layer2"):
        loss(short, teacher, *others)
    with pytest.raises(ValueError, match="3 maps of the teacher were given: layer1, layer2, layer3; expected one"):
        loss(student, student, *others)
    with pytest.raises(ValueError, match="0 maps of the teacher were given: none"):
        ComplementaryDistillation.for_maps(student, {}, CLASSES)


def test_repr_says_what_it_is():
    assert "stages=['layer2'], sub_logits=4, preset='stable'" in repr(make(stages=["layer2"], preset="stable"))
