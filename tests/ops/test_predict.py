"""The contract of `hyperfast::predict` and `hyperfast::predict_squared_error`, on every backend."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_accurate, golden, on_threads
from predictors import assert_same, converted, gradients, network, plain, plain_error

from hyperfast import functional
from hyperfast.backends import use_backend
from hyperfast.ops import _native
from hyperfast.ops.predict import (
    forward_implementations,
    predict,
    predict_backward,
    predict_squared_error,
    squared_error_implementations,
)
from hyperfast.reference.predict import predict_slope

DISPATCHER = forward_implementations
ACTIVATIONS = ("relu", "leaky_relu", "hardswish", "gelu", "relu6", "elu")
NATIVE_ACTIVATIONS = ("relu", "leaky_relu")
WIDTHS = (1, 3, 17, 30, 140, 180, 300, 513)


def operation(arguments, targets, element_weights=None, rows=None, fusion="concat", activation="relu"):
    """The registered operation itself; the public function leaves it out on the reference backend."""
    rest = (targets, element_weights, rows, fusion, activation, "fp32", True)
    return predict_squared_error(*arguments, *rest)[0]


def skip_unless_native(backend, activation):
    if backend.value == "cpu" and activation not in NATIVE_ACTIVATIONS:
        pytest.skip(f"{activation} runs on the reference")


# Golden values of NeRN's own code


def nern_parameters(values, prefix):
    names = [*(f"layers.{i}" for i in range(4)), "final_linear_layer"]
    return [[values[f"{prefix}.{name}.{part}"].requires_grad_() for name in names] for part in ("weight", "bias")]


def embedding_of(indices, tables):
    return torch.cat([table[indices[:, j]] for j, table in enumerate(tables)], 1)


def test_golden_embeddings():
    values = golden("nern")
    indices = values["A_indices"]
    tables = [functional.positional_embedding(512, 0.76, 40)] * 3
    torch.testing.assert_close(embedding_of(indices, tables), values["A_embedding"], rtol=0, atol=1e-7)
    summed = sum(table[indices[:8, j]] for j, table in enumerate(tables))
    torch.testing.assert_close(summed, values["E_sum"], rtol=0, atol=1e-6)
    others = [functional.positional_embedding(512, 1.25, 20)] * 3
    torch.testing.assert_close(embedding_of(indices[:8], others), values["E_base1.25_L20"], rtol=0, atol=1e-4)
    fourier = functional.fourier_features(indices[:8], values["E_ffn_B"])
    torch.testing.assert_close(fourier, values["E_ffn"], rtol=0, atol=1e-4)


def test_golden_predictions(backend):
    values = golden("nern")
    tables = [functional.positional_embedding(512, 0.76, 40)] * 3
    arguments = (tables, values["A_indices"], *nern_parameters(values, "A_w"))
    found = functional.predict(*arguments).detach()
    torch.testing.assert_close(found, values["A_output"], rtol=0, atol=1e-6)
    torch.testing.assert_close(found.double(), values["A_output_f64ref"], rtol=0, atol=1e-6)


def test_golden_fourier_features_are_one_table(backend):
    values = golden("nern")
    weights, biases = nern_parameters(values, "A_w")
    rows = torch.arange(8)[:, None]
    found = functional.predict([values["E_ffn"]], rows, weights, biases)
    expected = plain(([values["E_ffn"]], rows, weights, biases))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def nern_network():
    """The three layers of B: predictor, targets padded to 3x3 and the weights that crop them."""
    values = golden("nern")
    layers = [values[f"B_target{i}"] for i in range(3)]
    grids = [torch.cartesian_prod(torch.tensor([i]), *map(torch.arange, t.shape[:2])) for i, t in enumerate(layers)]
    indices = torch.cat([grid.view(-1, 3) for grid in grids])
    tables = [functional.positional_embedding(n, 0.76, 40) for n in (3, 8, 8)]
    arguments = (tables, indices, *nern_parameters(values, "B_init"))
    padded = [F.pad(t, [(3 - t.shape[-1]) // 2] * 4) for t in layers]
    kept = [F.pad(torch.ones_like(t), [(3 - t.shape[-1]) // 2] * 4) for t in layers]
    targets, element_weights = (torch.cat([t.reshape(-1, 9) for t in group]) for group in (padded, kept))
    return values, arguments, targets, element_weights


def assert_nern_gradients(values, prefix, arguments, loss):
    for name, parameters in zip(("weight", "bias"), arguments[2:], strict=True):
        found = torch.autograd.grad(loss, parameters, retain_graph=True)
        expected = [values[f"{prefix}.layers.{i}.{name}"] for i in range(4)]
        expected.append(values[f"{prefix}.final_linear_layer.{name}"])
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * float(b.abs().max()) + 1e-9)


def test_golden_loss_and_gradients(backend):
    values, arguments, targets, element_weights = nern_network()
    predictions = functional.predict(*arguments).detach()
    full = torch.cat([values[f"B_pred_full_step1_{i}"].reshape(-1, 9) for i in range(3)])
    torch.testing.assert_close(predictions, full, rtol=0, atol=1e-6)
    cropped = torch.cat([values[f"B_pred_crop_step1_{i}"].flatten() for i in range(3)])
    torch.testing.assert_close(predictions[element_weights > 0], cropped, rtol=0, atol=1e-6)
    error = functional.squared_error(*arguments, targets, element_weights=element_weights)
    loss = (error / element_weights.sum()).sqrt()
    torch.testing.assert_close(loss.double(), values["B_loss_before_each_step"][0], rtol=1e-6, atol=0)
    assert_nern_gradients(values, "B_grad_step1", arguments, loss)


def test_golden_batch_of_repeated_rows(backend):
    values, arguments, targets, element_weights = nern_network()
    rows = values["B2_sampled_rows"]
    assert len(rows.unique()) < len(rows)
    count = element_weights.sum()
    with torch.no_grad():
        rmse = (functional.squared_error(*arguments, targets, element_weights=element_weights) / count).sqrt()
    torch.testing.assert_close(rmse.double(), values["B2_loss"], rtol=1e-6, atol=0)
    batch = functional.squared_error(*arguments, targets, element_weights=element_weights, rows=rows)
    # d sqrt(E / P) = dE / (2 P sqrt(E / P)), with E over all rows and its gradient over those of the batch.
    assert_nern_gradients(values, "B2_grad", arguments, batch / (2 * count * rmse))


# Values


@pytest.mark.parametrize("hidden", WIDTHS)
def test_accuracy(backend, hidden):
    # Tables as those of a small network: an error of one entry is that of all rows that read it.
    arguments, targets = network(hidden, layers=4, counts=(19, 32, 32), levels=10, rows=400, gain=2.0)
    targets, element_weights = targets.float().double(), torch.rand(400, 9).double()
    single = converted(arguments, torch.float32)
    exact = converted(single, torch.float64)
    rows = torch.randint(400, (300,))
    options = {"element_weights": element_weights.float(), "rows": rows}
    loss = functional.squared_error(*single, targets.float(), **options)
    eager = plain_error(single, targets.float(), element_weights.float(), rows)
    truth = plain_error(exact, targets, options["element_weights"].double(), rows)
    assert_as_accurate(loss, eager, truth.detach(), what="loss")
    assert_as_accurate(functional.predict(*single), plain(single), plain(exact).detach(), what="predictions")
    found = zip(gradients(loss, single), gradients(eager, single), gradients(truth, exact), strict=True)
    for i, (gradient, unfused, reference_gradient) in enumerate(found):
        assert_as_accurate(gradient, unfused, reference_gradient, what=f"gradient {i}")


@pytest.mark.parametrize("outputs", [1, 4, 9, 16, 25, 49])
@pytest.mark.parametrize("layers", [2, 3, 5])
def test_any_kernel_size_and_depth(backend, outputs, layers):
    arguments, targets = network(20, outputs, layers, rows=70)
    rows = torch.randint(70, (67,))
    torch.testing.assert_close(functional.predict(*arguments, rows=rows), plain(arguments, rows))
    found = gradients(functional.squared_error(*arguments, targets, rows=rows), arguments)
    assert_same(found, gradients(plain_error(arguments, targets, rows=rows), arguments))
    cotangent = torch.randn(67, outputs, dtype=torch.float64)
    found = gradients((functional.predict(*arguments, rows=rows) * cotangent).sum(), arguments)
    assert_same(found, gradients((plain(arguments, rows) * cotangent).sum(), arguments))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("fusion", ["concat", "sum"])
def test_activations_and_fusions(backend, activation, fusion):
    skip_unless_native(backend, activation)
    arguments, targets = network(fusion=fusion, gain=3.0)
    options = {"fusion": fusion, "activation": activation}
    torch.testing.assert_close(functional.predict(*arguments, **options), plain(arguments, **options))
    loss, expected = operation(arguments, targets, **options), plain_error(arguments, targets, **options)
    torch.testing.assert_close(loss, expected)
    assert_same(gradients(loss, arguments), gradients(expected, arguments))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slope_is_that_of_pytorch(activation):
    x = torch.cat((torch.linspace(-8, 8, 200, dtype=torch.float64), torch.tensor([0.0, 6.0, 200.0, -200.0])))
    x.requires_grad_()
    (expected,) = torch.autograd.grad(getattr(F, activation)(x).sum(), x)
    torch.testing.assert_close(predict_slope(x.detach(), activation), expected)


# Tables of more rows than are predicted are read row by row, smaller ones are multiplied once.
@pytest.mark.parametrize("counts", [(3, 5, 7), (100, 90, 80), (100, 3), (3, 100), (100,), (1,), (2, 2, 2, 2, 2)])
@pytest.mark.parametrize("fusion", ["concat", "sum"])
def test_factorised_and_unfactorised_tables(backend, counts, fusion):
    arguments, targets = network(counts=counts, rows=90, fusion=fusion)
    for rows in (None, torch.randint(90, (21,)), torch.tensor([5])):
        loss = operation(arguments, targets, rows=rows, fusion=fusion)
        expected = plain_error(arguments, targets, rows=rows, fusion=fusion)
        torch.testing.assert_close(loss, expected)
        assert_same(gradients(loss, arguments), gradients(expected, arguments))


def test_factorised_gradient_is_that_of_one_table(backend):
    (embeddings, indices, weights, biases), targets = network(140, levels=40, rows=600, dtype=torch.float32)
    whole = embedding_of(indices, embeddings)
    losses = [
        functional.squared_error(*network, weights, biases, targets)
        for network in ((embeddings, indices), ([whole], torch.arange(600)[:, None]))
    ]
    factorised, one = (torch.autograd.grad(loss, [*weights, *biases]) for loss in losses)
    for a, b in zip(factorised, one, strict=True):
        assert (a - b).norm() <= 3e-5 * b.norm()


# Over tiles of 64 rows and chunks of 512: whole, short, and several.
@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 511, 513, 1100])
def test_any_number_of_rows(backend, count):
    arguments, targets = network(8, rows=count, layers=3)
    torch.testing.assert_close(functional.predict(*arguments), plain(arguments))
    loss, expected = operation(arguments, targets), plain_error(arguments, targets)
    torch.testing.assert_close(loss, expected)
    assert_same(gradients(loss, arguments), gradients(expected, arguments))


@pytest.mark.parametrize("hidden", [17, 140])
def test_rows_are_those_of_the_grid(backend, hidden):
    arguments, _ = network(hidden, rows=700, counts=(3, 5, 7), dtype=torch.float32)
    rows = torch.randperm(700)[:300]
    torch.testing.assert_close(functional.predict(*arguments, rows=rows), functional.predict(*arguments)[rows])


def test_a_row_counts_as_often_as_it_is_named(backend):
    arguments, targets = network()
    once, thrice = (operation(arguments, targets, rows=torch.tensor(rows)) for rows in ([4], [4, 4, 4]))
    torch.testing.assert_close(3 * once, thrice)
    assert_same([3 * g for g in gradients(once, arguments)], gradients(thrice, arguments))


def test_a_weight_of_zero_leaves_an_element_out(backend):
    arguments, targets = network()
    kept = torch.zeros_like(targets)
    kept[:, 4] = 1
    loss = operation(arguments, targets, kept)
    found = gradients(loss, arguments)
    assert found[4][4].any() and not found[4][[0, 1, 2, 3, 5, 6, 7, 8]].any()
    torch.testing.assert_close(loss, (plain(arguments)[:, 4] - targets[:, 4]).square().sum())


@pytest.mark.parametrize("hidden", [16, 30, 140])
def test_bfloat16_products(backend, hidden):
    arguments, targets = network(hidden, rows=300, dtype=torch.float32, gain=1.5)
    exact = converted(arguments, torch.float64)
    truth = plain_error(exact, targets.double())
    loss = functional.squared_error(*arguments, targets, precision="bf16")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), truth, rtol=2e-2, atol=0)
    # The yardstick: the same products by PyTorch's own bfloat16.
    low = converted(arguments, torch.bfloat16)
    eager = plain_error(low, targets.bfloat16())
    found = zip(gradients(loss, arguments), gradients(eager, low), gradients(truth, exact), strict=True)
    for gradient, unfused, expected in found:
        assert gradient.dtype == torch.float32
        error, allowed = ((g.double() - expected).norm() for g in (gradient, unfused))
        assert error <= 2 * allowed
    single = functional.squared_error(*arguments, targets)
    assert not torch.equal(single, loss)


@pytest.mark.parametrize("hidden", [30, 140])
def test_bfloat16_on_the_processor_is_that_of_the_reference(hidden):
    arguments, targets = network(hidden, rows=300, dtype=torch.float32, gain=1.5)
    found = []
    for name in ("auto", "reference"):
        with use_backend(name):
            rest = (targets, None, None, "concat", "relu", "bf16", True)
            found.append(predict_squared_error(*arguments, *rest))
    (loss, flat), (expected_loss, expected) = found
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=0)
    assert (flat - expected).norm() <= 3e-3 * expected.norm()  # a rounding that falls the other way moves 2^-8


def test_float64_is_never_rounded(backend):
    arguments, targets = network()
    found = functional.squared_error(*arguments, targets, precision="bf16")
    torch.testing.assert_close(found, plain_error(arguments, targets), rtol=1e-12, atol=0)


# Properties


def test_bitwise_repeatable(backend):
    arguments, targets = network(140, rows=1500, dtype=torch.float32)
    results = [(loss := operation(arguments, targets), *gradients(loss, arguments)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif(_native.missing() is not None, reason="the native module was not built")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_results_do_not_depend_on_the_number_of_threads(precision):
    arguments, targets = network(70, rows=2000, dtype=torch.float32)
    results = []
    for threads in (1, 2, 3):
        with on_threads(threads), use_backend("cpu"):
            loss = functional.squared_error(*arguments, targets, precision=precision)
            predictions = functional.predict(*arguments, precision=precision).detach()
            results.append([predictions, loss, *gradients(loss, arguments)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# Gradients


@pytest.mark.parametrize("fusion", ["concat", "sum"])
def test_gradcheck(backend, fusion):
    (embeddings, indices, weights, biases), targets = network(4, 3, 3, (2, 12), 1, 8, fusion, gain=2.0)
    element_weights, rows = torch.rand_like(targets), torch.tensor([0, 3, 3, 7, 5])

    def run(*parameters):
        arguments = (embeddings, indices, list(parameters[:3]), list(parameters[3:]))
        predictions = functional.predict(*arguments, rows=rows, fusion=fusion)
        return predictions, operation(arguments, targets, element_weights, rows, fusion)

    assert torch.autograd.gradcheck(run, (*weights, *biases))


@pytest.mark.parametrize("activation", ["leaky_relu", "gelu"])
def test_second_derivatives(activation):
    (embeddings, indices, weights, biases), targets = network(3, 2, 3, (2, 3), 1, 6)
    element_weights, rows = torch.rand_like(targets), torch.tensor([0, 3, 3, 1])

    def run(*parameters):
        arguments = (embeddings, indices, list(parameters[:3]), list(parameters[3:]))
        predictions = functional.predict(*arguments, activation=activation, rows=rows)
        return predictions, operation(arguments, targets, element_weights, rows, activation=activation)

    assert torch.autograd.gradgradcheck(run, (*weights, *biases))


def test_only_parameters_get_gradients(backend):
    (embeddings, indices, weights, biases), targets = network()
    constants = [*[e.requires_grad_() for e in embeddings], targets.requires_grad_()]
    loss = functional.squared_error(embeddings, indices, weights, biases, targets)
    loss = loss + functional.predict(embeddings, indices, weights, biases).sum()
    assert torch.autograd.grad(loss, [*constants, weights[0]], allow_unused=True)[:-1] == (None,) * len(constants)


def test_gradients_are_computed_only_where_they_are_wanted():
    arguments, targets = network()
    with torch.no_grad():
        loss, flat = predict_squared_error(*arguments, targets, None, None, "concat", "relu", "fp32", False)
    assert flat.numel() == 0
    torch.testing.assert_close(functional.squared_error(*arguments, targets).detach(), loss)


def test_a_backward_without_gradients_is_a_clear_error():
    arguments, targets = network()
    loss, _ = predict_squared_error(*arguments, targets, None, None, "concat", "relu", "fp32", False)
    with pytest.raises(RuntimeError, match="called with gradients=False; call it with gradients=True"):
        loss.backward()


# PyTorch


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(backend, permuted, dtype):
    (embeddings, indices, weights, biases), targets = network(rows=70, dtype=dtype)
    if permuted:
        embeddings = [e.t().contiguous().t() for e in embeddings]
        indices, targets = indices.t().contiguous().t(), targets.t().contiguous().t()
        weights = [w.detach().t().contiguous().t().requires_grad_() for w in weights]
    rows = torch.arange(0, 70, 2)[3:]
    arguments, options = (embeddings, indices, weights, biases), (rows, "concat", "relu", "fp32")
    torch.library.opcheck(predict, (*arguments, *options))
    torch.library.opcheck(predict_squared_error, (*arguments, targets, targets.square(), *options, True))
    detached = (embeddings, indices, [w.detach() for w in weights], [b.detach() for b in biases])
    torch.library.opcheck(predict_backward, (torch.randn(32, 9, dtype=dtype), *detached, *options))
    torch.library.opcheck(predict_squared_error, (*detached, targets, None, *options, False))


def test_noncontiguous_inputs(backend):
    (embeddings, indices, weights, biases), targets = network(rows=140)
    doubled = [torch.cat((e, e), 1)[:, : e.shape[1]] for e in embeddings]
    parameters = [w.t().contiguous().t() for w in weights], [torch.stack((b, b), 1)[:, 0] for b in biases]
    strided = (doubled, indices[::2], *parameters)
    dense = (embeddings, indices[::2].contiguous(), weights, biases)
    rows = torch.arange(140)[::3][:20]
    loss = operation(strided, targets[::2], torch.ones(140, 18, dtype=torch.float64)[::2, ::2], rows)
    expected = plain_error(dense, targets[::2], rows=rows)
    torch.testing.assert_close(loss, expected)
    assert_same(gradients(loss, dense), gradients(expected, dense))
    cotangent = torch.randn(9, 70, dtype=torch.float64).t()
    found = gradients((functional.predict(*strided) * cotangent).sum(), dense)
    assert_same(found, gradients((plain(dense) * cotangent).sum(), dense))


def test_int32_indices(backend):
    (embeddings, indices, weights, biases), _ = network()
    found = functional.predict(embeddings, indices.int(), weights, biases)
    assert torch.equal(found, functional.predict(embeddings, indices, weights, biases))


def test_compiles_to_one_graph_with_dynamic_shapes(backend):
    torch.compiler.reset()

    def step(embeddings, indices, weights, biases, targets, rows):
        loss = functional.squared_error(embeddings, indices, weights, biases, targets, rows=rows)
        return loss + functional.predict(embeddings, indices, weights, biases, rows=rows).square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (40, 90):
        arguments, targets = network(rows=count)
        rows = torch.arange(0, count, 3)
        loss, expected = compiled(*arguments, targets, rows), step(*arguments, targets, rows)
        torch.testing.assert_close(loss, expected)
        assert_same(gradients(loss, arguments), gradients(expected, arguments))


def test_autocast(backend):
    arguments, targets = network(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        predictions = functional.predict(*arguments)
        loss = functional.squared_error(*arguments, targets)
    assert predictions.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(predictions, plain(arguments))
    assert_same(gradients(loss, arguments), gradients(plain_error(arguments, targets), arguments), 1e-4)


def test_meta(backend):
    (embeddings, indices, weights, biases), targets = network(dtype=torch.float32)
    parameters = [[p.detach().to("meta").requires_grad_() for p in group] for group in (weights, biases)]
    arguments = ([e.to("meta") for e in embeddings], indices.to("meta"), *parameters)
    loss = operation(arguments, targets.to("meta"))
    predictions = predict(*arguments, torch.empty(11, dtype=torch.int64, device="meta"), "concat", "relu", "fp32")
    assert (loss.shape, loss.dtype, predictions.shape, predictions.dtype) == ((), torch.float32, (11, 9), torch.float32)
    found = gradients(loss + predictions.sum(), arguments)
    assert [(g.shape, g.is_meta) for g in found] == [(p.shape, True) for p in (*arguments[2], *arguments[3])]


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_no_rows(name):
    arguments, targets = network()
    rows = torch.zeros(0, dtype=torch.int64)
    with use_backend(name):
        assert functional.predict(*arguments, rows=rows).shape == (0, 9)
        loss = operation(arguments, targets, rows=rows)
        assert loss == 0
        assert not any(g.any() for g in gradients(loss, arguments))


def test_nan_and_infinite_weights_show(backend):
    arguments, targets = network(140, dtype=torch.float32)
    with torch.no_grad():
        arguments[2][1][3, 5] = math.nan
    assert functional.squared_error(*arguments, targets).isnan()
    with torch.no_grad():
        arguments[2][1][3, 5] = 0
        arguments[3][0][7] = -math.inf  # ReLU makes it zero
    torch.testing.assert_close(functional.predict(*arguments), plain(arguments))


def test_both_dispatchers_offer_the_same_backends():
    names = [[i.backend for i in d.implementations] for d in (forward_implementations, squared_error_implementations)]
    assert names[0] == names[1]
