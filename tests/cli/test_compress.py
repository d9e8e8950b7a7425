"""`hyperfast compress` on a small network and a few digits."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hyperfast import models
from hyperfast.cli import main
from hyperfast.recipes import checkpoint
from hyperfast.recipes.artifact import Artifact

pytest.importorskip("tyro")

_SHORT = ["--hidden", "8", "--steps", "6", "--device", "cpu", "--log-every", "3"]
_DATA = ["--dataset", "digits", "--limit", "60"]
_PHASE2 = ["--phase2", "kd", "--phase2-steps", "3", "--phase2-batch-size", "10"]


def weights(path: Path, seed: int = 0, **options: Any) -> Path:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = models.create("resnet8", in_channels=1, width=4, **options)
    save_file(model.state_dict(), path, metadata={"mean": "0.3", "std": "0.4"})
    return path


@pytest.fixture
def network(tmp_path: Path) -> Path:
    return weights(tmp_path / "net.safetensors")


def run(network: Path, *more: str) -> int:
    return main(
        ["compress", str(network), "--model", "resnet8", "--out", str(network.with_name("c.hf")), *_SHORT, *more]
    )


def error(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_without_images_it_writes_a_file_that_is_all_one_needs(
    network: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(network) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in ("RMSE of the weights", "permutations included", "bytes", "minutes, 6 steps", "hyperfast reconstruct"):
        assert words in text
    assert "accuracy" not in text
    artifact = Artifact.load(network.with_name("c.hf"))
    assert artifact.metadata["model"] == "resnet8" and artifact.metadata["mean"] == [0.3]
    rebuilt = artifact.build()
    original = models.read_checkpoint(network).tensors
    assert torch.equal(rebuilt.state_dict()["fc.weight"], original["fc.weight"])
    names = {path.name for path in network.with_name("c.hf.run").iterdir()}
    assert names == {"checkpoint.safetensors", "metrics.jsonl"}


def test_images_phase_2_and_rounds_fill_the_table(network: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    assert run(network, *_DATA, *_PHASE2, "--rounds", "2", "--seeds", "2", "--stored", "int8") == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in ("validation accuracy, original", "test accuracy, reconstruction", "by chance with p", "round 1"):
        assert words in text
    history = Artifact.load(network.with_name("c.hf")).metadata["history"]
    assert isinstance(history, list) and history[0]["target_accuracy"] is not None


def test_phase_2_starts_from_a_file(network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(network) == 0
    command = ["compress", str(network), "--model", "resnet8", "--out", str(tmp_path / "d.hf"), "--device", "cpu"]
    assert main([*command, "--start", str(tmp_path / "c.hf"), *_DATA, *_PHASE2]) == 0
    assert "3 steps" in capsys.readouterr().out
    first, second = (Artifact.load(tmp_path / name) for name in ("c.hf", "d.hf"))
    assert second.predictor.configuration == first.predictor.configuration
    assert not torch.equal(second.predictor.weights[0], first.predictor.weights[0])
    assert main([*command, "--start", str(tmp_path / "c.hf")]) == 2
    assert "there is nothing left to do" in error(capsys)


def test_a_teacher_of_another_shape_and_noise(network: Path, tmp_path: Path) -> None:
    teacher = weights(tmp_path / "teacher.safetensors", seed=1, shortcut="B")
    noise = ["--noise", "--image", "1", "8", "8"]
    assert run(network, *_PHASE2, *noise, "--teacher", str(teacher)) == 0


def test_the_same_command_goes_on_and_another_does_not(
    network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(network, "--resume") == 2
    assert "there is no checkpoint.safetensors in" in error(capsys)
    assert run(network) == 0
    first = network.with_name("c.hf").read_bytes()
    capsys.readouterr()
    assert run(network, "--resume") == 0
    assert "going on with the run in" in capsys.readouterr().out
    assert network.with_name("c.hf").read_bytes() == first
    assert run(network, "--base", "0.8") == 2
    assert "base was 0.76 and is now 0.8" in error(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kernel", "2"], "kernel is 2, but the kernels of ResNet have sides from 3 on"),
        (["--phase2", "kd"], "--phase2 shows images to the network: give --dataset and --data, or --noise"),
        (["--phase2", "kd", "--noise"], "noise has no epochs; give steps"),
        (["--alpha", "0.5"], "--alpha belongs to the second phase; add --phase2 kd"),
        (["--data", "somewhere"], "--data is given without --dataset"),
        (["--select", "test"], "select is 'test', but there are no such images"),
    ],
)
def test_options_that_cannot_be(
    network: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(network, *options) == 2
    assert message in error(capsys)
    assert not network.with_name("c.hf").exists()


@pytest.mark.parametrize(("flag", "name"), [("--hidden", "hidden"), ("--batch-rows", "batch_rows")])
def test_settings_that_cannot_be(network: Path, flag: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run(network, flag, "0")
    assert end.value.code == 2
    assert f"{name} is 0; expected at least 1" in error(capsys)


def test_networks_that_cannot_be(network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = weights(tmp_path / "teacher.safetensors", num_classes=7)
    noise = ["--noise", "--image", "1", "8", "8"]
    assert run(network, *_PHASE2, *noise, "--teacher", str(teacher)) == 2
    assert "the teacher gives 7 logits and the network 10" in error(capsys)
    state = models.read_checkpoint(network).tensors
    for value, message in ((float("nan"), "conv1.weight has 9 of 36 entries that are NaN"), (0.0, "conv1.weight")):
        broken = state["conv1.weight"].clone()
        broken[2] = value
        save_file({**state, "conv1.weight": broken}, tmp_path / "broken.safetensors")
        assert run(tmp_path / "broken.safetensors") == 2
        assert message in error(capsys)
    assert main(["compress", str(network), "--out", str(tmp_path / "c.hf")]) == 2
    assert "does not say of which model it is" in error(capsys)


def test_a_full_disk_leaves_the_file_from_before(
    network: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(network) == 0
    before, write = network.with_name("c.hf").read_bytes(), checkpoint.save_file

    def full(tensors: Any, file: Path, metadata: Any = None) -> None:
        if file.name != "c.hf":
            return write(tensors, file, metadata)
        file.write_bytes(b"half a")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_file", full)
    assert run(network) == 2
    assert "could not save" in error(capsys) and network.with_name("c.hf").read_bytes() == before
