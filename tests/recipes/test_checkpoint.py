from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from hyperfast.recipes import checkpoint


def test_tensors_and_metadata_come_back(tmp_path: Path) -> None:
    tensors = {"a/w": torch.randn(3, 4), "b": torch.arange(5), "empty": torch.empty(0), "half": torch.ones(2).half()}
    checkpoint.save(tmp_path / "new" / "c.safetensors", tensors, {"epoch": 3, "share": 0.1, "list": [1, None, "x"]})
    loaded = checkpoint.load(tmp_path / "new" / "c.safetensors")
    assert loaded.metadata == {"epoch": 3, "share": 0.1, "list": [1, None, "x"]}
    assert loaded.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors[name], tensor)
    assert torch.equal(loaded.section("a")["w"], tensors["a/w"])


def test_shared_and_strided_tensors_can_be_saved(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    tensors = {"whole": base, "again": base, "row": base[1], "transposed": base.T}
    checkpoint.save(tmp_path / "c", tensors)
    loaded = checkpoint.load(tmp_path / "c")
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in tensors.items())


def test_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    tensors = {"w": torch.ones(3)}
    checkpoint.save(tmp_path / "a", tensors, {"x": 1, "y": 2})
    checkpoint.save(tmp_path / "b", tensors, {"y": 2, "x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_size_is_that_of_the_file(tmp_path: Path) -> None:
    tensors, metadata = {"w": torch.ones(3, 5), "half": torch.ones(7).half()}, {"note": "é", "list": [1, 2]}
    checkpoint.save(tmp_path / "c", tensors, metadata)
    assert checkpoint.size(tensors, metadata) == (tmp_path / "c").stat().st_size


def test_metadata_of_other_readers_are_written_as_they_are(tmp_path: Path) -> None:
    checkpoint.write(tmp_path / "c", {"w": torch.ones(3)}, {"model": "resnet8"})
    with safe_open(tmp_path / "c", framework="pt") as file:
        assert file.metadata() == {"model": "resnet8"}


def test_a_description_that_is_no_json(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "c", metadata={"hyperfast": "{"})
    with pytest.raises(ValueError, match="c was changed after it was written: its description is no JSON"):
        checkpoint.load(tmp_path / "c")


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.safetensors"
    checkpoint.save(path, {"w": torch.ones(3)})

    def full(tensors: object, file: Path, metadata: object = None) -> None:
        file.write_bytes(b"half a")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match=r"could not save .*No space left.*What was there before is unchanged") as caught:
        checkpoint.save(path, {"w": torch.zeros(3)})
    assert caught.value.errno == errno.ENOSPC
    assert [file.name for file in tmp_path.iterdir()] == ["c.safetensors"]
    assert torch.equal(checkpoint.load(path).tensors["w"], torch.ones(3))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="file size limits are POSIX")
def test_a_real_write_error_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    checkpoint.save(path, {"w": torch.ones(3)})
    code = f"""
import resource, torch
from hyperfast.recipes import checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    checkpoint.save({str(path)!r}, {{"w": torch.zeros(100_000)}})
except OSError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert "refused: could not save" in done.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["c.safetensors"]
    assert torch.equal(checkpoint.load(path).tensors["w"], torch.ones(3))


def test_what_a_killed_save_left_is_cleared_away(tmp_path: Path) -> None:
    litter = tmp_path / ".c.safetensors.tmp"
    litter.mkdir()
    (litter / "half").write_bytes(b"half a checkpoint")
    checkpoint.save(tmp_path / "c.safetensors", {"w": torch.ones(3)})
    assert [file.name for file in tmp_path.iterdir()] == ["c.safetensors"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_the_file_has_the_permissions_that_the_user_asks_for(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", {"w": torch.ones(3)})
    (tmp_path / "other").touch()
    assert (tmp_path / "c").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_missing_truncated_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no checkpoint at"):
        checkpoint.load(tmp_path / "none")
    whole = tmp_path / "whole"
    checkpoint.save(whole, {"w": torch.ones(1000)})
    for length in (0, 5, 50, 2000):
        (tmp_path / "cut").write_bytes(whole.read_bytes()[:length])
        with pytest.raises(ValueError, match="cut is cut short or is not a safetensors file"):
            checkpoint.load(tmp_path / "cut")
    torch.save({"w": torch.ones(3)}, tmp_path / "pickled")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        checkpoint.load(tmp_path / "pickled")
    save_file({"w": torch.ones(3)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match=r"hyperfast did not write it.*load_weights reads plain weights"):
        checkpoint.load(tmp_path / "foreign")


def test_a_later_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "VERSION", 99)
        checkpoint.save(tmp_path / "c", {"w": torch.ones(3)})
    with pytest.raises(ValueError, match="checkpoint format 99; this hyperfast reads format 1"):
        checkpoint.load(tmp_path / "c")


def test_another_architecture_is_named() -> None:
    source = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"run\.st does not fit this Sequential: 0\.weight is \[4, 3\], expected \[5"):
        checkpoint.load_module(nn.Sequential(nn.Linear(3, 5, bias=False)), {"0.weight": torch.ones(4, 3)}, "run.st")
    with pytest.raises(ValueError, match=r"1\.bias does not belong here; 1\.weight does not belong here"):
        checkpoint.load_module(nn.Sequential(nn.Linear(3, 4)), source.state_dict(), "run.st")
    with pytest.raises(ValueError, match=r"0\.bias is missing"):
        checkpoint.load_module(source, {}, "run.st")


def test_random_state_comes_back() -> None:
    device = torch.device("cpu")
    with torch.random.fork_rng([]):
        state = checkpoint.rng_state(device)
        first = torch.rand(5)
        checkpoint.restore_rng_state(state, device)
        assert torch.equal(torch.rand(5), first)
