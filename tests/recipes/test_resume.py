"""A run killed in mid-epoch, in processes of its own and with the default number of threads."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_task
import torch

from hyperfast.recipes import CHECKPOINT, checkpoint

PROGRAM = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import tiny_task
from hyperfast.recipes import train

folder, kill_at = Path(sys.argv[2]), int(sys.argv[3])
data = tiny_task.splits(train=48, val=16, test=16)
settings = tiny_task.config(epochs=2, checkpoint_every=2, log_every=3, ema=0.9)

def kill(step):
    if step == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)

if kill_at:
    train(tiny_task.network(), data, settings, folder=folder / "killed", on_step=kill)
train(tiny_task.network(seed=5), data, settings, folder=folder / "killed", resume=True)
train(tiny_task.network(), data, settings, folder=folder / "whole")
"""


def run(folder: Path, kill_at: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), str(folder), str(kill_at)]
    process = {"capture_output": True, "text": True, "timeout": 240, "env": tiny_task.environment()}
    return subprocess.run(command, check=False, **process)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_run_killed_in_mid_epoch_ends_with_the_same_bits(tmp_path: Path) -> None:
    killed = run(tmp_path, kill_at=5)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    saved = checkpoint.load(tmp_path / "killed" / CHECKPOINT)
    assert saved.metadata["state"]["step"] == 4  # type: ignore[index,call-overload]
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tra')  # as if the line had been cut off
    done = run(tmp_path, kill_at=0)
    assert done.returncode == 0, done.stderr
    for name in (CHECKPOINT, "best.safetensors", "last.safetensors"):
        resumed, whole = (checkpoint.load(tmp_path / run / name).tensors for run in ("killed", "whole"))
        assert resumed.keys() == whole.keys()
        assert [tensor for tensor in whole if not torch.equal(whole[tensor], resumed[tensor])] == []
    resumed_steps, whole_steps = (
        [json.loads(line)["step"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("killed", "whole")
    )
    assert resumed_steps == whole_steps
