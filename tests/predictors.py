"""Small predictors for the tests of `predict`, and what they come to in unfused PyTorch."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from hyperfast import functional


def network(
    hidden=17, outputs=9, layers=5, counts=(3, 5, 7), levels=3, rows=50, fusion="concat", dtype=torch.float64, gain=1.0
):
    """Tables, indices, weights and biases of a predictor, and targets for it."""
    embeddings = [functional.positional_embedding(n, 0.76, levels, dtype) for n in counts]
    indices = torch.stack([torch.randint(n, (rows,)) for n in counts], 1)
    width = 2 * levels * (len(counts) if fusion == "concat" else 1)
    sizes = [width, *[hidden] * (layers - 1), outputs]
    linear = [nn.Linear(a, b, dtype=dtype) for a, b in itertools.pairwise(sizes)]
    weights = [(gain * m.weight.detach()).requires_grad_() for m in linear]
    biases = [m.bias.detach().requires_grad_() for m in linear]
    return (embeddings, indices, weights, biases), torch.randn(rows, outputs, dtype=dtype)


def converted(arguments, dtype):
    embeddings, indices, weights, biases = arguments
    parameters = [[p.detach().to(dtype).requires_grad_() for p in group] for group in (weights, biases)]
    return [e.to(dtype) for e in embeddings], indices, *parameters


def plain(arguments, rows=None, fusion="concat", activation="relu"):
    """NeRN's form: the embedding of every row, then linear layers."""
    embeddings, indices, weights, biases = arguments
    index = indices if rows is None else indices[rows]
    parts = [e[index[:, j]] for j, e in enumerate(embeddings)]
    x = torch.cat(parts, 1) if fusion == "concat" else sum(parts)
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        x = getattr(F, activation)(F.linear(x, weight, bias))
    return F.linear(x, weights[-1], biases[-1])


def plain_error(arguments, targets, element_weights=None, rows=None, **options):
    squared = (plain(arguments, rows, **options) - (targets if rows is None else targets[rows])).square()
    if element_weights is not None:
        squared = squared * (element_weights if rows is None else element_weights[rows])
    return squared.sum()


def gradients(loss, arguments):
    return torch.autograd.grad(loss, [*arguments[2], *arguments[3]])


def assert_same(found, expected, rtol=1e-9):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * max(1e-3, float(b.abs().max())))
