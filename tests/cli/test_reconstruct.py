"""`hyperfast reconstruct`: the file is all that it needs."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import compressed
import pytest
import torch
from safetensors.torch import load_file

from hyperfast import models
from hyperfast.cli import main
from hyperfast.recipes import Artifact, checkpoint

pytest.importorskip("tyro")


@pytest.mark.parametrize("weights", ["fp32", "fp16", "int8"])
def test_an_ordinary_network(weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = compressed.write(tmp_path)
    file = files.compressed("net.hf.safetensors", weights=weights, mean=[0.25], std=None)
    files.original.unlink()
    out = tmp_path / "new" / "again.safetensors"
    assert main(["reconstruct", str(file), "--out", str(out)]) == 0
    plain = models.create("resnet8", **compressed.OPTIONS)
    assert models.load_weights(plain, out) == {"model": "resnet8", "classes": "10", "mean": "0.25"}
    artifact = Artifact.load(file)
    expected = artifact.build().eval()
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(plain.eval()(images), expected(images))
    printed = capsys.readouterr().out
    assert str(artifact.size_report()) in printed and f"parameters, {weights})" in printed
    assert f"{out}: {out.stat().st_size:,} bytes" in printed


def test_the_same_file_gives_the_same_weights(tmp_path: Path) -> None:
    file = compressed.write(tmp_path).compressed("net.hf.safetensors", weights="int8")
    outs = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for out in outs:
        assert main(["reconstruct", str(file), "--out", str(out)]) == 0
    first, second = (load_file(out) for out in outs)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_what_cannot_be_reconstructed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = compressed.write(tmp_path)
    file = files.compressed("net.hf.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-9])
    before = sorted(tmp_path.iterdir())
    for given, out, message in (
        ("none", "x.safetensors", "there is no checkpoint at"),
        ("cut.safetensors", "x.safetensors", "is cut short or is not a safetensors file"),
        ("original.safetensors", "x.safetensors", "hyperfast did not write it"),
        ("net.hf.safetensors", "x.pt", "let it end in .safetensors"),
        ("net.hf.safetensors", "../" + tmp_path.name + "/net.hf.safetensors", "--out is the compressed file itself"),
    ):
        assert main(["reconstruct", str(tmp_path / given), "--out", str(tmp_path / out)]) == 2
        assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = compressed.write(tmp_path)
    file = files.compressed("net.hf.safetensors")
    before = load_file(files.original)

    def full(tensors: object, file: Path, metadata: object = None) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_file", full)
    assert main(["reconstruct", str(file), "--out", str(files.original)]) == 2
    assert "What was there before is unchanged" in capsys.readouterr().err
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_file(files.original).items())
