"""Networks over patches: sizes, what a block computes, taps, and everything that is done to a network."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hyperfast
from hyperfast import models
from hyperfast.models.tokens import Attention, MixerBlock, TransformerBlock

NAMES = ("vit_tiny32", "mixer_tiny32")
NARROW = {"width": 8, "depth": 4, "patch": 8}


@pytest.mark.parametrize(("name", "parameters"), [("vit_tiny32", 5_379_748), ("mixer_tiny32", 2_501_796)])
def test_sizes(name, parameters):
    with torch.device("meta"):
        model = models.create(name, num_classes=100)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert f"{parameters:,} parameters with 100 classes" in getattr(models, name).__doc__


def test_sizes_by_the_formula():
    width, tokens, depth = 12, 16, 8
    mlp = 2 * 4 * width * width + 5 * width
    embed, head = 3 * 64 * width + width, 2 * width + 10 * width + 10
    vit = models.create("vit_tiny32", width=width, depth=depth, patch=8, heads=2)
    block = 4 * width + 4 * width * width + 4 * width + mlp
    assert sum(p.numel() for p in vit.parameters()) == embed + tokens * width + depth * block + head
    mixer = models.create("mixer_tiny32", width=width, depth=depth, patch=8)
    block = 4 * width + 2 * tokens * (width // 2) + width // 2 + tokens + mlp
    assert sum(p.numel() for p in mixer.parameters()) == embed + depth * block + head


def test_attention_is_what_it_says():
    attention, x = Attention(6, 2).double(), torch.randn(2, 5, 6, dtype=torch.float64)
    query, key, value = attention.qkv(x).chunk(3, dim=-1)
    read = torch.empty_like(x)
    for head in (slice(0, 3), slice(3, 6)):
        scores = query[..., head] @ key[..., head].mT / 3**0.5
        read[..., head] = scores.softmax(-1) @ value[..., head]
    torch.testing.assert_close(attention(x), attention.proj(read))


def test_blocks_are_what_they_say():
    x = torch.randn(2, 5, 6)
    block = TransformerBlock(6, 3)
    inner = x + block.attention(block.norm1(x))
    torch.testing.assert_close(block(x), inner + block.mlp(block.norm2(inner)))
    block = MixerBlock(6, 5)
    inner = x + block.token_mlp(block.norm1(x).mT).mT
    torch.testing.assert_close(block(x), inner + block.channel_mlp(block.norm2(inner)))
    first, _, last = block.token_mlp
    torch.testing.assert_close(block.token_mlp(x.mT), last(F.gelu(first(x.mT))))


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_the_patches_row_by_row(name):
    model = models.create(name, **NARROW)
    seen = []
    model.embed.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.stages.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(torch.randn(2, 3, 32, 32))
    image, tokens = seen
    positions = model.positions[0] if name == "vit_tiny32" else torch.zeros(16, 8)
    for row, column in ((0, 0), (1, 2), (3, 1)):
        token = 4 * row + column
        torch.testing.assert_close(tokens[:, token], image[:, :, row, column] + positions[token])


@pytest.mark.parametrize("name", NAMES)
def test_taps(name):
    model = models.create(name, num_classes=7, **NARROW | {"depth": 8}).eval()
    images = torch.randn(2, 3, 32, 32)
    with hyperfast.taps(model, at="stages") as stages, hyperfast.taps(model, at="embedding") as embedding:
        logits = model(images)
    found = {str(key): list(features.shape) for key, features in stages.student.items()}
    assert found == {f"stages.{stage}": [2, 16, 8] for stage in range(4)}
    assert [len(stage) for stage in model.stages] == [2] * 4
    ((key, pooled),) = embedding.student.items()
    assert key.path == "fc" and pooled.shape == (2, 8)
    torch.testing.assert_close(model.fc(pooled), logits)
    torch.testing.assert_close(model.norm(list(stages.student.values())[-1]).mean(1), pooled)


@pytest.mark.parametrize("name", NAMES)
def test_a_hypernetised_network_learns_from_the_taps_of_its_teacher(name):
    teacher = models.create(name, **NARROW).eval()
    student = hyperfast.hypernetize(teacher, hidden=(4, 4), init="bias_hyperinit")
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(student(images), teacher(images), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        student.theta0.mul_(1 + 0.3 * torch.randn_like(student.theta0))
    with hyperfast.taps(student, teacher, at="stages") as stages:
        logits = student(images)
        teacher(images)
    assert list(stages.student) == list(stages.teacher)
    (hyperfast.losses.FitNets()(stages.student, stages.teacher) + logits.square().sum()).backward()
    gradients = student.theta0.grad.split([target.numel for target in student.targets])
    for target, gradient in zip(student.targets, gradients, strict=True):
        assert gradient.any(), target.name
    generated = {target.layer for target in student.targets}
    assert generated == {n for n, m in teacher.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    plain = student.materialize()
    assert type(plain) is type(teacher)
    torch.testing.assert_close(plain(images), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_an_inherited_network_has_every_layer_but_the_classifier_in_low_rank(name):
    teacher = models.create(name, width=16, depth=4, patch=8).eval()
    small, report = hyperfast.inherit(teacher, rank=2, heads=2, only_smaller=False)
    replaced = {row.name for row in report.rows if row.reason is None}
    assert replaced == {n for n, m in teacher.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))} - {"fc"}
    with hyperfast.taps(small, teacher, at="stages") as stages:
        logits = small(torch.randn(2, 3, 32, 32))
        teacher(torch.randn(2, 3, 32, 32))
    assert list(stages.student) == list(stages.teacher)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_network_answers_the_same(name):
    model = models.create(name, **NARROW).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(hyperfast.surgery.freeze(model)(images), model(images))


@pytest.mark.parametrize("name", NAMES)
def test_compiled_with_fullgraph(name):
    torch.compiler.reset()
    model = models.create(name, **NARROW).eval()
    images = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images))


@pytest.mark.parametrize("name", NAMES)
def test_other_image_sizes_are_another_network(name):
    model = models.create(name, image_size=8, in_channels=1, width=8, depth=4, patch=2)
    assert model(torch.randn(3, 1, 8, 8)).shape == (3, 10)
    message = r"the images are \[3, 1, 8, 16\]; this network is for 8x8: create it with another image_size, or resize"
    with pytest.raises(ValueError, match=message):
        model(torch.randn(3, 1, 8, 16))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 6}, "depth is 6; the blocks form four equal stages, so it must be 4, 8, 12"),
        ({"depth": 0}, "depth is 0; the blocks form four equal stages"),
        ({"patch": 5}, "patch is 5 and image_size 32; patches must fill the image"),
        ({"patch": 0}, "patch is 0 and image_size 32"),
        ({"patch": 64}, "patch is 64 and image_size 32"),
    ],
)
def test_what_cannot_be(name, options, message):
    with pytest.raises(ValueError, match=message):
        models.create(name, **options)


def test_heads():
    assert [models.create("vit_tiny32", width=width, depth=4).stages[0][0].attention.heads for width in (8, 192)] == [
        1,
        3,
    ]
    for heads in (3, 0):
        with pytest.raises(
            ValueError, match=f"heads is {heads} and width 8; the width must be a multiple of the heads"
        ):
            models.create("vit_tiny32", width=8, heads=heads)


def test_initial_weights():
    torch.manual_seed(0)
    model = models.create("vit_tiny32", depth=4)
    for tensor in (model.positions, model.fc.weight, model.stages[0][0].attention.qkv.weight):
        # Of a normal distribution that is cut off at two standard deviations, 0.88 remain.
        assert 0.8 < float(tensor.detach().std()) / 0.02 < 0.95 and tensor.abs().max() <= 0.04
    assert not model.fc.bias.any() and not model.stages[0][0].mlp[0].bias.any()
