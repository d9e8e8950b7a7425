"""Options that several commands share, and what a run remembers of them."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import pytest
import torch
from rich.console import Console

from hyperfast import data, models, nn
from hyperfast.cli.distill import parse_losses
from hyperfast.cli.network import Network, Run, classes_in, options_in
from hyperfast.cli.options import DataOptions, HypernetOptions, TrainOptions, key_values
from hyperfast.cli.session import open_folder
from hyperfast.recipes import checkpoint

if TYPE_CHECKING:
    from pathlib import Path


def test_key_values_are_literals_where_possible() -> None:
    given = ("width=8", "shortcut=B", "dropout=0.5", "flag=True", "path=a=b")
    assert key_values(given, "--option") == {
        "width": 8,
        "shortcut": "B",
        "dropout": 0.5,
        "flag": True,
        "path": "a=b",
    }


@pytest.mark.parametrize("given", ["width", "=8"])
def test_key_without_value(given: str) -> None:
    with pytest.raises(ValueError, match=r"--option '.*' has no value; write --option width=VALUE"):
        key_values((given,), "--option")


def test_losses_with_and_without_weight() -> None:
    assert parse_losses(("at", "kd=0.9")) == {"at": None, "kd": 0.9}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ("att",),
            r"unknown loss 'att' \(did you mean at\?\); choose from at, fsp, rkd, sp, ab, cwd, fitnets, ft, kd",
        ),
        (("at=much",), r"--loss 'at=much': the weight 'much' is no number"),
        (("at=0",), "must be a positive number"),
        (("at=nan",), "must be a positive number"),
        (("kd", "kd=2"), "--loss kd is given more than once"),
    ],
)
def test_bad_losses(given: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_losses(given)


def test_augmentation_is_that_of_the_set_unless_told() -> None:
    assert TrainOptions().for_data(DataOptions("digits")).augment == data.Augment(pad=1, flip=False)
    assert TrainOptions().for_data(DataOptions("cifar10")).augment == data.Augment(pad=4, flip=True)
    assert TrainOptions().for_data(DataOptions("digits", pad=0, flip=True)).augment == data.Augment(pad=0, flip=True)


def test_network_is_the_same_for_the_same_seed_and_leaves_the_random_state() -> None:
    network = Network("resnet8", 10, {"in_channels": 1}, HypernetOptions(hidden=(4, 4)))
    state = torch.get_rng_state()
    first, second, other = network.build(1), network.build(1), network.build(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.theta0, second.theta0)  # type: ignore[arg-type]
    assert not torch.equal(first.theta0, other.theta0)  # type: ignore[arg-type]


def test_network_starts_from_weights(tmp_path: Path) -> None:
    model = models.create("resnet8")
    checkpoint.save(tmp_path / "w.safetensors", model.state_dict())
    student = Network("resnet8", 10, {}, HypernetOptions(init="bias_hyperinit")).build(5, tmp_path / "w.safetensors")
    assert isinstance(student, nn.Hypernetwork)
    torch.testing.assert_close(student.materialize().conv1.weight, model.conv1.weight)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Network("resnet21", 10), r"unknown model 'resnet21' \(did you mean .*resnet20"),
        (Network("resnet8", 10, {"witdh": 4}), r"no option 'witdh' \(did you mean width"),
        (Network("resnet8", 10, {"width": "wide"}), "model 'resnet8' cannot be made"),
    ],
)
def test_networks_that_cannot_be(network: Network, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        network.build(0)


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_options_are_read_off_the_weights(shortcut: str) -> None:
    model = models.create("resnet8", 7, width=4, in_channels=1, shortcut=shortcut)
    assert options_in(model.state_dict(), "resnet8") == {"width": 4, "in_channels": 1, "shortcut": shortcut}
    assert classes_in(model.state_dict()) == 7
    assert options_in(model.state_dict(), "timm:resnet18") == {}


def test_options_of_a_vgg() -> None:
    model = models.create("vgg11_bn", 5, width=8)
    assert options_in(model.state_dict(), "vgg11_bn") == {"width": 8, "in_channels": 3}
    assert classes_in(model.state_dict()) == 5


@pytest.mark.parametrize("name", ["mobilenetv2_x1_4", "shufflenetv2_x1_5", "repvgg_a2"])
def test_options_of_the_other_families(name: str) -> None:
    network = Network(name, 7, {"width": 8, "in_channels": 1} | ({"deploy": True} if name == "repvgg_a2" else {}))
    state = network.build(0).state_dict()
    assert options_in(state, name) == network.options
    assert classes_in(state) == 7
    with torch.device("meta"):
        whole = models.create(name).state_dict()
    assert models.create(name, **options_in(whole, name)).state_dict().keys() == whole.keys()


def _run(epochs: int = 1) -> Run:
    network = Network("resnet8", 10, {"in_channels": 1}, HypernetOptions(select=("layer1.*",)))
    return Run(network, (1, 8, 8), (0.3,), (0.4,), {"epochs": epochs})


def test_run_comes_back_from_its_file(tmp_path: Path) -> None:
    _run().save(tmp_path)
    assert asdict(Run.load(tmp_path)) == asdict(_run())


def test_damaged_or_missing_notes(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no run.json"):
        Run.load(tmp_path)
    (tmp_path / "run.json").write_text('{"network": 1}')
    with pytest.raises(ValueError, match="is damaged or was not written by this hyperfast"):
        Run.load(tmp_path)


def test_folder_of_the_same_run_and_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    console = Console(quiet=True)
    first = open_folder(_run(), None, "x", False, console)
    (first / "checkpoint.safetensors").touch()
    assert open_folder(_run(), None, "x", False, console) == first
    assert open_folder(_run(epochs=2), None, "x", False, console).name == "x-2"
    with pytest.raises(ValueError, match=r"with other settings: settings.epochs was 1 and is now 2"):
        open_folder(_run(epochs=2), first, "x", False, console)
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint.safetensors in .*new to resume from"):
        open_folder(_run(), tmp_path / "new", "x", True, console)
