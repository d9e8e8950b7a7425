"""Norms whose statistics are those of the reconstructed network."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny_task
import torch
from tiny_compression import settings
from torch import Tensor, nn

from hyperfast.analysis import answers
from hyperfast.data import DeviceLoader, Splits
from hyperfast.recipes import Artifact, CompressConfig, GuideConfig, compress, continuation
from hyperfast.recipes.guided import Guidance

KD = GuideConfig(steps=6, batch_size=16)


def statistics(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if "running" in name}


def expected_statistics(artifact: Artifact, data: Splits) -> dict[str, Tensor]:
    """Of the same network with its norms in training mode, over all training images at once, augmented."""
    network = tiny_task.network(dropout=0.0)
    artifact.load_into(network)
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = 1.0
    network.train()
    images, _ = next(DeviceLoader(data.train, len(data.train), device="cpu", train=True).epoch(0))
    network(images)
    return statistics(network.state_dict())


def test_norms_have_the_statistics_of_the_reconstruction() -> None:
    network, data = tiny_task.network(), tiny_task.splits()
    before = copy.deepcopy(network.state_dict())
    result = compress(network, settings(recalibrate=1), data)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    got, expected = statistics(result.artifact.state_dict()), expected_statistics(result.artifact, data)
    assert got.keys() == expected.keys() and got
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5, msg=name)
        assert not torch.allclose(tensor, before[name], rtol=1e-2)
    for name, tensor in result.artifact.kept.items():
        if name not in got and not name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, before[name]), name
    again = tiny_task.network()
    result.artifact.load_into(again)
    assert result.reconstruction["test"] == answers(again.eval(), data.test).accuracy


def test_the_second_phase_runs_with_them_and_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, dict[str, Tensor]] = {}
    step = Guidance.step

    def watched(self: Guidance) -> Any:
        seen["network"] = statistics(copy.deepcopy(self.network.state_dict()))
        seen["teacher"] = statistics(copy.deepcopy(self.teacher.state_dict()))
        return step(self)

    monkeypatch.setattr(Guidance, "step", watched)
    network, data = tiny_task.network(), tiny_task.splits()
    first = compress(network, settings(recalibrate=1), data)
    second = compress(network, settings(recalibrate=1, guide=KD), data)
    given = statistics(network.state_dict())
    wanted = statistics(first.artifact.state_dict())
    assert all(torch.equal(tensor, given[name]) for name, tensor in seen["teacher"].items())
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in seen["network"].items())
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in statistics(second.artifact.state_dict()).items())


def test_a_start_may_be_recalibrated_or_become_so(tmp_path: Path) -> None:
    network, data = tiny_task.network(), tiny_task.splits()
    at_once = compress(network, settings(recalibrate=1, guide=KD), data).artifact.state_dict()
    for first in (0, 1):
        made = compress(network, settings(recalibrate=first), data).artifact
        made.save(tmp_path / "first.hf")
        start = Artifact.load(tmp_path / "first.hf")
        config = continuation(start, CompressConfig(recalibrate=1, guide=KD, device="cpu"))
        later = compress(network, config, data, start=start).artifact.state_dict()
        assert all(torch.equal(tensor, at_once[name]) for name, tensor in later.items())
        with pytest.raises(ValueError, match="made from another network: its .* has other values"):
            compress(tiny_task.network(seed=1), config, data, start=start)


def test_a_stopped_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    config, calls = settings(recalibrate=1, guide=KD, checkpoint_every=4), 0

    def stop(_made: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 17:
            raise InterruptedError

    arguments = (tiny_task.network(), config, tiny_task.splits())
    with pytest.raises(InterruptedError):
        compress(*arguments, folder=tmp_path, on_step=stop)
    resumed = compress(*arguments, folder=tmp_path, resume=True).artifact.state_dict()
    whole = compress(*arguments).artifact.state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items())


def test_images_are_needed() -> None:
    full = tiny_task.splits()
    empty = dataclasses.replace(full.train, images=full.train.images[:0], labels=full.train.labels[:0])
    for data in (None, Splits(empty, full.val, full.test)):
        with pytest.raises(ValueError, match="recalibrate is 2, but there are no training images.*recalibrate=0"):
            compress(tiny_task.network(), settings(recalibrate=2), data)
    with pytest.raises(ValueError, match="recalibrate is -1; expected at least 0"):
        settings(recalibrate=-1)
    with pytest.raises(ValueError, match="recalibrate is 2, but method='joint' begins with no reconstruction"):
        settings(recalibrate=2, guide=GuideConfig("joint"))
