"""What `functional.predict` and `functional.squared_error` refuse; their values are tested in tests/ops."""

import pytest
import torch
from predictors import network

from hyperfast import functional


def changed(position, value):
    def change(arguments):
        arguments[position] = value(arguments[position]) if callable(value) else value
        return arguments

    return change


def with_item(position, item, value):
    def change(arguments):
        arguments[position] = list(arguments[position])
        arguments[position][item] = value(arguments[position][item])
        return arguments

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(0, []), "no embeddings were given"),
        (with_item(0, 1, lambda e: e[:0]), r"embeddings\[1\] is \[0, 6\]; expected \[n, E\]"),
        (changed(1, lambda i: i[:, :2]), r"indices is torch.int64 \[50, 2\]; expected int32 or int64 \[N, 3\]"),
        (changed(1, lambda i: i.float()), "indices is torch.float32"),
        (changed(1, lambda i: i[:0]), "indices has no rows; there is nothing to predict"),
        (changed(3, lambda b: b[:2]), "5 weights but 2 biases"),
        (lambda a: [a[0], a[1], a[2][:1], a[3][:1], a[4]], "1 layers; a predictor has at least two"),
        (with_item(2, 0, lambda w: w[:, :6]), r"layer 0 has weight \[17, 6\] .* expected \[17, 18\] and \[17\]"),
        (with_item(2, 0, lambda w: w[:0]), r"layer 0 has weight \[0, 18\] and bias \[17\]; .* at least one output"),
        (with_item(2, 2, lambda w: w[:5]), r"layer 2 has weight \[5, 17\] .* expected \[17, 17\]"),
        (with_item(2, 4, lambda w: w[:0]), r"layer 4 has weight \[0, 17\] .* expected \[K, 17\] and \[K\]"),
        (with_item(2, 1, lambda w: w[0]), r"layer 1 has weight \[17\]"),
        (with_item(3, 4, lambda b: b[:3]), r"layer 4 has weight \[9, 17\] and bias \[3\]"),
        (with_item(2, 0, lambda w: w.bfloat16()), "weights are torch.bfloat16; keep them float32 .* precision='bf16'"),
        (with_item(3, 1, lambda b: b.double()), r"biases\[1\] is torch.float64 but weights\[0\] is torch.float32"),
        (with_item(0, 2, lambda e: e.double()), r"embeddings\[2\] is torch.float64 but weights\[0\] is torch.float32"),
        (with_item(0, 0, lambda e: e.to("meta")), r"indices on cpu, embeddings\[0\] on meta"),
        (changed(4, lambda t: t[:, :3]), r"targets is torch.float32 \[50, 3\]; expected torch.float32 \[50, 9\]"),
        (changed(4, lambda t: t.double()), "targets is torch.float64"),
        (changed(4, lambda t: t.to("meta")), "indices on cpu, targets on meta"),
    ],
)
def test_bad_tensors(change, message):
    arguments, targets = network(dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        functional.squared_error(*change([*arguments, targets]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fusion": "product"}, "fusion is 'product'; choose one of 'concat', 'sum'"),
        ({"activation": "tanh"}, "activation is 'tanh'; choose one of 'relu', 'leaky_relu', 'hardswish', 'gelu'"),
        ({"precision": "fp16"}, "precision is 'fp16'; choose one of 'fp32', 'tf32', 'bf16'"),
        ({"rows": torch.ones(3)}, r"rows is torch.float32 \[3\]; expected int64 \[R\]"),
        ({"rows": torch.ones(3, 1, dtype=torch.int64)}, r"rows is torch.int64 \[3, 1\]"),
        ({"element_weights": torch.ones(50)}, r"element_weights is torch.float32 \[50\]"),
        ({"fusion": "sum"}, r"layer 0 has weight \[17, 18\] and bias \[17\]; expected \[17, 6\]"),
    ],
)
def test_bad_options(options, message):
    arguments, targets = network(dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        functional.squared_error(*arguments, targets, **options)


def test_embeddings_of_unequal_width_cannot_be_added():
    (embeddings, indices, weights, biases), _ = network()
    with pytest.raises(ValueError, match=r"embeddings have \[6, 6, 2\] columns; fusion 'sum' adds them"):
        functional.predict([*embeddings[:2], embeddings[2][:, :2]], indices, weights, biases, fusion="sum")
