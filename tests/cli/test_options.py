"""Options that several commands share, and what a run remembers of them."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import pytest
import torch
import tyro
from rich.console import Console

from hyperfast import data, models, nn
from hyperfast.cli.network import Network, Run, classes_in, options_in
from hyperfast.cli.options import DataOptions, DistillOptions, HypernetOptions, TrainOptions, key_values, parse_losses
from hyperfast.cli.session import open_folder
from hyperfast.recipes import LossTerm, checkpoint

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
    assert parse_losses(("at", "kd=0.9")) == {"at": LossTerm(), "kd": LossTerm(0.9)}


def test_losses_in_a_part_of_the_training() -> None:
    terms = parse_losses(("ab=5@0:0.3", "fsp@:0.5", "at@0.3:"))
    assert terms == {
        "ab": LossTerm(5.0, span=(0.0, 0.3)),
        "fsp": LossTerm(span=(0.0, 0.5)),
        "at": LossTerm(span=(0.3, 1.0)),
    }


def test_everything_about_a_distillation_reaches_its_settings() -> None:
    options = DistillOptions(
        cross_entropy_weight=0.5,
        labels_from=0.25,
        temperature=2.0,
        taps=("layer1", "layer2"),
        teacher_taps=("stages",),
        tap_weight=("layer1=1", "layer2=0.5"),
        connector="none",
        pretrain_paraphraser=20.0,
        cache_teacher=True,
    )
    config = options.config(("ft=3", "kd"))
    weights = {"weights": {"layer1": 1.0, "layer2": 0.5}}
    assert config.losses == {"ft": LossTerm(3.0, options=weights, connector="none")}
    assert (config.cross_entropy_weight, config.labels_from, config.kd_weight, config.temperature) == (0.5, 0.25, 1, 2)
    assert config.at == ["layer1", "layer2"] and config.teacher_at == "stages"
    assert config.paraphraser_epochs == 20 and config.cache_teacher
    assert DistillOptions(schedule="travelling").config(("at",)).tap_weights.schedule == "travelling"
    assert DistillOptions().config(("kd=0.5",)).kd_weight == 0.5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("layer1",), "--tap-weight layer1: write NAME=WEIGHT, such as layer1=0.5"),
        (("layer1=one",), "--tap-weight layer1=one: 'one' is no number"),
    ],
)
def test_bad_tap_weights(given: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillOptions(tap_weight=given).config(("at",))


@pytest.mark.parametrize("given", [["4", "8"], ["4,8"], ["4,", "8"]])
def test_widths_with_spaces_and_with_commas(given: list[str]) -> None:
    options = tyro.cli(HypernetOptions, args=["--hidden", *given], config=(tyro.conf.OmitArgPrefixes,))
    assert options.hidden == (4, 8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ("att",),
            r"unknown loss 'att' \(did you mean at\?\); choose from at, ab, .*, sp, fmd, ofa, .*, kd",
        ),
        (("at=much",), "--loss at=much: 'much' is no number"),
        (("ab@0.3",), "--loss ab@0.3: '0.3' is no part of the training; write @0:0.3 for its first 30 %"),
        (("ab@0.5:0.2",), r"span is \(0.5, 0.2\); expected two shares of the training, 0 <= from < to <= 1"),
        (("kd@0:0.5",), "kd counts throughout"),
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


@pytest.mark.parametrize("name", ["vit_tiny32", "mixer_tiny32"])
def test_options_of_a_network_over_patches(name: str) -> None:
    options = {"width": 8, "in_channels": 1, "patch": 4, "depth": 8, "image_size": 16}
    state = Network(name, 7, options).build(0).state_dict()
    assert options_in(state, name) == options
    assert classes_in(state) == 7


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
