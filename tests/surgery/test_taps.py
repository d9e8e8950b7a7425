"""Taps find the right modules, survive in-place activations, and say what is wrong."""

import copy

import pytest
import torch
from torch import nn

from hyperfast.surgery.taps import TapKey, find_taps, taps


class Block(nn.Module):
    """A residual block that calls one in-place activation twice."""

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride, padding=1)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.stride = stride

    def forward(self, x):
        out = self.relu(self.bn(self.conv(x)))
        return self.relu(out + x[..., :: self.stride, :: self.stride])


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.layer1 = nn.Sequential(Block(4))
        self.layer2 = nn.Sequential(Block(4, 2), Block(4))
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.layer2(self.layer1(self.conv1(x))).mean((2, 3)))


class InPlaceSum(nn.Module):
    """Overwrites the output of `bn` by a functional in-place operation."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.head = nn.Identity()

    def forward(self, x):
        out = self.bn(x)
        out += x
        return self.head(out)


class Pair(nn.Module):
    def forward(self, x):
        return x, x


def vgg() -> nn.Module:
    def unit(c_in, c_out):
        return nn.Conv2d(c_in, c_out, 3, padding=1), nn.ReLU(inplace=True)

    class Vgg(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(*unit(3, 4), nn.MaxPool2d(2), *unit(4, 4), *unit(4, 4), nn.MaxPool2d(2))
            self.classifier = nn.Linear(4, 5)

        def forward(self, x):
            return self.classifier(self.features(x).mean((2, 3)))

    return Vgg()


def keys(record) -> list[str]:
    return [str(key) for key in record]


def paths(model: nn.Module, at="stages") -> list[str]:
    return [str(tap) for tap in find_taps(model, at)]


@pytest.fixture
def x():
    return torch.randn(2, 3, 8, 8)


@pytest.fixture
def net():
    return ResNet().eval()


# Where


def named(**children: nn.Module) -> nn.Module:
    model = nn.Module()
    for name, child in children.items():
        model.add_module(name, child)
    return model


def convs(strides) -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 3, stride, padding=1), nn.ReLU6()) for stride in strides))


def identities(count: int) -> list[nn.Module]:
    return [nn.Identity() for _ in range(count)]


def test_a_model_declares_which_activations_are_tapped():
    model = named(features=nn.Sequential(nn.Linear(2, 2), nn.ReLU()), classifier=nn.Sequential(nn.ReLU(), nn.Tanh()))
    assert paths(model, "activations") == ["features.1:input", "classifier.0:input", "classifier.1:input"]
    model.tap_activations = ("features.*", "classifier.1")
    assert paths(model, "activations") == ["features.1:input", "classifier.1:input"]
    model.tap_activations = ("stem.*",)
    with pytest.raises(ValueError, match=r"tap_activations of the model: 'stem\.\*' matches no module"):
        paths(model, "activations")


def test_stages_of_resnet_by_name(net):
    assert paths(net) == ["layer1:output", "layer2:output"]


def test_stages_of_shufflenet_and_repvgg_by_name():
    model = named(conv1=nn.Identity(), **{f"stage{i}": nn.Sequential(Block(2)) for i in (2, 3, 4)}, fc=nn.Identity())
    assert paths(model) == ["stage2:output", "stage3:output", "stage4:output"]


@pytest.mark.parametrize("container", [nn.Sequential, lambda *layers: nn.ModuleList(layers)])
def test_stages_of_a_list_of_blocks(container):
    assert paths(named(blocks=container(*identities(2)))) == ["blocks.0:output", "blocks.1:output"]


def test_stages_are_the_outermost_numbered_modules():
    model = named(stages=nn.Sequential(named(blocks=nn.Sequential(*identities(3))), nn.Identity()))
    assert paths(model) == ["stages.0:output", "stages.1:output"]


def test_stages_of_vgg_are_the_inputs_of_its_poolings():
    assert paths(vgg()) == ["features.2:input", "features.7:input"]


def test_stages_of_mobilenet_are_where_the_map_shrinks():
    model = named(features=convs((2, 1, 2, 1, 2, 1)))
    assert paths(model) == ["features.2:input", "features.4:input", "features.5:output"]


def test_stages_declared_by_the_model(net):
    net.tap_stages = ("conv1", "layer?.0.relu:input")
    assert paths(net) == ["conv1:output", "layer1.0.relu:input", "layer2.0.relu:input"]


def test_activations_are_tapped_at_their_input(net, x):
    with taps(net, at="activations") as record:
        net(x)
    assert keys(record.student) == [
        f"layer{path}.relu{call}:input" for path in ("1.0", "2.0", "2.1") for call in ("", "#1")
    ]
    assert all(features.min() < 0 for features in list(record.student.values())[::2])


def test_globs_suffixes_and_predicates(net):
    assert paths(net, ["*.bn", "conv1:input"])[-1] == "conv1:input"
    assert paths(net, "*.bn") == ["layer1.0.bn:output", "layer2.0.bn:output", "layer2.1.bn:output"]
    assert paths(net, lambda path, module: isinstance(module, nn.Linear)) == ["fc:output"]
    assert paths(net, lambda path, module: path == "fc" and "input") == ["fc:input"]


# What is recorded


def test_values_are_the_outputs_in_call_order(net, x):
    with taps(net, at=["layer1", "conv1", "layer2"]) as record:
        logits = net(x)
    stem = net.conv1(x)
    first = net.layer1(stem)
    second = net.layer2(first)
    assert list(record.student) == [TapKey(path, 0, "output") for path in ("conv1", "layer1", "layer2")]
    for found, expected in zip(record.student.values(), (stem, first, second), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(logits, net(x), rtol=0, atol=0)


def test_gradients_flow_to_the_student_only(net, x):
    teacher = copy.deepcopy(net)
    with taps(net, teacher) as record:
        net(x), teacher(x)
    assert list(record.student) == list(record.teacher)
    assert all(features.requires_grad for features in record.student.values())
    assert not any(features.requires_grad for features in record.teacher.values())


def test_the_teacher_s_graph_is_kept_on_request(net, x):
    teacher, x = copy.deepcopy(net).requires_grad_(False), x.clone().requires_grad_()
    with taps(net, teacher, detach_teacher=False) as record:
        net(x), teacher(x)
    assert all(features.requires_grad for features in record.teacher.values())


def test_a_module_called_twice_gives_two_taps(net, x):
    with taps(net, at="layer1.0.relu:input") as record:
        net(x)
    first, second = record.student.values()
    assert keys(record.student) == ["layer1.0.relu:input", "layer1.0.relu#1:input"]
    assert not torch.equal(first, second)


def test_a_second_forward_replaces_the_first(net, x):
    with taps(net) as record:
        net(x)
        net(x[:1])
    assert [key.call for key in record.student] == [0, 0]
    assert [len(features) for features in record.student.values()] == [1, 1]


def test_hooks_are_gone_after_the_block_also_after_an_exception(net, x):
    with pytest.raises(KeyError), taps(net) as record:
        raise KeyError
    net(x)
    with pytest.raises(RuntimeError, match="hold nothing"):
        list(record.student)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_a_copy_made_in_the_block_is_not_recorded(net, x):
    with taps(net) as record:
        net(x)
        copy.deepcopy(net)(x[:1])
    assert [len(features) for features in record.student.values()] == [2, 2]


def test_teacher_with_other_names(net, x):
    teacher = vgg()
    with taps(net, teacher, teacher_at=["features.1", "features.4"]) as record:
        assert repr(record.teacher) == "TapRecord(teacher; no forward yet)"
        teacher(x)
    assert repr(record.teacher) == "TapRecord(teacher; features.1: [2, 4, 8, 8], features.4: [2, 4, 4, 4])"


# In-place operations


def test_inplace_activation_does_not_overwrite_the_tap_before_it(net, x):
    with taps(net, at="layer1.0.bn") as record:
        net(x)
    assert next(iter(record.student.values())).min() < 0


def test_inplace_flags_are_restored_also_after_an_exception(net):
    relu = net.layer1[0].relu
    with pytest.raises(KeyError), taps(net, copy.deepcopy(net)):
        assert relu.inplace is False
        raise KeyError
    assert relu.inplace is True


@pytest.mark.parametrize("grad", [True, False])
def test_functional_inplace_write_is_an_error_that_says_what_to_do(x, grad):
    model = InPlaceSum()
    with torch.set_grad_enabled(grad), taps(model, copy.deepcopy(model), at="bn") as record:
        model(x)
    with pytest.raises(RuntimeError, match=r"student tap 'bn' was overwritten in place.*clone=True"):
        record.student[TapKey("bn", 0, "output")]


def test_functional_inplace_write_to_the_detached_teacher_is_found(net, x):
    teacher = InPlaceSum()
    with taps(net, teacher, teacher_at="bn") as record:
        teacher(x)
    with pytest.raises(RuntimeError, match="teacher tap 'bn' was overwritten"):
        list(record.teacher.values())


def test_clone_keeps_the_value_before_the_write(x):
    model = InPlaceSum().eval()
    with taps(model, at="bn", clone=True) as record:
        model(x)
    torch.testing.assert_close(record.student[TapKey("bn", 0, "output")], model.bn(x), rtol=0, atol=0)


def test_inference_mode_teacher(net, x):
    teacher = copy.deepcopy(net)
    with taps(net, teacher) as record, torch.inference_mode():
        teacher(x)
    assert [features.is_inference() for features in record.teacher.values()] == [True, True]


# Wrappers


class Wrapper(nn.Module):
    """Stands for data parallelism and weight averaging: one child called `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args):
        return self.module(*args)


class Hyper(nn.Module):
    """Stands for a hypernetwork: the model at `primary`, run functionally."""

    def __init__(self, primary: nn.Module) -> None:
        super().__init__()
        self.trunk = nn.ModuleList([nn.Linear(2, 2)])
        self.primary = primary

    def forward(self, x):
        weights = {"conv1.weight": self.primary.conv1.weight * 2}
        return torch.func.functional_call(self.primary, weights, (x,))


@pytest.mark.parametrize("wrap", [Wrapper, Hyper, lambda net: Wrapper(Hyper(net)), torch.optim.swa_utils.AveragedModel])
def test_prefixes_are_stripped(net, x, wrap):
    wrapped = wrap(copy.deepcopy(net))
    with taps(wrapped, net) as record:
        wrapped(x)
        wrapped(x)
        net(x)
    assert keys(record.student) == keys(record.teacher) == ["layer1", "layer2"]


def test_a_wrapped_model_called_directly_starts_a_new_record(net, x):
    wrapped = Wrapper(net)
    with taps(wrapped) as record:
        wrapped(x)
        net(x)
    assert keys(record.student) == ["layer1", "layer2"]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_student(net, x, backend):
    torch.compiler.reset()
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    with taps(net, at="activations") as record:
        net(x)
    expected = {key: value.detach() for key, value in record.student.items()}
    for _ in range(2):
        with taps(compiled, at="activations") as record:
            compiled(x)
        assert list(record.student) == list(expected)
        torch.testing.assert_close(dict(record.student), expected)
    torch.autograd.grad(sum(value.sum() for value in record.student.values()), net.conv1.weight)


def test_compiled_submodule_keeps_its_path(net):
    net.layer1 = torch.compile(net.layer1, backend="eager")
    assert paths(net) == ["layer1:output", "layer2:output"]
    assert paths(net, "layer1.*") == [f"layer1.0{part}:output" for part in ("", ".conv", ".bn", ".relu")]


def test_compiled_model_keeps_the_value_before_an_inplace_write(x):
    torch.compiler.reset()
    model = InPlaceSum().eval()
    with taps(model, at="bn") as record:
        torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(record.student[TapKey("bn", 0, "output")], model.bn(x))


def test_model_compiled_without_the_taps_says_how_to_go_on(x):
    torch.compiler.reset()
    compiled = torch.compile(InPlaceSum(), backend="eager")
    compiled(x)
    with taps(compiled, at=["bn", "head"]) as record:
        compiled(x)
        with pytest.raises(RuntimeError, match=r"compiled without the taps.*torch\.compiler\.reset"):
            len(record.student)
        torch.compiler.reset()
        compiled(x)
        assert len(record.student) == 2


# Bad input


def test_a_glob_that_matches_nothing_lists_near_names_first(net):
    with pytest.raises(ValueError, match=r"'layer3' matches no module\. Modules: layer[12], layer[12], "):
        find_taps(net, ["layer1", "layer3"])


def test_at_most_twenty_candidates_are_listed():
    model = nn.Sequential(*identities(30))
    with pytest.raises(ValueError, match=r"0, 1, .*, \.\.\. and 10 more$") as error:
        find_taps(model, "nothing-like-it")
    assert str(error.value).count(",") == 20


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("stages", "declare `tap_stages`"),
        ("activations", "functional F.relu cannot be tapped"),
        (lambda path, module: False, "the predicate accepts no module"),
    ],
)
def test_nothing_found_says_why(at, message):
    with pytest.raises(ValueError, match=message):
        find_taps(nn.Sequential(nn.Linear(2, 2)), at)


@pytest.mark.parametrize("at", ["embedding", "logits"])
def test_the_last_linear_layer(at):
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4), nn.ReLU())
    assert paths(model, at) == ["1:input" if at == "embedding" else "1:output"]
    with pytest.raises(ValueError, match="the model has no linear layer"):
        find_taps(nn.Sequential(nn.ReLU()), at)


def test_unknown_suffix(net):
    with pytest.raises(ValueError, match=r"':inptu'; use ':input' or ':output'"):
        find_taps(net, "layer1:inptu")


def test_an_error_leaves_no_hook_behind(net):
    with pytest.raises(ValueError, match="matches no module"), taps(net, copy.deepcopy(net), teacher_at="nothing"):
        pass
    assert not any(module._forward_hooks for module in net.modules())
    assert net.layer1[0].relu.inplace is True


def test_reading_before_a_forward(net):
    with taps(net) as record, pytest.raises(RuntimeError, match="student taps hold nothing: no forward"):
        dict(record.student)


def test_reading_the_teacher_that_was_not_given(net, x):
    with taps(net) as record:
        net(x)
    with pytest.raises(RuntimeError, match=r"If no teacher was given to taps\(\)"):
        len(record.teacher)


def test_a_module_that_returns_a_tuple_is_named(x):
    model = nn.Sequential(Pair())
    with taps(model, at="0"), pytest.raises(TypeError, match=r"student tap '0:output': .* is a tuple, not a tensor"):
        model(x)
