"""What the CPU kernels of `predict` say, refuse and leave to the reference; their values are in test_predict.py."""

import pytest
import torch
from predictors import network, plain_error

import hyperfast
from hyperfast import functional
from hyperfast.backends import use_backend
from hyperfast.ops import _native

pytestmark = pytest.mark.skipif(_native.missing() is not None, reason="the native module was not built")


def test_explain_names_the_processors_bfloat16():
    arguments, targets = network(dtype=torch.float32)
    said = str(hyperfast.explain(lambda: functional.squared_error(*arguments, targets, precision="bf16")))
    assert said.startswith("predict_squared_error: cpu")
    has_products = _native.module().instruction_set() == "avx512bf16"
    assert ("the processor multiplies no bfloat16" in said) is not has_products


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"activation": "gelu"}, "activation 'gelu'; the CPU kernels have 'relu', 'leaky_relu'"),
        ({"rows": torch.zeros(0, dtype=torch.int64)}, "there are no rows to predict"),
        ({"layers": 17}, "17 layers; the CPU kernels take up to 16"),
        ({"counts": (2,) * 9}, "9 embeddings; the CPU kernels take up to 8"),
    ],
)
def test_what_the_processors_kernels_leave_to_the_reference(change, reason):
    options = {name: change.pop(name) for name in ("activation", "rows") if name in (change := dict(change))}
    arguments, targets = network(**change)
    loss = functional.squared_error(*arguments, targets, **options)
    torch.testing.assert_close(loss, plain_error(arguments, targets, **options))
    with use_backend("cpu"), pytest.raises(hyperfast.BackendUnavailable, match=reason):
        functional.squared_error(*arguments, targets, **options)


@pytest.mark.parametrize(("row", "index"), [(0, 3), (49, -1), (20, 2**40)])
def test_an_index_outside_its_table(row, index):
    (embeddings, indices, weights, biases), targets = network()
    indices[row, 0] = index
    with use_backend("cpu"), pytest.raises(IndexError, match="an index of predict is outside its embedding table"):
        functional.squared_error(embeddings, indices, weights, biases, targets)
    rows = torch.tensor([1, 50])
    with use_backend("cpu"), pytest.raises(IndexError, match="or a row outside indices"):
        functional.predict(embeddings, indices, weights, biases, rows=rows)
