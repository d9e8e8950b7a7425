"""The contract of `hyperfast::ranger_update`, on every backend."""

import math

import pytest
import torch
from helpers import assert_as_accurate, on_threads

from hyperfast import functional
from hyperfast.backends import explain, use_backend
from hyperfast.ops.ranger_update import implementations, ranger_update

DISPATCHER = implementations
# Ranks 0 to 4; rows shorter and longer than one visit of a lane group; sizes that fill no vector; one piece too much.
SHAPES = [(), (1,), (7,), (2049,), (5, 3), (9, 140), (3, 1), (2, 300), (1, 5000), (4, 3, 3, 3), (20, 2)]
OPTIONS = {"lr": 5e-3, "betas": (0.5, 0.999), "eps": 1e-5, "weight_decay": 1e-3, "k": 3, "alpha": 0.5}


def problem(shapes=SHAPES, dtype=torch.float64, steps=8):
    """Parameters, and gradients of as many steps, of very different sizes."""
    parameters = [torch.randn(shape).to(dtype) for shape in shapes]
    return parameters, [[(10.0 ** -(2 + i % 3) * torch.randn(s)).to(dtype) for s in shapes] for i in range(steps)]


def plain(parameters, gradients, lr, betas, eps, weight_decay, k, alpha, centralize=True):
    """As NeRN writes it: tensor by tensor, with the step in Python."""
    results = []
    for index, parameter in enumerate(parameters):
        p = parameter.clone()
        slow, m, v = p.clone(), torch.zeros_like(p), torch.zeros_like(p)
        for t, gradient in enumerate((g[index] for g in gradients), start=1):
            if centralize and gradient.ndim > 1:
                gradient = gradient - gradient.mean(dim=tuple(range(1, gradient.ndim)), keepdim=True)
            v.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
            m.mul_(betas[0]).add_(gradient, alpha=1 - betas[0])
            power, most = betas[1] ** t, 2 / (1 - betas[1]) - 1
            rho = most - 2 * t * power / (1 - power)
            p.add_(p, alpha=-lr * weight_decay)
            step_size = lr / (1 - betas[0] ** t)
            if rho > 5:
                root = (1 - power) * (rho - 4) / (most - 4) * (rho - 2) / rho * most / (most - 2)
                p.addcdiv_(m, v.sqrt().add_(eps), value=-step_size * math.sqrt(root))
            else:
                p.add_(m, alpha=-step_size)
            if t % k == 0:
                slow.add_(p - slow, alpha=alpha)
                p.copy_(slow)
        results.append(p)
    return results


def state_of(parameters):
    dtype = torch.float64 if parameters[0].dtype == torch.float64 else torch.float32
    zeros = [[torch.zeros_like(p, dtype=dtype) for p in parameters] for _ in range(2)]
    slow = [torch.empty_like(p, dtype=dtype).copy_(p) for p in parameters]
    return [*zeros, slow, [torch.zeros((), device=p.device) for p in parameters]]


def fused(parameters, gradients, function=functional.ranger_update, **options):
    parameters = [p.clone() for p in parameters]
    state = state_of(parameters)
    for g in gradients:
        function(parameters, g, *state, **(OPTIONS | options))
    assert all(step == len(gradients) for step in state[-1])
    return parameters


# Values


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"centralize": False},
        {"betas": (0.95, 0.99), "eps": 1e-8, "weight_decay": 0.1},
        {"betas": (0.0, 0.0)},  # the variance is never trusted
        {"k": 1, "alpha": 1.0},
        {"lr": torch.tensor(0.02)},
    ],
    ids=str,
)
def test_equals_the_formula(backend, options):
    parameters, gradients = problem()
    found = fused(parameters, gradients, **options)
    numbers = {**OPTIONS, **options}
    expected = plain(parameters, gradients, **{**numbers, "lr": float(numbers["lr"])})
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_rectification_begins_with_the_sixth_step(backend):
    """A sign of the gradient's size: before, the step is proportional to it, after, hardly so."""
    moved = {}
    for steps in (5, 6):
        for scale in (1, 10):
            gradients = [[torch.full((4,), float(scale))]] * steps
            before = fused([torch.zeros(4)], gradients[:-1], weight_decay=0, k=100)[0]
            moved[steps, scale] = float((fused([torch.zeros(4)], gradients, weight_decay=0, k=100)[0] - before)[0])
    assert moved[5, 10] == pytest.approx(10 * moved[5, 1])
    assert moved[6, 10] == pytest.approx(moved[6, 1], rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accuracy(backend, dtype):
    parameters, gradients = problem([(9, 140), (2049,), (3, 300)], dtype)
    found = fused(parameters, gradients)
    eager = plain(parameters, gradients, **OPTIONS)
    exact = plain([p.double() for p in parameters], [[g.double() for g in step] for step in gradients], **OPTIONS)
    for index, parameter in enumerate(found):
        assert parameter.dtype == dtype
        assert_as_accurate(parameter, eager[index], exact[index], what=f"parameter {index}")


def test_more_tensors_than_one_launch_takes(backend):
    parameters, gradients = problem([(1 + i % 5, 3) for i in range(150)])
    torch.testing.assert_close(fused(parameters, gradients), plain(parameters, gradients, **OPTIONS))


def test_tensors_at_different_steps(backend):
    parameters, gradients = problem([(5, 3), (5, 3)])
    together = [p.clone() for p in parameters]
    state = state_of(together)
    for t, g in enumerate(gradients):
        first = slice(0, 1 if t < 2 else 2)  # the second joins two steps late
        lists = [tensors[first] for tensors in (together, g, *state)]
        functional.ranger_update(*lists, **OPTIONS)
    torch.testing.assert_close(together[:1], plain(parameters, gradients, **OPTIONS)[:1])
    torch.testing.assert_close(together[1:], plain(parameters, gradients[2:], **OPTIONS)[1:])


def test_no_learning_rate_moves_nothing(backend):
    parameters, gradients = problem()
    assert all(torch.equal(a, b) for a, b in zip(fused(parameters, gradients, lr=0.0), parameters, strict=True))


def test_empty_tensors(backend):
    parameters, gradients = problem([(0,), (3, 0), (0, 3), (2, 2)])
    found = fused(parameters, gradients)
    assert [p.shape for p in found] == [p.shape for p in parameters]
    torch.testing.assert_close(found, plain(parameters, gradients, **OPTIONS))
    fused(parameters[:1], [g[:1] for g in gradients])


def test_nothing_to_do():
    functional.ranger_update([], [], [], [], [], [], lr=0.1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_gradient_shows_in_its_row_and_nowhere_else(backend, value):
    parameters, gradients = problem([(5, 3), (4,)], torch.float32)
    gradients[6][0][1, 2] = value
    gradients[6][1][3] = value
    matrix, vector = fused(parameters, gradients)
    assert matrix.isnan().any(1).tolist() == [False, True, False, False, False]
    assert matrix[1].isnan().all()
    assert vector.isnan().tolist() == [False, False, False, True]


# Repeatability


def test_bitwise_repeatable_on_any_number_of_threads(backend):
    parameters, gradients = problem([(300, 140), (70_001,), (3, 20_011)], torch.float32, steps=7)
    results = []
    for threads in (1, 2, 3, 3):
        with on_threads(threads):
            results.append(fused(parameters, gradients))
    if backend.value == "reference":  # torch's own sums depend on it
        results = results[2:]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# Layouts


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def offset(x):
    """One element away from an aligned address."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


LAYOUTS = {"channels_last": channels_last, "offset": offset, "transposed": lambda x: x.mT.contiguous().mT}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gradient_layout", ["as the parameter", "contiguous", "expanded"])
def test_layouts(layout, gradient_layout):
    lay = LAYOUTS[layout]
    parameters, gradients = problem([(6, 5, 3, 4)])
    if gradient_layout == "expanded":
        gradients = [[g[:, :, :1, :1].expand_as(g) for g in step] for step in gradients]
    laid = [lay(p) for p in parameters]
    strides = [p.stride() for p in laid]
    state = state_of(laid)
    for step in gradients:
        given = [lay(g) if gradient_layout == "as the parameter" else g for g in step]
        functional.ranger_update(laid, given, *state, **OPTIONS)
    torch.testing.assert_close(laid, plain(parameters, gradients, **OPTIONS))
    assert [p.stride() for p in laid] == strides


def test_rows_in_pieces_and_a_state_of_another_layout_go_to_the_reference():
    def chosen(parameter, slow):
        arguments = ([parameter], [parameter.clone()], *state_of([parameter]))
        arguments[4][0] = slow
        return str(explain(functional.ranger_update, *arguments, **OPTIONS))

    transposed, plain_matrix = torch.randn(3, 4).t(), torch.randn(4, 3)
    assert "its rows are not blocks of memory" in chosen(transposed, transposed.clone())
    assert "state of parameter 0 is not laid out" in chosen(plain_matrix, transposed.clone())


def test_mixed_dtypes_go_to_the_reference():
    parameters = [torch.randn(3), torch.randn(3).bfloat16()]
    gradients = [[torch.randn_like(p) for p in parameters] for _ in range(7)]
    with use_backend("reference"):
        expected = fused(parameters, gradients)
    torch.testing.assert_close(fused(parameters, gradients), expected, rtol=0, atol=0)


# PyTorch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lay", [lambda x: x, lambda x: x.mT.contiguous().mT], ids=["contiguous", "transposed"])
def test_opcheck(dtype, lay):
    parameters, (gradients,) = problem([(5, 3), (4, 3, 3, 3)], dtype, steps=1)
    parameters, gradients = [lay(p) for p in parameters], [lay(g) for g in gradients]
    lr = torch.tensor(0.1, dtype=torch.float64)
    arguments = (parameters, gradients, *state_of(parameters), lr, 0.5, 0.999, 1e-5, 1e-3, 6, 0.5, True)
    torch.library.opcheck(ranger_update, arguments)


def test_compiles_to_one_graph(backend):
    torch.compiler.reset()
    compiled = torch.compile(functional.ranger_update, fullgraph=True, backend="aot_eager")
    parameters, gradients = problem([(5, 3), (7,), (4, 3, 3, 3)])
    found = fused(parameters, gradients, compiled, lr=torch.tensor(5e-3, dtype=torch.float64))
    torch.testing.assert_close(found, plain(parameters, gradients, **OPTIONS), rtol=1e-12, atol=1e-14)


def test_compiles_with_dynamic_shapes(backend):
    torch.compiler.reset()
    compiled = torch.compile(functional.ranger_update, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 6):
        parameters, gradients = problem([(rows, 4), (rows,)])
        torch.testing.assert_close(fused(parameters, gradients, compiled), plain(parameters, gradients, **OPTIONS))


def test_meta(backend):
    parameters, gradients = problem(steps=1)
    parameters, gradients = ([t.to("meta") for t in tensors] for tensors in (parameters, gradients[0]))
    assert functional.ranger_update(parameters, gradients, *state_of(parameters), **OPTIONS) is None


def test_a_backward_pass_that_needs_the_old_values_is_an_error(backend):
    p = torch.randn(3, requires_grad=True)
    loss = p.square().sum()
    functional.ranger_update([p], [torch.ones(3)], *state_of([p]), **OPTIONS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_runs_under_autocast_and_in_inference_mode(backend):
    parameters, gradients = problem([(5, 3)], torch.float32)
    expected = fused(parameters, gradients)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(fused(parameters, gradients), expected, rtol=0, atol=0)
    with torch.inference_mode():
        torch.testing.assert_close(fused(parameters, gradients), expected, rtol=0, atol=0)


# Bad input


@pytest.mark.parametrize(
    ("position", "change", "message"),
    [
        (0, lambda p: p.int(), "parameter 0 is torch.int32 on cpu; expected float16, bfloat16, float32 or float64"),
        (1, lambda g: g[:2], r"parameter 0 is torch.float32 \[3, 2\] .*gradient torch.strided torch.float32 \[2, 2\]"),
        (1, lambda g: g.double(), r"\(gradient torch.float32,.*got gradient torch.strided torch.float64"),
        (1, lambda g: g.to_sparse(), "expected dense tensors .*got gradient torch.sparse_coo"),
        (2, lambda m: m.bfloat16(), "exp_avg torch.float32,.*exp_avg torch.strided torch.bfloat16"),
        (3, lambda v: v.to("meta"), r"exp_avg_sq torch.strided torch.float32 \[3, 2\] on meta"),
        (4, lambda s: s[0], r"slow torch.strided torch.float32 \[2\]"),
        (5, lambda t: t.long(), "a float32 scalar step, got .*step torch.strided torch.int64"),
        (5, lambda t: t[None], r"step torch.strided torch.float32 \[1\]"),
    ],
)
def test_tensors_that_do_not_fit(position, change, message):
    parameters, (gradients,) = problem([(3, 2)], torch.float32, steps=1)
    lists = [parameters, gradients, *state_of(parameters)]
    lists[position] = [change(lists[position][0])]
    with pytest.raises(ValueError, match=message):
        functional.ranger_update(*lists, **OPTIONS)


def test_lists_of_unequal_lengths():
    parameters, (gradients,) = problem([(3,), (4,)], steps=1)
    with pytest.raises(ValueError, match="1 gradients for 2 parameters; give one for each"):
        functional.ranger_update(parameters, gradients[:1], *state_of(parameters), **OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (0.5, 1.0)}, r"betas is \(0.5, 1.0\); expected two numbers in \[0, 1\)"),
        ({"betas": (0.5,)}, r"betas is \(0.5,\)"),
        ({"eps": -1.0}, "eps is -1.0; expected a number of at least 0"),
        ({"weight_decay": math.nan}, "weight_decay is nan; expected a number of at least 0"),
        ({"k": 0}, "k is 0; expected at least 1 step"),
        ({"alpha": 0.0}, r"alpha is 0.0; expected a number in \(0, 1\]"),
        ({"lr": torch.ones(2)}, r"lr is a tensor \[2\] on cpu; expected a scalar on cpu or the CPU"),
        ({"lr": torch.ones((), device="meta")}, r"lr is a tensor \[\] on meta"),
    ],
)
def test_bad_options(options, message):
    parameters, (gradients,) = problem([(3,)], steps=1)
    with pytest.raises(ValueError, match=message):
        functional.ranger_update(parameters, gradients, *state_of(parameters), **(OPTIONS | options))
