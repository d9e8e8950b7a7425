"""A compressed network as a file: complete, checked, and counted honestly."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hyperfast import models
from hyperfast.nn import WeightPredictor
from hyperfast.optim import Ranger
from hyperfast.recipes import Artifact, artifact, checkpoint, fake_quantized
from hyperfast.surgery import Coverage, cover, find_permutation

_OPTIONS = {"width": 4, "in_channels": 1, "shortcut": "B"}
_METADATA = {"model": "resnet8", "classes": 5, "model_options": _OPTIONS, "history": [1, {"rmse": 0.1}]}


def _predictor(coverage: Coverage, hidden: int = 8, **options: Any) -> WeightPredictor:
    coordinates = coverage.coordinates()
    sizes = (coordinates.amax(0) + 1).tolist()
    return WeightPredictor(sizes, hidden, coordinates, outputs=coverage.outputs, **options)


def _network() -> nn.Module:
    torch.manual_seed(0)
    network = models.create("resnet8", 5, **_OPTIONS)
    network(torch.randn(4, 1, 8, 8))  # so that running statistics are not 0 and 1
    return network.eval()


def _artifact(kind: str = "cross-filter", policy: str = "nern", **options: Any) -> Artifact:
    network = _network()
    coverage = cover(network, policy=policy)
    permutation = find_permutation(coverage, coverage.gather(network.state_dict()), kind)
    return Artifact.of(network, _predictor(coverage, **options), coverage, permutation, _METADATA)


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("kind", ["identity", "in-filter", "cross-filter"])
@pytest.mark.parametrize("policy", ["nern", "all"])
def test_a_file_is_all_it_takes(kind: str, policy: str, tmp_path: Path) -> None:
    made = _artifact(kind, policy)
    made.save(tmp_path / "a.safetensors")
    read = Artifact.load(tmp_path / "a.safetensors")
    state = made.state_dict()
    assert _equal(read.state_dict(), state)
    assert read.metadata == made.metadata and read.metadata["history"] == [1, {"rmse": 0.1}]
    original = _network()
    assert state.keys() == original.state_dict().keys()
    # Every kernel is what the predictor says at its coordinate, and everything else is the original's.
    coordinates = made.permutation.invert(made.coverage.coordinates())
    again = WeightPredictor(made.predictor.sizes, 8, coordinates)
    again.load_state_dict(made.predictor.state_dict())
    with torch.no_grad():
        expected = made.coverage.scatter(again())
    for name, tensor in original.state_dict().items():
        torch.testing.assert_close(state[name], expected.get(name, tensor), rtol=0, atol=1e-6)
    images = torch.randn(3, 1, 8, 8)
    made.load_into(original)
    with torch.no_grad():
        assert torch.equal(read.build()(images), original(images))


@pytest.mark.parametrize(
    "options",
    [
        {"embedding": "fourier", "levels": 6, "gauss_scale": (1.0, 0.5, 0.25)},
        {"normalization": "local", "base": 1.25, "levels": 5},
        {"skip": "nerf", "activation": "gelu", "layers": 4},
        {"fusion": "sum", "precision": "bf16"},
    ],
)
def test_every_configuration_comes_back(options: dict[str, Any], tmp_path: Path) -> None:
    made = _artifact(**options)
    made.save(tmp_path / "a")
    read = Artifact.load(tmp_path / "a")
    assert read.predictor.configuration == made.predictor.configuration
    assert _equal(read.state_dict(), made.state_dict())


def test_fourier_frequencies_are_those_of_the_file(tmp_path: Path) -> None:
    network = _network()
    coverage = cover(network, policy="nern")
    permutation = find_permutation(coverage, coverage.gather(network.state_dict()), "identity")
    frequencies = torch.randn(12, 3)
    predictor = _predictor(coverage, embedding="fourier", levels=4, frequencies=frequencies)
    made = Artifact.of(network, predictor, coverage, permutation)
    made.save(tmp_path / "a")
    read = Artifact.load(tmp_path / "a")
    assert read.predictor.frequencies is not None and torch.equal(read.predictor.frequencies, frequencies)
    assert _equal(read.state_dict(), made.state_dict())
    assert made.size_report().predictor == 4 * (made.size_report().parameters + 36)


def test_loading_leaves_the_random_state_alone(tmp_path: Path) -> None:
    made = _artifact()
    made.save(tmp_path / "a")
    before = torch.get_rng_state()
    Artifact.load(tmp_path / "a").build()
    assert torch.equal(torch.get_rng_state(), before)


def test_int8_is_what_quantize_says_and_the_same_every_time(tmp_path: Path) -> None:
    made = _artifact()
    made.save(tmp_path / "a", weights="int8")
    first, second = Artifact.load(tmp_path / "a"), Artifact.load(tmp_path / "a")
    assert first.stored == "int8"
    assert _equal(first.state_dict(), second.state_dict())
    for mine, read in zip(made.predictor.layers, first.predictor.layers, strict=True):
        scale = mine.weight.detach().abs().amax(1, keepdim=True) / 127
        assert torch.equal(read.bias, mine.bias)
        assert ((read.weight - mine.weight).abs() <= 0.5001 * scale).all()
        assert not torch.equal(read.weight, mine.weight)
    kept = {name: tensor for name, tensor in first.state_dict().items() if name in made.kept}
    assert _equal(kept, dict(made.kept))


def test_fp16_halves_what_is_kept_as_well(tmp_path: Path) -> None:
    made = _artifact()
    made.save(tmp_path / "a", weights="fp16")
    read = Artifact.load(tmp_path / "a")
    assert read.stored == "fp16"
    for name, tensor in made.kept.items():
        assert read.kept[name].dtype == tensor.dtype
        assert torch.equal(read.kept[name], tensor.half().to(tensor.dtype))
    assert torch.equal(read.predictor.weights[0], made.predictor.weights[0].half().float())


def test_fp16_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    made = _artifact()
    made.kept["bn1.running_var"][0] = 1e5
    with pytest.raises(ValueError, match=r"bn1\.running_var has a value of 1e\+05, which float16 \(at most 65504\)"):
        made.save(tmp_path / "a", weights="fp16")
    assert not list(tmp_path.iterdir())


def test_tied_weights_are_predicted_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(6, 9), nn.Linear(9, 6, bias=False)
            self.head.weight = self.embedding.weight

    network = Tied()
    coverage = cover(network)
    permutation = find_permutation(coverage, coverage.gather(network.state_dict()))
    Artifact.of(network, _predictor(coverage), coverage, permutation).save(tmp_path / "a")
    read = Artifact.load(tmp_path / "a")
    assert not read.kept and read.size_report().counts == {"covered weights": 54, "all parameters": 54}
    read.load_into(network)
    assert torch.equal(network.head.weight, read.state_dict()["embedding.weight"])


# Bytes and ratios


@pytest.mark.parametrize("weights", ["fp32", "fp16", "int8"])
def test_sizes_are_those_of_the_file(weights: Any, tmp_path: Path) -> None:
    made = _artifact("in-filter")
    made.save(tmp_path / "a", weights=weights)
    size = made.size_report(weights)
    assert size.total == (tmp_path / "a").stat().st_size
    assert size == Artifact.load(tmp_path / "a").size_report()
    matrices, biases = sum(w.numel() for w in made.predictor.weights), sum(b.numel() for b in made.predictor.biases)
    bytes_of = {"fp32": 4 * (matrices + biases), "fp16": 2 * (matrices + biases), "int8": matrices + 8 * biases}
    assert size.predictor == bytes_of[weights]
    assert size.permutations == -(-made.permutation.bits // 8)
    assert size.parameters == matrices + biases == 3 * 8**2 + 253 * 8 + 9
    text = str(size)
    for number in (size.predictor, size.permutations, size.kept, size.total):
        assert f"{number:,}" in text
    assert f"({size.parameters:,} parameters, {weights})" in text


# Against "all parameters" and "covered weights" of option A; the papers' own roundings are listed where they agree.
@pytest.mark.parametrize(
    ("depth", "total", "covered", "ratios"),
    [
        (20, 269_722, 267_696, {120: 0.273, 140: 0.349, 180: 0.529, 300: 1.282}),
        (
            56,
            853_018,
            848_304,
            {220: 0.235, 280: 0.359, 320: 0.455, 360: 0.563, 510: 1.066, 680: 1.828, 750: 2.201},
        ),
    ],
)
def test_ratios_of_the_papers(depth: int, total: int, covered: int, ratios: dict[int, float]) -> None:
    network = models.create(f"resnet{depth}")
    coverage = cover(network, policy="nern")
    permutation = find_permutation(coverage, coverage.gather(network.state_dict()), "in-filter")
    for hidden, expected in ratios.items():
        size = Artifact.of(network, _predictor(coverage, hidden), coverage, permutation).size_report()
        assert size.parameters == 3 * hidden**2 + 253 * hidden + 9
        assert size.counts == {"covered weights": covered, "all parameters": total, "convolutions": covered}
        of_covered, of_all, of_convolutions = size.ratios
        assert round(of_all.parameters, 3) == expected == round(of_all.stored, 3)
        assert of_covered.parameters == of_convolutions.parameters == size.parameters / covered
        stored_bits = {20: 21_340, 56: 68_332}[depth]
        assert size.permutations == stored_bits
        assert of_all.with_permutations == pytest.approx(of_all.stored + stored_bits / (4 * total))


def test_ratios_of_shortcut_b_are_against_covered_weights() -> None:
    """The choice of layers under which all four numbers of the paper for ResNet-20 come out."""
    network = models.create("resnet20", shortcut="B")
    coverage = cover(network, policy="nern")
    assert coverage.weights == 270_256
    ratios = [round((3 * h**2 + 253 * h + 9) / coverage.weights, 2) for h in (120, 140, 180, 300)]
    assert ratios == [0.27, 0.35, 0.53, 1.28]


# Training for int8


def _trained(steps: int = 300) -> tuple[Artifact, Tensor]:
    made = _artifact(hidden=16)
    state = _network().state_dict()
    # Smooth targets, which the small predictor fits well enough for the rounding to show.
    targets = torch.sin(made.coverage.coordinates().float() @ torch.rand(3, 9) / 2)
    assert made.coverage.gather(state).shape == targets.shape
    _fit(made.predictor, targets, steps, 1e-2)
    return made, targets


def _fit(predictor: WeightPredictor, targets: Tensor, steps: int, lr: float) -> None:
    optimizer = Ranger(predictor.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = (predictor.squared_error(targets) / targets.numel()).sqrt()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def _rmse(predictor: WeightPredictor, targets: Tensor) -> float:
    return float((predictor() - targets).square().mean().sqrt())


def _stored_as_int8(made: Artifact, path: Path) -> WeightPredictor:
    made.save(path, weights="int8")
    return Artifact.load(path).predictor


def test_training_for_int8_lowers_its_error(tmp_path: Path) -> None:
    made, targets = _trained()
    exact, rounded = _rmse(made.predictor, targets), _rmse(_stored_as_int8(made, tmp_path / "a"), targets)
    parameters = [id(parameter) for parameter in made.predictor.parameters()]
    before = made.predictor.weights[1].clone()
    with fake_quantized(made.predictor) as predictor:
        assert predictor is made.predictor
        assert _rmse(predictor, targets) == rounded
        _fit(predictor, targets, 100, 1e-3)
        inside = _rmse(predictor, targets)
    # The same ones in the same order, which is what an optimiser's state goes by.
    assert [id(parameter) for parameter in made.predictor.parameters()] == parameters
    assert not torch.equal(made.predictor.weights[1], before)
    again = _rmse(_stored_as_int8(made, tmp_path / "b"), targets)
    assert again == inside
    # At least half of what rounding had cost is won back.
    assert exact < rounded and again < rounded - 0.5 * (rounded - exact)


def test_the_matrices_come_back_after_an_error() -> None:
    made = _artifact()
    state = {name: tensor.clone() for name, tensor in made.predictor.state_dict().items()}
    with pytest.raises(KeyError), fake_quantized(made.predictor):
        assert made.size_report("int8").predictor == _artifact().size_report("int8").predictor
        raise KeyError
    assert _equal(made.predictor.state_dict(), state)


# Bad input


def test_parts_that_do_not_belong_together() -> None:
    made = _artifact()
    network = _network()
    other = cover(network, policy="nern", exclude="conv1.weight")
    with pytest.raises(ValueError, match=r"the predictor has \d+ rows of 9; the coverage has \d+ of 9\. Make it with"):
        Artifact.of(network, _predictor(other), made.coverage, made.permutation)
    permutation = find_permutation(other, other.gather(network.state_dict()))
    with pytest.raises(ValueError, match="the permutation was found for another coverage"):
        Artifact.of(network, made.predictor, made.coverage, permutation)
    with pytest.raises(ValueError, match=r"kept has conv1\.weight, which is covered"):
        Artifact(made.predictor, made.coverage, made.permutation, network.state_dict())
    with pytest.raises(ValueError, match=r"conv1\.weight is \[8, 1, 3, 3\], was \[4, 1, 3, 3\]"):
        wide = models.create("resnet8", 5, **{**_OPTIONS, "width": 8})
        Artifact.of(wide, made.predictor, made.coverage, made.permutation)


def test_a_predictor_of_other_coordinates_is_not_saved(tmp_path: Path) -> None:
    made = _artifact()
    coordinates = made.coverage.coordinates().flip(0)
    other = WeightPredictor(made.predictor.sizes, 8, coordinates)
    with pytest.raises(ValueError, match=r"made for other coordinates than coverage\.coordinates\(\)"):
        Artifact(other, made.coverage, made.permutation, made.kept).save(tmp_path / "a")
    with pytest.raises(ValueError, match="weights is 'int4'; choose one of 'fp32', 'fp16', 'int8'"):
        made.save(tmp_path / "a", weights="int4")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_network_that_changed_since(tmp_path: Path) -> None:
    made = _artifact()
    made.save(tmp_path / "a")
    read = Artifact.load(tmp_path / "a")
    wide = models.create("resnet8", 5, **{**_OPTIONS, "width": 8})
    with pytest.raises(ValueError, match=r"\(ResNet\) is not what the coverage was made for: conv1\.weight is"):
        read.load_into(wide)
    classes = models.create("resnet8", 7, **_OPTIONS)
    before = {name: tensor.clone() for name, tensor in classes.state_dict().items()}
    with pytest.raises(ValueError, match=r"does not fit this ResNet: fc\.bias is \[5\], expected \[7\]"):
        read.load_into(classes)
    assert _equal(classes.state_dict(), before)
    nameless = Artifact(read.predictor, read.coverage, read.permutation, read.kept)
    with pytest.raises(ValueError, match=r"does not say of which model it is .* use load_into\(module\)"):
        nameless.build()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_failed_training_is_not_saved(value: float, tmp_path: Path) -> None:
    made = _artifact()
    with torch.no_grad():
        made.predictor.biases[2][0] = value
    with pytest.raises(ValueError, match=r"the predictor's layers\.2\.bias has NaN or infinite values"):
        made.save(tmp_path / "a")
    made = _artifact()
    made.kept["fc.weight"][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"fc\.weight, which is not predicted, has NaN values"):
        made.save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_cut_missing_and_foreign_files(tmp_path: Path) -> None:
    _artifact().save(tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for length in (0, 7, 500, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut is cut short or is not a safetensors file"):
            Artifact.load(tmp_path / "cut")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint at"):
        Artifact.load(tmp_path / "none")
    save_file({"w": torch.ones(3)}, tmp_path / "plain")
    with pytest.raises(ValueError, match="hyperfast did not write it.* nor a compressed network in it"):
        Artifact.load(tmp_path / "plain")
    checkpoint.save(tmp_path / "training", {"w": torch.ones(3)}, {"kind": "training"})
    with pytest.raises(ValueError, match="it is no compressed network; give a file of `hyperfast compress`"):
        Artifact.load(tmp_path / "training")


def _change_bias(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    tensors["predictor/layers.0.bias"][0] += 1e-6


def _change_kept(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    tensors["kept/fc.bias"][0] += 1


def _change_permutation(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    tensors["permutation"][:] = tensors["permutation"].flip(0)


def _change_base(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    metadata["predictor"]["base"] = 0.77


def _rename(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    metadata["metadata"]["model"] = "resnet20"


def _drop(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    del tensors["kept/fc.bias"]


def _unsigned(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    del metadata["sha256"]


@pytest.mark.parametrize(
    "change", [_change_bias, _change_kept, _change_permutation, _change_base, _rename, _drop, _unsigned]
)
def test_tampering_is_noticed(change: Callable[[dict[str, Tensor], dict[str, Any]], None], tmp_path: Path) -> None:
    _artifact().save(tmp_path / "a")
    read = checkpoint.load(tmp_path / "a")
    change(read.tensors, read.metadata)
    checkpoint.save(tmp_path / "a", read.tensors, read.metadata)
    with pytest.raises(ValueError, match="a was changed after it was written: its SHA-256 does not match"):
        Artifact.load(tmp_path / "a")


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    _artifact().save(tmp_path / "a")
    data = bytearray((tmp_path / "a").read_bytes())
    data[-3] ^= 16
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(ValueError, match="its SHA-256 does not match"):
        Artifact.load(tmp_path / "a")
    start = data.index(b"sha256") + 5
    data[start + 8 : start + 9] = b"\\"  # the quotes of the value: no JSON any more
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(ValueError, match="was changed after it was written|is cut short or is not a safetensors file"):
        Artifact.load(tmp_path / "a")


def test_a_later_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(artifact, "FORMAT", 2)
        _artifact().save(tmp_path / "a")
    with pytest.raises(ValueError, match=r"artefact format 2; this hyperfast reads format 1\. Update hyperfast"):
        Artifact.load(tmp_path / "a")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = _artifact()
    made.save(tmp_path / "a")
    before = (tmp_path / "a").read_bytes()

    def full(tensors: object, file: Path, metadata: object = None) -> None:
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="could not save .*No space left.* unchanged"):
        made.save(tmp_path / "a", weights="int8")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == before
