"""Golden values of Knowledge-Distillation-Zoo, gradients of gradients, noise, hypernetworks, bad input."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import golden
from torch import nn

import hyperfast
from hyperfast.losses import AttentionTransfer, JacobianDistillation


def golden_networks():
    values = golden()
    networks = []
    for side in ("s", "t"):
        network = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 10)).double()
        prefix = f"in.net_{side}."
        network.load_state_dict({k[len(prefix) :]: v for k, v in values.items() if k.startswith(prefix)})
        networks.append(network)
    return (*networks, values["in.x"], values["in.y"], values)


def convolutional(width=4, seed=0, norm=True, activation=nn.Softplus):
    """Two stages; smooth, so that finite differences have a meaning."""
    torch.manual_seed(seed)

    def stage(channels):
        layers = [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width) if norm else nn.Identity()]
        return nn.Sequential(*layers, activation())

    layers = {"layer1": stage(3), "layer2": stage(width), "pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten()}
    network = nn.Sequential()
    for name, layer in {**layers, "fc": nn.Linear(width, 5)}.items():
        network.add_module(name, layer)
    return network.double()


@pytest.fixture
def networks():
    return convolutional(4, 1), convolutional(6, 2).eval()


def batch(count=3):
    torch.manual_seed(7)
    return torch.randn(count, 3, 6, 6, dtype=torch.float64), torch.randint(5, (count,))


def gradients(loss, network):
    found = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
    return [g for g in found if g is not None]


# Values


def test_golden():
    student, teacher, x, y, values = golden_networks()
    step = JacobianDistillation()(student, teacher, x, y)
    torch.testing.assert_close(step.loss.detach(), values["jacobian_zoo.loss"], rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(step.loss, list(student.parameters()), allow_unused=True)
    for index, (gradient, parameter) in enumerate(zip(found, student.parameters(), strict=True)):
        expected = values.get(f"jacobian_zoo.grad{index}", torch.zeros_like(parameter))
        gradient = torch.zeros_like(parameter) if gradient is None else gradient  # the last bias moves no gradient
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_the_logits_are_those_of_the_images(networks):
    (student, teacher), (x, y) = networks, batch()
    expected = copy.deepcopy(student)(x), teacher(x)
    step = JacobianDistillation()(student, teacher, x, y)
    assert torch.equal(step.student_logits, expected[0]) and torch.equal(step.teacher_logits, expected[1])
    assert step.student_logits.requires_grad and not step.teacher_logits.requires_grad


def attention(network, image, stages):
    """Of one image behind so many stages."""
    features = image[None]
    for stage in list(network)[:stages]:
        features = stage(features)
    return features.square().sum(1).flatten()


def direction(network, image, stages, position):
    """Unit gradient of the attention at a position."""
    image = image.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(attention(network, image, stages)[position], image)
    return gradient / gradient.norm()


@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
def test_taps_are_compared_where_the_teacher_s_attention_is_largest(networks, reduction):
    (student, teacher), (x, _) = networks, batch()
    student.eval()  # one sample's gradient is its own
    loss = JacobianDistillation("stages", reduction=reduction)
    loss(student, teacher, x)
    for tap, name in enumerate(("layer1", "layer2")):
        expected = 0.0
        for image in x:
            largest = attention(teacher, image, tap + 1).argmax()
            s, t = (direction(network, image, tap + 1, largest) for network in networks)
            expected += (s - t).square().sum() / len(x)
        expected = expected / x[0].numel() if reduction == "mean" else expected
        torch.testing.assert_close(loss.last[tap], expected, rtol=1e-10, atol=0)
        assert loss.last_names[tap] == name


def test_without_labels_the_teacher_answers(networks):
    (student, teacher), (x, _) = networks, batch()
    loss, wanted = JacobianDistillation(), teacher(x).argmax(1)
    student.eval()
    assert torch.equal(loss(student, teacher, x).loss, loss(student, teacher, x, wanted).loss)
    assert not torch.equal(loss(student, teacher, x).loss, loss(student, teacher, x, (wanted + 1) % 5).loss)


def test_weights_and_beta(networks):
    (student, teacher), (x, _) = networks, batch()
    loss = JacobianDistillation("stages", weights={"layer1": 0.5, "layer2": 2.0}, beta=3.0)
    found = loss(student, teacher, x).loss
    torch.testing.assert_close(found.detach(), 3 * (loss.last * torch.tensor([0.5, 2.0])).sum())


# Gradients


@pytest.mark.parametrize("at", [None, "stages"])
@pytest.mark.parametrize("training", [False, True])
def test_gradient_of_every_parameter_agrees_with_finite_differences(networks, at, training):
    (student, teacher), (x, y) = networks, batch(2)
    student.train(training)
    names = [name for name, _ in student.named_parameters()]

    class With(nn.Module):
        def __init__(self, parameters):
            super().__init__()
            self.network, self.values = student, parameters

        def forward(self, images):
            return torch.func.functional_call(self.network, dict(zip(names, self.values, strict=True)), (images,))

    loss = JacobianDistillation(None if at is None else ["network.layer1", "network.layer2"], at, reduction="batchmean")

    def value(*parameters):
        return loss(With(parameters), teacher, x, y).loss

    parameters = tuple(p.detach().clone().requires_grad_() for p in student.parameters())
    assert torch.autograd.gradcheck(value, parameters, fast_mode=True)


@pytest.mark.parametrize("at", [None, "stages"])
def test_a_network_is_like_itself_and_any_multiple_of_it(networks, at):
    teacher, (x, y) = networks[1], batch()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.fc.weight.mul_(7)
        if at:
            student.layer2[1].weight.mul_(3), student.layer2[1].bias.mul_(3)
    loss = JacobianDistillation(["layer1"] if at else None)
    found = loss(student, teacher, x, y).loss
    assert found < 1e-25
    assert all(g.abs().max() < 1e-12 for g in gradients(found, student))


@pytest.mark.parametrize("at", [None, "stages"])
def test_networks_that_do_not_see_the_image(networks, at):
    """Their gradients are zero: the loss is finite and pulls nowhere."""
    (student, teacher), (x, y) = networks, batch()
    with torch.no_grad():
        student.layer1[0].weight.zero_()
    found = JacobianDistillation(at)(student.eval(), teacher, x, y).loss
    assert found.isfinite()
    assert all(g.isfinite().all() for g in gradients(found, student))


def test_the_teacher_and_the_images_get_no_gradient(networks):
    (student, teacher), (x, y) = networks, batch()
    x.requires_grad_()
    JacobianDistillation("stages")(student, teacher, x, y).loss.backward()
    assert x.grad is None and all(p.grad is None for p in teacher.parameters())
    frozen = hyperfast.surgery.freeze(teacher)
    assert JacobianDistillation()(student, frozen, x, y).loss.requires_grad


@pytest.mark.parametrize("at", [None, "stages"])
def test_evaluation_without_gradients_gives_the_same_number(networks, at):
    (student, teacher), (x, y) = networks, batch()
    student.eval()
    expected = JacobianDistillation(at)(student, teacher, x, y).loss
    with torch.no_grad():
        step = JacobianDistillation(at)(student, teacher, x, y)
    torch.testing.assert_close(step.loss, expected.detach(), rtol=1e-12, atol=0)
    assert not step.loss.requires_grad and not step.student_logits.requires_grad


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("at", [None, "stages"])
def test_a_hypernetwork_gets_the_gradient_of_its_weights(networks, at, backend):
    (network, teacher), (x, y) = networks, batch()
    student = hyperfast.hypernetize(network, hidden=(4, 8))
    plain = student.materialize()
    loss, every = JacobianDistillation(at, reduction="batchmean"), {"allow_unused": True, "materialize_grads": True}
    generating = {name: p for name, p in student.named_parameters() if not name.startswith("primary.")}
    with hyperfast.use_backend(backend):
        found = torch.autograd.grad(loss(student, teacher, x, y).loss, generating.values(), **every)
        named = dict(plain.named_parameters())
        of_weights = torch.autograd.grad(loss(plain, teacher, x, y).loss, named.values(), **every)
        weights = student.generate()
        total = sum((weights[name] * g).sum() for name, g in zip(named, of_weights, strict=True) if name in weights)
        expected = torch.autograd.grad(total, generating.values(), **every)
    for name, gradient, other in zip(generating, found, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-12, msg=name)
        assert gradient.any(), name


@pytest.mark.parametrize("options", [{}, {"at": "stages"}, {"noise": 0.1}, {"at": "stages", "noise": 0.1}], ids=str)
def test_a_student_learns(options):
    student, teacher = convolutional(4, 1, activation=nn.ReLU), convolutional(4, 2, activation=nn.ReLU).eval()
    x, y = batch(16)
    loss = JacobianDistillation(**options)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    history = []
    for _ in range(30):
        step = loss(student, teacher, x, y)
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
        history.append(step.loss.item())
    assert sum(history[-5:]) < 0.9 * sum(history[:5])


# Noise


def test_noise_is_the_squared_difference_of_the_jacobians_to_first_order():
    torch.manual_seed(0)
    student, teacher = nn.Linear(6, 4).double(), nn.Linear(6, 4).double()
    student.bias.data.copy_(teacher.bias)
    x, sigma = torch.zeros(50_000, 6, dtype=torch.float64), 1e-3
    found = JacobianDistillation(noise=sigma)(student, teacher, x).loss / sigma**2
    difference = (student.weight - teacher.weight).detach()
    torch.testing.assert_close(found.detach(), difference.square().sum() / 4, rtol=0.03, atol=0)
    gradient = torch.autograd.grad(found, student.weight)[0]
    torch.testing.assert_close(gradient, difference / 2, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("at", [None, "stages"])
def test_both_networks_see_the_same_noise(networks, at):
    (student, teacher), (x, _) = networks, batch()
    student.eval()
    loss = JacobianDistillation(at, noise=0.3, beta=2.0)
    torch.manual_seed(3)
    step = loss(student, teacher, x)
    torch.manual_seed(3)
    noisy = x + 0.3 * torch.randn_like(x)
    with hyperfast.taps(student, teacher) as taps:
        logits, teacher_logits = student(noisy), teacher(noisy)
    expected = (
        2 * F.mse_loss(logits, teacher_logits)
        if at is None
        else AttentionTransfer(beta=2.0)(taps.student, taps.teacher)
    )
    torch.testing.assert_close(step.loss, expected, rtol=1e-12, atol=0)
    assert torch.equal(step.student_logits, logits) and not step.teacher_logits.requires_grad


# Numerics


def test_under_autocast_the_comparison_is_float32():
    student, teacher = convolutional(4, 1).float(), convolutional(4, 2).float().eval()
    x, y = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step = JacobianDistillation("stages")(student, teacher, x.float(), y)
    assert step.loss.dtype == torch.float32 and step.student_logits.dtype == torch.bfloat16
    step.loss.backward()
    assert student.layer1[0].weight.grad.isfinite().all() and student.layer1[0].weight.grad.any()


def test_small_gradients_are_normalised_too(networks):
    """Those of an untrained network are about 1e-8."""
    (student, teacher), (x, y) = networks, batch()
    small = copy.deepcopy(student).float().eval()
    with torch.no_grad():
        small.fc.weight.mul_(1e-7)
    found = JacobianDistillation()(small, teacher.float(), x.float(), y).loss
    expected = JacobianDistillation()(student.float().eval(), teacher, x.float(), y).loss
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_an_empty_batch_is_zero(networks):
    (student, teacher), (x, y) = networks, batch()
    assert JacobianDistillation()(student.eval(), teacher, x[:0], y[:0]).loss == 0


# Bad input


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_active_dropout_says_what_to_do(networks, who):
    x, y = batch()
    networks = [nn.Sequential(network, nn.Dropout(0.5), nn.AlphaDropout(0.1)) for network in networks]
    for network in networks:
        network.eval()
    loss = JacobianDistillation()
    assert loss(*networks, x, y).loss.isfinite()
    changed = networks[who == "teacher"]
    changed.train()
    with pytest.raises(RuntimeError, match=rf"the {who} has active dropout \(1, 2\).*Call .eval\(\) on these modules"):
        loss(*networks, x, y)
    changed[1].p = changed[2].p = 0.0
    assert loss(*networks, x, y).loss.isfinite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": 0.0}, r"noise is 0.0; expected a positive standard deviation"),
        ({"reduction": "sum"}, "reduction is 'sum'; choose one of 'mean', 'batchmean'"),
        ({"teacher_at": "layer1"}, "teacher_at is 'layer1' but at is None"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        JacobianDistillation(**options)


@pytest.mark.parametrize("noise", [None, 0.1])
def test_networks_with_other_classes(networks, noise):
    x, _ = batch()
    student = nn.Sequential(networks[0], nn.Linear(5, 4).double())
    with pytest.raises(ValueError, match=r"the student returned \[3, 4\] and the teacher \[3, 5\]; .* or give at="):
        JacobianDistillation(noise=noise)(student, networks[1], x)


@pytest.mark.parametrize("change", [lambda y: y.int(), lambda y: y[1:], lambda y: F.one_hot(y)])
def test_bad_labels(networks, change):
    x, y = batch()
    with pytest.raises(ValueError, match=r"labels are torch.int.* expected torch.int64 \[3\], or None"):
        JacobianDistillation()(*networks, x, change(y))


@pytest.mark.parametrize(
    ("at", "teacher_at", "message"),
    [
        ("stages", "layer1", "2 student taps but 1 teacher taps"),
        ("layer1", "pool", r"tap 'layer1': student map \[3, 4, 6, 6\], teacher map \[3, 6, 1, 1\]; .* equal spatial"),
        ("flat", "flat", r"tap 'flat': student map \[3, 4\]"),
        ("layer9", None, "matches no module"),
    ],
)
def test_bad_taps(networks, at, teacher_at, message):
    x, _ = batch()
    with pytest.raises(ValueError, match=message):
        JacobianDistillation(at, teacher_at)(*networks, x)
