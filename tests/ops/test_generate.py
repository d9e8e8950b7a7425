"""The contract of `hyperfast::generate`, on every backend."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_accurate, golden

from hyperfast import functional
from hyperfast.backends import use_backend
from hyperfast.ops.generate import forward_implementations, generate, generate_backward

DISPATCHER = forward_implementations
ENCODINGS = ("cos|sin", "z|1-z", "none")
ACTIVATIONS = ("leaky_relu", "relu", "gelu", "tanh")
SLOPE = 0.01


def arguments(batch=2, segments=1, size=3, widths=(5, 7), rows=11, encoding="cos|sin", dtype=torch.float64):
    """The operation's tensors, wanting gradients, and offsets where there are several segments (one of them empty)."""

    def leaf(*shape):
        return torch.randn(*shape).to(dtype).requires_grad_()

    condition = torch.rand(batch, segments, size).to(dtype).requires_grad_()
    layers = list(itertools.pairwise([size * (1 if encoding == "none" else 2), *widths]))
    weights, biases = [leaf(out, into) for into, out in layers], [leaf(out) for _, out in layers]
    hidden = widths[-1] if widths else layers[-1][1] if layers else size * (1 if encoding == "none" else 2)
    offsets = None
    if segments > 1:
        offsets = torch.tensor([0, *sorted([0, *torch.randint(rows, (segments - 2,)).tolist()]), rows])
    return [condition, weights, biases, leaf(rows, hidden), leaf(rows), offsets]


def flat(args):
    condition, weights, biases, head, theta0, _ = args
    return [condition, *weights, *biases, head, theta0]


def rebuilt(args, tensors):
    layers = len(args[1])
    condition, *trunk, head, theta0 = tensors
    return [condition, trunk[:layers], trunk[layers:], head, theta0, args[5]]


def operation(args, encoding="cos|sin", activation="leaky_relu"):
    """The registered operation itself; the public function leaves it out on the reference backend."""
    return generate(*args, encoding, activation, SLOPE)


def plain(args, encoding="cos|sin", activation="leaky_relu"):
    """Layer by layer, segment by segment."""
    condition, weights, biases, head, theta0, offsets = args
    h = {
        "cos|sin": lambda z: torch.cat([torch.cos(math.pi / 2 * z), torch.sin(math.pi / 2 * z)], -1),
        "z|1-z": lambda z: torch.cat([z, 1 - z], -1),
        "none": lambda z: z,
    }[encoding](condition)
    for weight, bias in zip(weights, biases, strict=True):
        z = h @ weight.T + bias
        h = F.leaky_relu(z, SLOPE) if activation == "leaky_relu" else getattr(torch, activation, F.gelu)(z)
    bounds = [0, len(head)] if offsets is None else offsets.tolist()
    parts = [h[:, s] @ head[a:b].T + theta0[a:b] for s, (a, b) in enumerate(itertools.pairwise(bounds))]
    return torch.cat(parts, 1)


def with_gradients(function, args, *options):
    theta = function(args, *options)
    upstream = torch.linspace(-1, 1, theta.numel(), device=theta.device, dtype=theta.dtype).view(theta.shape)
    return theta.detach(), torch.autograd.grad(theta, flat(args), upstream)


def assert_equals_plain(args, *options):
    found, expected = with_gradients(operation, args, *options), with_gradients(plain, args, *options)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


# Values


def test_golden_hyperlight(backend):
    values = golden()
    state, gradient = "hl.state.backbone.", "hl.grad.backbone."
    names = [f"block{i}_lin" for i in range(3)]
    weights = [values[f"{state}{name}.weight"].requires_grad_() for name in names]
    biases = [values[f"{state}{name}.bias"].requires_grad_() for name in names]
    head, theta0 = (values[f"{state}output.{part}"].requires_grad_() for part in ("weight", "bias"))
    condition = torch.cat([values["hl.in.alpha"], values["hl.in.beta"]])
    theta = functional.generate(condition, weights, biases, head, theta0)
    order = ("0.weight", "0.bias", "1.weight", "3.weight", "3.bias")
    expected = torch.cat([values[f"hl.out.{name}"].flatten() for name in order])
    torch.testing.assert_close(theta.detach(), expected, rtol=1e-6, atol=1e-6)
    theta.square().sum().backward()
    names = [*names, "output"]
    for name, weight, bias in zip(names, [*weights, head], [*biases, theta0], strict=True):
        for found, key in ((weight.grad, f"{name}.weight"), (bias.grad, f"{name}.bias")):
            wanted = values[gradient + key]  # float32 themselves: 1e-6 of the largest element
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6 * wanted.abs().max().item())


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("segments", [1, 4])
def test_equals_plain_autograd(backend, encoding, activation, segments):
    assert_equals_plain(arguments(segments=segments, encoding=encoding), encoding, activation)


@pytest.mark.parametrize("widths", [(), (1,), (16, 64, 128)])
@pytest.mark.parametrize("batch", [1, 3])
def test_trunks_and_batches(backend, widths, batch):
    assert_equals_plain(arguments(batch, widths=widths, rows=1000))


@pytest.mark.parametrize("segments", [1, 5])
def test_accuracy(backend, segments):
    args = arguments(2, segments, widths=(16, 64, 128), rows=5000, dtype=torch.float32)
    theta, gradients = with_gradients(operation, args)
    eager, eager_gradients = with_gradients(plain, args)
    doubles = rebuilt(args, [tensor.detach().double().requires_grad_() for tensor in flat(args)])
    exact, exact_gradients = with_gradients(plain, doubles)
    assert_as_accurate(theta, eager, exact, what="theta")
    for i, gradient in enumerate(gradients):
        assert gradient.dtype == torch.float32
        assert_as_accurate(gradient, eager_gradients[i], exact_gradients[i], what=f"gradient {i}")


def test_public_function_takes_one_condition_or_a_batch(backend):
    args = arguments(3)
    theta = operation(args)
    condition, *rest, _ = args
    torch.testing.assert_close(functional.generate(condition[:, 0], *rest), theta)
    torch.testing.assert_close(functional.generate(condition[1, 0], *rest), theta[1])


def test_public_function_takes_a_row_per_segment(backend):
    args = arguments(3, segments=4)
    theta = operation(args)
    condition, *rest, offsets = args
    torch.testing.assert_close(functional.generate(condition, *rest, offsets=offsets), theta)
    torch.testing.assert_close(functional.generate(condition[2], *rest, offsets=offsets), theta[2])


# Magnitude invariance


@pytest.mark.parametrize("size", [1, 3])
def test_the_norm_of_the_encoding_does_not_depend_on_the_condition(backend, size):
    conditions = torch.cat([torch.rand(50, size), torch.zeros(1, size), torch.ones(1, size)]).double()
    identity, zeros = torch.eye(2 * size).double(), torch.zeros(2 * size).double()
    encoded = functional.generate(conditions, [], [], identity, zeros)
    torch.testing.assert_close(
        encoded.norm(dim=1), torch.full((52,), size**0.5, dtype=torch.float64), rtol=1e-14, atol=0
    )


def test_the_variance_of_the_weights_does_not_depend_on_the_condition(backend):
    conditions = torch.linspace(0.1, 1, 7)[:, None]

    def variances(encoding):
        width = 1 if encoding == "none" else 2
        thetas = []
        for _ in range(100):
            sizes = itertools.pairwise([width, 64, 64])
            weights = [torch.randn(out, into) * (2 / out) ** 0.5 for into, out in sizes]
            biases, head = [torch.zeros(64), torch.zeros(64)], torch.randn(500, 64)
            thetas.append(functional.generate(conditions, weights, biases, head, torch.zeros(500), encoding=encoding))
        return torch.stack(thetas).var(dim=(0, 2))

    constant, growing = variances("cos|sin"), variances("none")
    assert constant.max() / constant.min() < 1.15
    assert growing.max() / growing.min() > 50


# Gradients


@pytest.mark.parametrize("activation", ["gelu", "tanh", "leaky_relu"])
@pytest.mark.parametrize("segments", [1, 3])
def test_gradcheck(backend, activation, segments):
    args = arguments(segments=segments, size=2, widths=(3,), rows=6)
    assert torch.autograd.gradcheck(
        lambda *tensors: operation(rebuilt(args, tensors), "cos|sin", activation), flat(args)
    )


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("segments", [1, 3])
def test_gradgradcheck(backend, encoding, segments):
    args = arguments(segments=segments, size=2, widths=(3,), rows=4, encoding=encoding)
    assert torch.autograd.gradgradcheck(
        lambda *tensors: operation(rebuilt(args, tensors), encoding, "gelu"), flat(args)
    )


def test_bitwise_repeatable(backend):
    args = arguments(widths=(16, 64), rows=30_000, dtype=torch.float32)
    first, second = with_gradients(operation, args), with_gradients(operation, args)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


# PyTorch


def transposed(args):
    """The same values in other memory."""
    return rebuilt(args, [tensor.detach().mT.contiguous().mT.requires_grad_() if tensor.ndim > 1 else tensor
                          for tensor in flat(args)])  # fmt: skip


def test_noncontiguous_parameters(backend):
    args = transposed(arguments(segments=4))
    assert not args[3].is_contiguous()
    assert_equals_plain(args)


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("layout", [lambda args: args, transposed], ids=["contiguous", "permuted"])
def test_opcheck(backend, segments, layout):
    args = layout(arguments(segments=segments, dtype=torch.float32))
    torch.library.opcheck(generate, (*args, "cos|sin", "gelu", SLOPE))
    condition, weights, biases, head, _, offsets = args
    inputs = (condition, weights, biases, head, offsets, "cos|sin", "gelu", SLOPE)
    for head_gradient in (True, False):
        torch.library.opcheck(generate_backward, (torch.randn(2, 11), *inputs, head_gradient))


@pytest.mark.parametrize("segments", [1, 3])
def test_a_head_that_wants_no_gradient_gets_none(backend, segments):
    args = arguments(segments=segments)
    others = [tensor for tensor in flat(args) if tensor is not args[3]]
    frozen = [*args[:3], args[3].detach(), *args[4:]]
    theta = operation(frozen)
    grad = torch.randn_like(theta)
    found = torch.autograd.grad(theta, others, grad)
    assert all(map(torch.equal, found, torch.autograd.grad(operation(args), others, grad)))


def test_compiles_to_one_graph_with_dynamic_shapes(backend):
    torch.compiler.reset()
    compiled = torch.compile(functional.generate, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, rows in ((2, 11), (5, 23)):
        args = arguments(batch, rows=rows)
        found = with_gradients(lambda args: compiled(args[0][:, 0], *args[1:5]), args)
        torch.testing.assert_close(found, with_gradients(plain, args), rtol=1e-10, atol=1e-12)


def test_autocast_leaves_float32_alone(backend):
    args = arguments(dtype=torch.float32)
    expected = with_gradients(operation, args)

    def under_autocast(args):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return functional.generate(args[0][:, 0], *args[1:5])

    theta, gradients = with_gradients(under_autocast, args)
    assert {tensor.dtype for tensor in (theta, *gradients)} == {torch.float32}
    torch.testing.assert_close((theta, gradients), expected)


def test_meta(backend):
    args = arguments(segments=3)
    offsets = args[5].to("meta")
    args = [*rebuilt(args, [t.detach().to("meta").requires_grad_() for t in flat(args)])[:5], offsets]
    theta, gradients = with_gradients(operation, args)
    assert theta.is_meta
    assert theta.shape == (2, 11)
    assert [g.shape for g in gradients] == [t.shape for t in flat(args)]


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_empty_batch(name):
    with use_backend(name):
        args = arguments(batch=0)
        theta, gradients = with_gradients(operation, args)
    assert theta.shape == (0, 11)
    assert not any(gradient.any() for gradient in gradients)


# Bad input


def bad(**changes):
    condition, weights, biases, head, theta0, _ = arguments(dtype=torch.float32)
    given = {"condition": condition[:, 0], "trunk_weights": weights, "trunk_biases": biases, "head_weight": head,
             "theta0": theta0}  # fmt: skip
    return functional.generate(**(given | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"condition": torch.rand(2, 4)}, r"trunk layer 0 has weight \[5, 6\].*expected \[H, 8\].*condition width 4"),
        ({"condition": torch.zeros(2, 3).long()}, "condition is torch.int64; expected a floating point"),
        ({"condition": torch.rand(2, 3, 4, 3)}, r"expected \[D\] or \[B, D\]"),
        ({"condition": torch.rand(2, 3, device="meta")}, "one device; got condition on meta"),
        ({"trunk_biases": []}, "2 trunk_weights but 0 trunk_biases"),
        ({"head_weight": torch.randn(11, 8)}, r"head_weight is \[11, 8\]; expected \[P, 7\]"),
        ({"theta0": torch.randn(10)}, r"theta0 is \[10\]; expected \[11\]"),
        ({"theta0": torch.randn(11).double()}, "theta0 is torch.float64 but head_weight is torch.float32"),
        ({"encoding": "sin"}, "encoding is 'sin'; choose one of"),
        ({"activation": "swish"}, "activation is 'swish'; choose one of"),
        ({"offsets": torch.tensor([0.0, 11.0])}, r"expected int64 \[S \+ 1\]"),
        ({"offsets": torch.tensor([0, 4, 8, 11])}, r"expected \[3, D\] or \[B, 3, D\]"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        bad(**changes)
