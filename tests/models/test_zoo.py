"""Every network of the zoo has the sizes, names and shapes of its checkpoint, can be tapped and hypernetised."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import hyperfast
from hyperfast import models
from hyperfast.surgery import find_taps

from .zoo import ACTIVATIONS, SIZES, Sizes, checkpoint, options

# One narrow network per family, for what runs.
NARROW = {
    "resnet20": {"width": 4, "shortcut": "B"},
    "vgg11_bn": {"width": 4},
    "mobilenetv2_x0_5": {"width": 4},
    "shufflenetv2_x0_5": {"width": 8},
    "repvgg_a0": {"width": 4},
}


def on_meta(name):
    with torch.device("meta"):
        return models.create(name, num_classes=100, **options(name)).eval()


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    model = on_meta(name)
    parameters = list(model.parameters())
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    weights = [convolution.weight for convolution in convolutions]
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 32, 32, device="meta"))
    found = Sizes(
        parameters=sum(p.numel() for p in parameters),
        multiply_adds=round(counter.get_total_flops() / 2e6, 2),
        tensors=len(parameters),
        convolutions=len(convolutions),
        depthwise=sum(c.groups == c.in_channels for c in convolutions),
        convolution_weights=sum(w.numel() for w in weights),
        kernels_3x3=sum(w.numel() // 9 for w in weights if w.shape[2:] == (3, 3)),
        kernels_1x1=sum(w.numel() for w in weights if w.shape[2:] == (1, 1)),
        norms=len(norms),
        affine=sum(2 * norm.num_features for norm in norms),
        largest=max(p.numel() for p in parameters),
    )
    assert found == SIZES[name]


@pytest.mark.parametrize("name", SIZES)
def test_a_checkpoint_of_the_zoo_loads_from_its_file(name, tmp_path):
    # Every tensor has one number of its own, which takes no room in the file.
    state = {
        key: torch.tensor(i if key.endswith("num_batches_tracked") else float(i)).expand(shape)
        for i, (key, shape) in enumerate(checkpoint(name).items())
    }
    torch.save(state, tmp_path / f"cifar100_{name}.pt")
    model = on_meta(name).to_empty(device="cpu")
    assert models.load_weights(model, tmp_path / f"cifar100_{name}.pt") == {}
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    for key, tensor in loaded.items():
        assert tensor.shape == state[key].shape
        assert (tensor == state[key]).all(), key
    on_meta(name).load_state_dict(state, strict=True, assign=True)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_tapped_at_their_inputs(name):
    model = on_meta(name)
    with hyperfast.taps(model, at="activations") as taps:
        model(torch.empty(1, 3, 32, 32, device="meta"))
    maps = list(taps.student.values())
    assert all(key.where == "input" and key.call == 0 for key in taps.student)
    assert all(features.ndim == 4 for features in maps)
    assert (len(maps), sum(features.numel() for features in maps)) == ACTIVATIONS[name]


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("resnet20", {"layer1": (16, 32), "layer2": (32, 16), "layer3": (64, 8)}),
        ("vgg11_bn", dict(zip((3, 7, 14, 21, 28), ((64, 32), (128, 16), (256, 8), (512, 4), (512, 2)), strict=True))),
        ("mobilenetv2_x1_0", {4: (24, 32), 7: (32, 16), 14: (96, 8), 18: (1280, 4)}),
        ("shufflenetv2_x0_5", {"stage2": (48, 16), "stage3": (96, 8), "stage4": (192, 4)}),
        (
            "repvgg_a0",
            {"stage0": (48, 32), "stage1": (48, 32), "stage2": (96, 16), "stage3": (192, 8), "stage4": (1280, 4)},
        ),
    ],
)
def test_stages(name, stages):
    model = on_meta(name)
    with hyperfast.taps(model, at="stages") as taps:
        model(torch.empty(2, 3, 32, 32, device="meta"))
    found = {key.path: list(features.shape) for key, features in taps.student.items()}
    expected = {
        at if isinstance(at, str) else f"features.{at}": [2, channels, size, size]
        for at, (channels, size) in stages.items()
    }
    assert found == expected


@pytest.mark.parametrize("name", NARROW)
def test_every_activation_is_one_call_of_one_module_and_not_in_place(name):
    model = models.create(name, **NARROW[name]).eval()
    calls = []
    activations = [module for module in model.modules() if isinstance(module, (nn.ReLU, nn.ReLU6))]
    for module in activations:
        module.register_forward_hook(lambda module, inputs, output: calls.append((module, inputs[0] is output)))
    model(torch.randn(1, 3, 32, 32))
    assert [module for module, _ in calls] == activations
    assert not any(in_place for _, in_place in calls)


@pytest.mark.parametrize("name", NARROW)
def test_a_hypernetised_network_learns_from_the_taps_of_its_teacher(name):
    teacher = models.create(name, **NARROW[name]).eval()
    student = hyperfast.hypernetize(teacher, hidden=(4, 4), init="bias_hyperinit")
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(student(images), teacher(images), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        student.theta0.mul_(1 + 0.3 * torch.randn_like(student.theta0))
    with hyperfast.taps(student, teacher, at="stages") as stages:
        logits = student(images)
        teacher(images)
    assert list(stages.student) == list(stages.teacher)
    (hyperfast.losses.AttentionTransfer(beta=1000)(stages.student, stages.teacher) + logits.square().sum()).backward()
    gradients = student.theta0.grad.split([target.numel for target in student.targets])
    for target, gradient in zip(student.targets, gradients, strict=True):
        assert gradient.any(), target.name
    plain = student.materialize()
    assert type(plain) is type(teacher)
    torch.testing.assert_close(plain(images), logits, rtol=1e-4, atol=1e-5)
    assert [str(tap) for tap in find_taps(student, "activations")] == [
        str(tap) for tap in find_taps(plain, "activations")
    ]


@pytest.mark.parametrize("name", NARROW)
def test_a_frozen_network_answers_the_same(name):
    model = models.create(name, **NARROW[name])
    images = torch.randn(4, 3, 32, 32)
    for _ in range(3):
        model(images)
    frozen = hyperfast.surgery.freeze(model)
    torch.testing.assert_close(frozen(images), model.eval()(images), rtol=1e-4, atol=1e-4)
    norms = {path.split(".")[-1] for path, m in frozen.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert norms <= {"rbr_identity"}


@pytest.mark.parametrize("size", [8, 33])
@pytest.mark.parametrize("name", ["mobilenetv2_x0_5", "shufflenetv2_x0_5", "repvgg_a0"])
def test_images_of_other_sizes(name, size):
    model = models.create(name, num_classes=7, in_channels=1, width=4).eval()
    assert model(torch.randn(2, 1, size, size)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "width"), [("mobilenetv2_x1_4", 48), ("shufflenetv2_x1_5", 24), ("repvgg_a2", 64), ("repvgg_a1", 64)]
)
def test_half_the_width_is_half_of_all_channels(name, width):
    half = models.create(name, width=width // 2)
    whole = on_meta(name)
    pairs = [
        (a.num_features, b.num_features)
        for a, b in zip(half.modules(), whole.modules(), strict=True)
        if isinstance(a, nn.BatchNorm2d)
    ]
    assert pairs[0] == (width // 2, width)
    # MobileNet's channels are multiples of 8, six times that within a block.
    assert all(abs(2 * narrow - wide) <= (48 if "mobile" in name else 2) for narrow, wide in pairs)


def test_a_block_of_shufflenet_takes_turns():
    block = models.shufflenetv2_x0_5(width=8).eval().stage2[1]
    x = torch.randn(2, 16, 4, 4)
    out = block(x)
    assert torch.equal(out[:, ::2], x[:, :8])
    torch.testing.assert_close(out[:, 1::2], block.branch2(x[:, 8:]))
    first = models.shufflenetv2_x0_5(width=8).eval().stage2[0]
    y = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(first(y), torch.stack((first.branch1(y), first.branch2(y)), 2).flatten(1, 2))


def test_a_block_of_mobilenet_is_linear_at_its_end_and_adds_its_input_where_shapes_agree():
    features = models.mobilenetv2_x0_5(width=4).eval().features
    x = torch.randn(2, 8, 4, 4)
    assert [block.residual for block in features[1:18]] == [
        block.conv[0][0].in_channels == block.conv[-1].num_features and block.conv[-3][0].stride == (1, 1)
        for block in features[1:18]
    ]
    assert torch.equal(features[5](x), x + features[5].conv(x))
    assert (features[5].conv(x) < 0).any()
    assert torch.equal(features[7](x), features[7].conv(x))


@pytest.mark.parametrize("name", NARROW)
def test_the_weights_of_another_family_are_refused(name, tmp_path):
    other = "resnet20" if name != "resnet20" else "repvgg_a0"
    torch.save(models.create(other, **NARROW[other]).state_dict(), tmp_path / "weights.pt")
    model = models.create(name, **NARROW[name])
    with pytest.raises(ValueError, match=rf"another architecture than this {type(model).__name__}") as caught:
        models.load_weights(model, tmp_path / "weights.pt")
    missing, unexpected, *others = str(caught.value).splitlines()[1:]
    assert all("of another shape" in line for line in others), "a hint is for another form of the same network"
    for line, kind in ((missing, "missing from"), (unexpected, "unexpected in")):
        head, _, listed = line.partition(" the file: ")
        assert head.endswith(kind)
        assert len(listed.removesuffix(", ...").split(", ")) == 5
