"""Losses that run as torch operations: literal formulas, closed-form gradients, dtypes, odd inputs, every message."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_accurate
from torch import nn

from hyperfast import functional
from hyperfast.losses import (
    FrequencyDistillation,
    HierarchicalContext,
    ImplicitClustering,
    InfoNCE,
    InterChannelCorrelation,
    LocalWasserstein,
    SinkhornDistillation,
)
from hyperfast.losses.plain import as_map, as_vectors, class_tokens, cosines, unit_rows

SHAPE = (3, 4, 6, 6)


def literal_channels(s, t):
    total = 0
    for a, b in zip(s.flatten(2), t.flatten(2), strict=True):
        for row, other in zip(a @ a.T, b @ b.T, strict=True):
            total += (row / row.norm() - other / other.norm()).square().sum()
    return total / (s.shape[0] * s.shape[1])


def literal_nce(s, t):
    s, t = s.mean((2, 3)), t.mean((2, 3))
    total = 0
    for i, own in enumerate(s):
        scores = torch.stack([F.cosine_similarity(own, other, dim=0) / 0.07 for other in t])
        total -= (scores[i].exp() / scores.exp().sum()).log()
    return total / len(s)


def literal_clusters(s, t):
    total = 0
    for scale, weight in ((1, 1 / 6), (2, 2 / 6), (4, 3 / 6)):
        for a, b in zip(s, t, strict=True):
            cells = [F.adaptive_avg_pool2d(x, scale).flatten(1).T for x in (a, b)]
            q, p = (torch.stack([F.cosine_similarity(cell[None], x) for cell in x]).div(2).softmax(1) for x in cells)
            total += weight * (p * (p / q).log()).sum()
    return total / len(s)


def literal_pyramid(s, t):
    levels = [(s, t), *((F.adaptive_avg_pool2d(s, n), F.adaptive_avg_pool2d(t, n)) for n in (4, 2, 1))]
    weights = [1, 1 / 2, 1 / 4, 1 / 8]
    return sum(w * (a - b).square().mean() for w, (a, b) in zip(weights, levels, strict=True)) / sum(weights)


def literal_frequencies(s, t):
    def magnitudes(x):
        n = torch.arange(6, dtype=torch.float64)
        found = []
        for u in (0, 1, 2, -2, -1):  # the order of the rows
            for v in range(3):
                phase = -2 * math.pi * (u * n[:, None] + v * n) / 6
                parts = [(x.double() * wave).sum((2, 3)) / 6 for wave in (phase.cos(), phase.sin())]
                found.append((1 + (parts[0] ** 2 + parts[1] ** 2).sqrt()).log())
        return torch.stack(found)

    return (magnitudes(s) - magnitudes(t)).square().mean()


def literal_transport(cost):
    plan = (-cost / 0.1).exp()
    for _ in range(20):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return (plan * cost).sum()


def literal_wasserstein(s, t):
    s, t = s.mean((2, 3)), t.mean((2, 3))
    return literal_transport(1 - F.cosine_similarity(s[:, None], t[None], dim=2)) / len(s)


LITERAL = {
    InterChannelCorrelation: literal_channels,
    InfoNCE: literal_nce,
    ImplicitClustering: literal_clusters,
    HierarchicalContext: literal_pyramid,
    FrequencyDistillation: literal_frequencies,
    LocalWasserstein: literal_wasserstein,
}
LOSSES = list(LITERAL)


def pair(shape=SHAPE, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


@pytest.mark.parametrize("kind", LOSSES)
def test_the_formula_written_out(kind):
    student, teacher = pair()
    found, expected = kind()([student], [teacher]), LITERAL[kind](student, teacher)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-6 if kind is InfoNCE else 1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (found, expected)]
    assert gradients[1].any()
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-12 if kind is not InfoNCE else 1e-7)


@pytest.mark.parametrize("kind", LOSSES)
def test_gradcheck(kind):
    students, teachers = zip(*(pair(seed=seed) for seed in range(2)), strict=True)
    loss = kind(weights=[1.0, 0.3])
    assert torch.autograd.gradcheck(lambda *maps: loss(maps, teachers), students)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_arithmetic_is_float32_also_under_autocast(kind, dtype):
    student, teacher = pair(dtype=dtype)
    loss = kind()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss([student], [teacher])
    found.backward()
    assert found.dtype == torch.float32 and student.grad.dtype == dtype
    exact = student.detach().double().requires_grad_()
    expected = loss([exact], [teacher.double()])
    expected.backward()
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=0)
    eager = student.detach().float().requires_grad_()
    LITERAL[kind](eager, teacher.float()).backward()
    assert_as_accurate(student.grad, eager.grad.to(dtype), exact.grad)


@pytest.mark.parametrize("kind", LOSSES)
def test_taps_are_averaged_and_named(kind):
    (a, s), (b, t) = pair(seed=1), pair(seed=2)
    loss = kind(beta=3.0)
    total = loss({"one": a, "two": b}, {"x": s, "y": t})
    torch.testing.assert_close(total.detach(), 3 * loss.last.mean())
    assert loss.last_names == ["one", "two"]
    torch.testing.assert_close(kind()([b], [t]).detach(), loss.last[1])


@pytest.mark.parametrize("kind", [kind for kind in LOSSES if kind not in (InfoNCE, LocalWasserstein)])
def test_a_map_against_itself(kind):
    student, _ = pair()
    loss = kind()([student], [student.detach()])
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.detach().abs() < 1e-15 and gradient.abs().max() < 1e-15


@pytest.mark.parametrize("kind", LOSSES)
def test_gradients_flow_to_the_student_only(kind):
    student, teacher = pair()
    kind()([student], [teacher.requires_grad_()]).backward()
    assert student.grad.any() and teacher.grad is None


@pytest.mark.parametrize("kind", LOSSES)
def test_maps_of_zeros_have_finite_gradients(kind):
    _, teacher = pair()
    for s, t in ((torch.zeros(SHAPE), teacher), (teacher, torch.zeros(SHAPE))):
        student = s.detach().double().requires_grad_()
        loss = kind()([student], [t.double()])
        loss.backward()
        assert loss.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize("kind", LOSSES)
def test_an_empty_batch_is_zero(kind):
    student, teacher = torch.zeros((0, *SHAPE[1:]), requires_grad=True), torch.zeros((0, *SHAPE[1:]))
    loss = kind()([student], [teacher])
    loss.backward()
    assert loss == 0 and student.grad.shape == student.shape


@pytest.mark.parametrize("kind", LOSSES)
def test_compiled_with_fullgraph(kind):
    torch.compiler.reset()
    student, teacher = pair(dtype=torch.float32)
    loss = kind()
    expected = loss([student], [teacher])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled([student], [teacher]), expected)


@pytest.mark.parametrize("kind", LOSSES)
def test_maps_in_another_memory_order(kind):
    student, teacher = pair()
    expected = kind()([student], [teacher])
    last = student.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    torch.testing.assert_close(kind()([last], [teacher.transpose(2, 3).contiguous().transpose(2, 3)]), expected)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("extra", [0, 1])
def test_tokens_are_the_map_that_they_come_from(kind, extra):
    """With a class token in front, which only a mean over all tokens sees."""
    student, teacher = (x.detach() for x in pair())
    tokens = [torch.cat((torch.zeros(3, extra, 4), x.flatten(2).mT), 1).double() for x in (student, teacher)]
    found, expected = kind()([tokens[0]], [tokens[1]]), kind()([student], [teacher])
    torch.testing.assert_close(found, expected)  # the token of zeros scales the means, which are compared by angle


def test_tokens_as_maps():
    image = torch.randn(2, 3, 4, 4)
    tokens = image.flatten(2).mT
    assert torch.equal(as_map(tokens), image) and as_map(image) is image
    assert torch.equal(as_map(torch.cat((torch.randn(2, 1, 3), tokens), 1)), image)
    assert [class_tokens(n) for n in (1, 2, 4, 5, 64, 65, 197)] == [0, 1, 0, 1, 0, 1, 1]
    for count in (0, 3, 66, 198):
        with pytest.raises(ValueError, match=f"a map has {count} tokens; expected those of a square image, h"):
            class_tokens(count)
    with pytest.raises(ValueError, match=r"a map is \[2, 3\]; expected \[B, C, H, W\], or tokens \[B, N, D\]"):
        as_map(torch.randn(2, 3))


def test_vectors_are_means_over_positions():
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(as_vectors(x), x.mean((2, 3)))
    torch.testing.assert_close(as_vectors(x.flatten(2).mT), x.mean((2, 3)))
    assert as_vectors(x[:, :, 0, 0]).shape == (2, 3)


def test_rows_of_zeros_stay_zero_without_a_gradient():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-13, 0.0]], dtype=torch.float64, requires_grad=True)
    unit = unit_rows(x)
    assert unit.tolist() == [[0.6, 0.8], [0.0, 0.0], [0.0, 0.0]]
    unit.sum().backward()
    torch.testing.assert_close(x.grad[0], torch.tensor([0.032, -0.024], dtype=torch.float64))
    assert not x.grad[1:].any()
    assert cosines(x.detach(), x.detach()).tolist() == [[1.0, 0.0, 0.0], [0.0] * 3, [0.0] * 3]


# Closed-form gradients


def test_gradient_of_channel_correlation():
    student, teacher = pair((2, 4, 3, 3))
    InterChannelCorrelation()([student], [teacher]).backward()
    f, r = student.detach().flatten(2), teacher.flatten(2)
    gram, other = f @ f.mT, r @ r.mT
    norm = gram.norm(dim=2, keepdim=True)
    u, v = gram / norm, other / other.norm(dim=2, keepdim=True)
    e = 2 * (u - v) / (2 * 4)
    m = (e - u * (u * e).sum(2, keepdim=True)) / norm
    torch.testing.assert_close(student.grad.flatten(2), (m + m.mT) @ f, rtol=1e-10, atol=1e-14)


def test_channel_correlation_is_twice_one_minus_the_cosine():
    student, teacher = (x.detach() for x in pair())
    grams = [x.flatten(2) @ x.flatten(2).mT for x in (student, teacher)]
    expected = 2 * (1 - F.cosine_similarity(*grams, dim=2)).mean()
    torch.testing.assert_close(InterChannelCorrelation()([student], [teacher]), expected)


def test_channel_correlation_is_similarity_preserving_of_the_channels_of_each_image():
    student, teacher = (x.detach() for x in pair())
    per_image = functional.similarity_preserving(list(student), list(teacher))
    torch.testing.assert_close(InterChannelCorrelation()([student], [teacher]), 4 * per_image.mean())


def test_channel_correlation_compares_maps_of_other_sizes():
    (student, _), (_, teacher) = pair((2, 4, 6, 6)), pair((2, 4, 3, 3))
    assert 0 < InterChannelCorrelation()([student], [teacher]) < 4
    with pytest.raises(ValueError, match=r"student map \[2, 4, 6, 6\], teacher map \[3, 5, 2, 2\]; the loss compares"):
        InterChannelCorrelation().of_pair(student, torch.randn(3, 5, 2, 2))


def test_gradient_of_info_nce():
    """(P - I) / (B tau) by the cosines, and the temperature's by the chain rule."""
    loss = InfoNCE(temperature=0.5).double()
    student, teacher = pair((4, 5))
    loss([student], [teacher]).backward()
    s, t = student.detach(), teacher / teacher.norm(dim=1, keepdim=True)
    norm = s.norm(dim=1, keepdim=True)
    unit = s / norm
    c = unit @ t.T
    d = ((c / 0.5).softmax(1) - torch.eye(4)) / 4
    along = d @ t / 0.5
    expected = (along - unit * (unit * along).sum(1, keepdim=True)) / norm
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(loss.log_scale.grad, (d * c / 0.5).sum(), rtol=1e-6, atol=1e-9)


def test_the_temperature_is_learned_unless_told_otherwise():
    assert [p.requires_grad for p in InfoNCE().parameters()] == [True]
    assert [p.requires_grad for p in InfoNCE(learnable=False).parameters()] == [False]
    assert InfoNCE(temperature=0.2).temperature == pytest.approx(0.2)
    with pytest.raises(ValueError, match="temperature is 0; expected a positive number"):
        InfoNCE(temperature=0)


def test_info_nce_tells_images_apart():
    features = torch.randn(5, 8)
    loss = InfoNCE()
    assert loss([features], [3 * features]) < loss([features.roll(1, 0)], [features])
    assert loss([features[:1]], [torch.randn(1, 8)]) == 0


@pytest.mark.parametrize("kind", [InfoNCE, LocalWasserstein])
def test_features_of_one_width(kind):
    with pytest.raises(
        ValueError, match=r"student features \[3, 4\], teacher features \[3, 5, 2, 2\]; pooled, they are to be of one"
    ):
        kind()([torch.randn(3, 4)], [torch.randn(3, 5, 2, 2)])


def test_gradient_of_clusters_by_the_cosines(monkeypatch):
    seen = []

    def watched(a, b):
        seen.append(cosines(a, b))
        if seen[-1].requires_grad:
            seen[-1].retain_grad()
        return seen[-1]

    monkeypatch.setattr("hyperfast.losses.implicit_clustering.cosines", watched)
    student, teacher = pair()
    ImplicitClustering(scales=(2,), scale_weights=(0.7,), gamma=3.0)([student], [teacher]).backward()
    s, t = seen
    torch.testing.assert_close(s.grad, 0.7 * ((s / 3).softmax(2) - (t / 3).softmax(2)) / (3 * 3), rtol=1e-9, atol=1e-14)


def test_clusters_of_classified_cells():
    student, teacher = pair((2, 4, 8, 8))
    own, other = nn.Linear(4, 5).double(), nn.Linear(4, 7).double()
    loss = ImplicitClustering(student_classifier=own, teacher_classifier=other)
    assert not list(loss.parameters()) and not list(loss.children())
    found = loss([student], [teacher])
    maps = [layer(x.movedim(1, -1)).movedim(-1, 1) for layer, x in ((own, student), (other, teacher))]
    torch.testing.assert_close(found, ImplicitClustering()([maps[0]], [maps[1]]))  # linear layers and means commute
    found.backward()
    assert own.weight.grad.any() and other.weight.grad is None


def test_one_cell_is_always_like_itself():
    student, teacher = pair()
    assert ImplicitClustering(scales=(1,))([student], [teacher]) == 0
    assert ImplicitClustering().scale_weights == pytest.approx((1 / 6, 2 / 6, 3 / 6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": ()}, r"scales is \(\); expected numbers of cells per side, at least 1 each"),
        ({"scales": (2, 0)}, r"scales is \(2, 0\)"),
        ({"scale_weights": (1.0,)}, r"1 scale_weights for 3 scales: \(1, 2, 4\)"),
        ({"gamma": 0.0}, "gamma is 0.0; expected a positive number"),
    ],
)
def test_options_of_clusters(options, message):
    with pytest.raises(ValueError, match=message):
        ImplicitClustering(**options)


def test_gradient_of_the_pyramid():
    student, teacher = pair((2, 3, 4, 4))
    HierarchicalContext(sizes=(2,))([student], [teacher]).backward()
    d = (student - teacher).detach()
    coarse = F.interpolate(F.avg_pool2d(d, 2), scale_factor=2) / 4
    expected = 2 / 3 * 2 * d / d.numel() + 1 / 3 * 2 * coarse / (d.numel() / 4)
    torch.testing.assert_close(student.grad, expected, rtol=1e-10, atol=1e-14)


def test_sizes_that_are_not_smaller_take_no_share():
    student, teacher = pair((2, 3, 2, 2))
    torch.testing.assert_close(
        HierarchicalContext()([student], [teacher]), HierarchicalContext(sizes=(1,))([student], [teacher])
    )
    with pytest.raises(ValueError, match=r"sizes is \(4, 0\); expected heights of at least 1"):
        HierarchicalContext(sizes=(4, 0))


def test_the_pyramid_wants_equal_maps():
    with pytest.raises(ValueError, match=r"tap 1: student map \[2, 3, 4, 4\], teacher map \[2, 4, 4, 4\]; the "):
        x, y = torch.randn(2, 3, 4, 4), torch.randn(2, 4, 4, 4)
        HierarchicalContext()([x, x], [x, y])


def test_weights_given_ahead_change_nothing():
    student, teacher = pair()
    loss = HierarchicalContext(weights=[0.3, 2.0])
    (gradient,) = torch.autograd.grad(5 * loss([student, student], [teacher, 2 * teacher]), student)
    (expected,) = torch.autograd.grad(
        1.5 * literal_pyramid(student, teacher) + 10 * literal_pyramid(student, 2 * teacher), student
    )
    torch.testing.assert_close(gradient, expected)


def test_gradient_of_frequencies():
    student, teacher = pair((2, 3, 5, 5))
    FrequencyDistillation(keep=5)([student], [teacher]).backward()
    spectrum, other = (torch.fft.rfft2(x.detach(), norm="ortho") for x in (student, teacher))
    size = spectrum.abs()
    d = size.log1p() - other.abs().log1p()
    by_spectrum = 2 * d * spectrum / (d.numel() * size * (1 + size))
    # The adjoint of the transform: every kept frequency is a wave over the map.
    full = torch.zeros(2, 3, 5, 5, dtype=spectrum.dtype)
    full[..., :3] = by_spectrum
    torch.testing.assert_close(student.grad, torch.fft.ifft2(full, norm="ortho").real, rtol=1e-9, atol=1e-14)


def test_frequencies_do_not_say_where():
    student, teacher = (x.detach() for x in pair())
    loss = FrequencyDistillation()
    torch.testing.assert_close(loss([student.roll((1, 2), (2, 3))], [teacher]), loss([student], [teacher]))


def test_frequencies_of_maps_of_other_sizes():
    (student, _), (_, teacher) = pair((2, 4, 16, 16)), pair((2, 4, 4, 4))
    loss = FrequencyDistillation()
    torch.testing.assert_close(loss([student], [teacher]), loss([F.adaptive_avg_pool2d(student, 4)], [teacher]))
    with pytest.raises(ValueError, match=r"student map \[2, 4, 16, 16\], teacher map \[2, 5, 4, 4\]; the "):
        loss([student], [torch.randn(2, 5, 4, 4)])
    for options in ({"size": 0}, {"keep": 0}):
        with pytest.raises(ValueError, match="size is . and keep .*; both must be at least 1"):
            FrequencyDistillation(**options)


def test_repr_shows_the_options():
    assert repr(InterChannelCorrelation()) == "InterChannelCorrelation()"
    assert repr(InfoNCE()) == "InfoNCE(temperature=0.07, learnable=True)"
    assert repr(ImplicitClustering(scales=(2,))) == "ImplicitClustering(scales=(2,), scale_weights=(1.0,), gamma=2.0)"
    assert repr(HierarchicalContext()) == "HierarchicalContext(sizes=(4, 2, 1))"
    assert repr(FrequencyDistillation()) == "FrequencyDistillation(size=8, keep=None)"
    assert repr(LocalWasserstein()) == "LocalWasserstein(epsilon=0.1, iterations=20, gradient='unrolled')"
    expected = "SinkhornDistillation(temperature=2.0, epsilon=0.1, iterations=20, gradient='unrolled')"
    assert repr(SinkhornDistillation()) == expected
