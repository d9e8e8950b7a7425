from __future__ import annotations

import json
import logging
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import tiny_task
import torch
from torch import Tensor, nn

from hyperfast import models
from hyperfast.recipes import CHECKPOINT, CrossEntropy, TrainConfig, checkpoint, train
from hyperfast.recipes.trainer import Trainer


class Crash(Exception):
    pass


def crash_at(step: int) -> Any:
    def on_step(done: int) -> None:
        if done == step:
            raise Crash

    return on_step


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in ("ms_per_step", "peak_memory")} for line in lines]


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name, tensor in first.items() if not torch.equal(tensor, second[name])] == []


def test_a_network_learns_and_is_selected_on_validation(tmp_path: Path) -> None:
    model = tiny_task.network()
    result = train(model, tiny_task.splits(), tiny_task.config(epochs=8), folder=tmp_path)
    assert result.test_accuracy_last is not None and result.test_accuracy_last > 0.9
    assert [record.epoch for record in result.history] == list(range(1, 9))
    accuracies = [record.val_accuracy for record in result.history]
    assert result.best_epoch == 1 + accuracies.index(max(accuracies))
    assert result.val_accuracy_best == max(accuracies) and result.val_accuracy_last == accuracies[-1]
    assert result.epochs_to_reach(max(accuracies)) == result.best_epoch
    assert result.epochs_to_reach(1.1) is None
    assert result.steps == 40 and result.ms_per_step > 0 and result.peak_memory > 2**20
    assert_same(dict(result.best_weights), checkpoint.load(tmp_path / "best.safetensors").tensors)
    assert_same(model.state_dict(), checkpoint.load(tmp_path / "last.safetensors").tensors)


def test_metrics_tell_the_whole_story(tmp_path: Path) -> None:
    result = train(tiny_task.network(), tiny_task.splits(), tiny_task.config(), folder=tmp_path)
    lines = metrics(tmp_path)
    assert [(line["kind"], line["step"]) for line in lines[:4]] == [
        ("train", 2), ("train", 4), ("train", 5), ("epoch", 5)
    ]  # fmt: skip
    assert {"loss", "cross_entropy", "accuracy", "grad_norm", "lr", "ms_per_step", "epoch"} <= lines[0].keys()
    assert lines[0]["grad_norm"] > 0 and lines[0]["loss"] == lines[0]["cross_entropy"]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert [line["val_accuracy"] for line in epochs] == [record.val_accuracy for record in result.history]
    first = [line for line in lines if line["kind"] == "train" and line["epoch"] == 1]
    mean = sum(line["loss"] * steps for line, steps in zip(first, (2, 2, 1), strict=True)) / 5
    assert epochs[0]["train_loss"] == pytest.approx(mean)
    assert lines[-1]["kind"] == "result" and lines[-1]["test_accuracy_last"] == result.test_accuracy_last


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(tiny_task.network(), tiny_task.splits(), tiny_task.config(epochs=1))
    assert list(tmp_path.iterdir()) == []


def test_without_validation_and_test_images_the_last_epoch_is_the_best() -> None:
    model = tiny_task.network()
    result = train(model, tiny_task.splits(val=0, test=0), tiny_task.config(epochs=2))
    assert result.best_epoch == 2
    assert result.val_accuracy_best is None and result.test_accuracy_best is None
    assert_same(dict(result.best_weights), model.state_dict())


def test_the_test_set_has_no_say_in_the_selection() -> None:
    one, other = tiny_task.splits(), tiny_task.splits(test=0)
    first = train(tiny_task.network(), one, tiny_task.config())
    second = train(tiny_task.network(), other, tiny_task.config())
    assert first.best_epoch == second.best_epoch
    assert_same(dict(first.best_weights), dict(second.best_weights))


def test_the_global_random_state_is_left_alone_and_does_not_matter() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = train(tiny_task.network(), tiny_task.splits(), tiny_task.config(epochs=1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = train(tiny_task.network(), tiny_task.splits(), tiny_task.config(epochs=1))
    assert_same(dict(first.best_weights), dict(second.best_weights))
    third = train(tiny_task.network(), tiny_task.splits(), tiny_task.config(epochs=1, seed=1))
    assert not torch.equal(first.best_weights["head.1.weight"], third.best_weights["head.1.weight"])


RESUMABLE = [
    {"ema": 0.9},
    {"optimizer": "adamw", "lr": 2e-3, "clip_grad_norm": 0.5, "label_smoothing": 0.1},
    {"amp": "bf16", "channels_last": True, "nesterov": False, "momentum": 0.0},
    {"amp": "fp16"},
]


@pytest.mark.parametrize("changes", RESUMABLE, ids=["sgd, ema", "adamw, clipped", "bf16, channels last", "fp16"])
@pytest.mark.parametrize("crash", [3, 6, 15])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, changes: dict[str, Any], crash: int) -> None:
    settings = tiny_task.config(checkpoint_every=2, log_every=3, **changes)
    whole = tiny_task.network()
    expected = train(whole, tiny_task.splits(), settings, folder=tmp_path / "whole")
    with pytest.raises(Crash):
        train(tiny_task.network(), tiny_task.splits(), settings, folder=tmp_path / "cut", on_step=crash_at(crash))
    # Another initialisation: everything must come from the checkpoint.
    resumed = tiny_task.network(seed=5)
    actual = train(resumed, tiny_task.splits(), settings, folder=tmp_path / "cut", resume=True)
    assert_same(resumed.state_dict(), whole.state_dict())
    assert_same(dict(actual.best_weights), dict(expected.best_weights))
    assert actual.history == expected.history and actual.best_epoch == expected.best_epoch
    assert actual.test_accuracy_best == expected.test_accuracy_best
    assert without_times(metrics(tmp_path / "cut")) == without_times(metrics(tmp_path / "whole"))
    for name in (CHECKPOINT, "best.safetensors", "last.safetensors"):
        first, second = (checkpoint.load(tmp_path / run / name).tensors for run in ("whole", "cut"))
        assert_same(first, second)


def test_a_finished_run_can_be_resumed_to_its_result(tmp_path: Path) -> None:
    first = train(tiny_task.network(), tiny_task.splits(), tiny_task.config(), folder=tmp_path)
    (tmp_path / "best.safetensors").unlink()
    second = train(tiny_task.network(seed=3), tiny_task.splits(), tiny_task.config(), folder=tmp_path, resume=True)
    assert_same(checkpoint.load(tmp_path / "best.safetensors").tensors, dict(first.best_weights))
    assert second.history == first.history and second.test_accuracy_last == first.test_accuracy_last
    assert sum(line["kind"] == "result" for line in metrics(tmp_path)) == 1


@pytest.mark.parametrize("step", [3, 5, 15], ids=["mid-epoch", "last step of an epoch", "last step"])
def test_ctrl_c_finishes_the_step_and_writes_a_checkpoint(tmp_path: Path, step: int) -> None:
    done: list[int] = []

    def press(made: int) -> None:
        done.append(made)
        if made == step:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=rf"stopped after step {step}; resume from .*{CHECKPOINT}"):
        train(tiny_task.network(), tiny_task.splits(), tiny_task.config(), folder=tmp_path / "cut", on_step=press)
    assert done[-1] == step and signal.getsignal(signal.SIGINT) is before
    state: Any = checkpoint.load(tmp_path / "cut" / CHECKPOINT).metadata["state"]
    assert state["step"] == step
    whole, resumed = tiny_task.network(), tiny_task.network(seed=5)
    train(whole, tiny_task.splits(), tiny_task.config(), folder=tmp_path / "whole")
    train(resumed, tiny_task.splits(), tiny_task.config(), folder=tmp_path / "cut", resume=True)
    assert_same(resumed.state_dict(), whole.state_dict())
    assert without_times(metrics(tmp_path / "cut")) == without_times(metrics(tmp_path / "whole"))


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    def press_twice(made: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second Ctrl-C did not interrupt")

    with pytest.raises(KeyboardInterrupt):
        train(tiny_task.network(), tiny_task.splits(), tiny_task.config(), folder=tmp_path, on_step=press_twice)
    assert not (tmp_path / CHECKPOINT).exists()


def test_training_in_another_thread() -> None:
    results: list[Any] = []
    settings = tiny_task.config(epochs=1)
    thread = threading.Thread(target=lambda: results.append(train(tiny_task.network(), tiny_task.splits(), settings)))
    thread.start()
    thread.join()
    assert len(results) == 1


def test_a_full_disk_stops_the_run_and_keeps_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tiny_task.config(checkpoint_every=2)
    real = checkpoint.save_file
    calls = 0

    def full(*args: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise OSError(28, "No space left on device")
        real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(OSError, match=r"could not save .*No space left"):
            train(tiny_task.network(), tiny_task.splits(), settings, folder=tmp_path / "cut")
    assert sorted(file.name for file in (tmp_path / "cut").iterdir()) == [CHECKPOINT, "metrics.jsonl"]
    whole, resumed = tiny_task.network(), tiny_task.network(seed=5)
    train(whole, tiny_task.splits(), settings, folder=tmp_path / "whole")
    train(resumed, tiny_task.splits(), settings, folder=tmp_path / "cut", resume=True)
    assert_same(resumed.state_dict(), whole.state_dict())


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    train(tiny_task.network(), tiny_task.splits(), tiny_task.config(epochs=1), folder=tmp_path)
    with pytest.raises(FileExistsError, match=r"is of another run: resume it \(resume=True\)"):
        train(tiny_task.network(), tiny_task.splits(), tiny_task.config(epochs=1), folder=tmp_path)
    (tmp_path / CHECKPOINT).unlink()
    with pytest.raises(FileExistsError, match=r"best\.safetensors is of another run"):
        train(tiny_task.network(), tiny_task.splits(), tiny_task.config(epochs=1), folder=tmp_path)


def test_resuming_where_there_is_nothing_starts_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        train(tiny_task.network(), tiny_task.splits(), tiny_task.config(epochs=1), folder=tmp_path, resume=True)
    assert "there is nothing to resume" in caplog.text


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    data, settings = tiny_task.splits(), tiny_task.config(epochs=1)
    train(tiny_task.network(), data, settings, folder=tmp_path)
    with pytest.raises(ValueError, match=r"does not fit this Network: head\.1\.weight is \[4, 128\], expected"):
        train(tiny_task.network(width=4), data, settings, folder=tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"lr was 0\.02 and is now 0\.1; seed was 0 and is now 7"):
        other = tiny_task.config(epochs=1, lr=0.1, seed=7)
        train(tiny_task.network(), data, other, folder=tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"train_images was 80 and is now 64"):
        train(tiny_task.network(), tiny_task.splits(train=64), settings, folder=tmp_path, resume=True)
    os.replace(tmp_path / "last.safetensors", tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match="holds weights, not the state of a run"):
        train(tiny_task.network(), data, settings, folder=tmp_path, resume=True)
    whole = (tmp_path / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is cut short"):
        train(tiny_task.network(), data, settings, folder=tmp_path, resume=True)


def test_a_diverged_run_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    model = tiny_task.network()

    def poison(step: int) -> None:
        if step == 7:
            with torch.no_grad():
                model.head[1].weight.fill_(float("nan"))

    settings = tiny_task.config(checkpoint_every=1, log_every=100)
    with pytest.raises(FloatingPointError, match=r"not finite any more after step 7.*clip_grad_norm"):
        train(model, tiny_task.splits(), settings, folder=tmp_path, on_step=poison)
    saved = checkpoint.load(tmp_path / CHECKPOINT)
    assert saved.metadata["state"]["step"] == 6  # type: ignore[index,call-overload]
    assert all(tensor.isfinite().all() for tensor in saved.section("model").values())


def test_weights_that_are_not_finite_are_not_saved_as_the_best(tmp_path: Path) -> None:
    model = tiny_task.network()

    def poison(step: int) -> None:
        if step == 5:
            with torch.no_grad():
                model.head[1].weight.fill_(float("nan"))

    with pytest.raises(FloatingPointError, match="the norm of the weights is not finite any more after step 5"):
        train(model, tiny_task.splits(), tiny_task.config(), folder=tmp_path, on_step=poison)
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_loss_that_is_not_finite_is_reported() -> None:
    with pytest.raises(FloatingPointError, match="the loss is not finite any more after step 2"):
        model = tiny_task.network()
        nn.init.constant_(model.head[1].bias, float("inf"))
        train(model, tiny_task.splits(), tiny_task.config())


def test_data_and_model_must_fit() -> None:
    with pytest.raises(ValueError, match=r"returned \[16, 3\]; expected logits \[16, 4\] or wider, for the 4 classes"):
        train(tiny_task.network(classes=3), tiny_task.splits(), tiny_task.config())
    with pytest.raises(ValueError, match="nothing to train"):
        train(tiny_task.network().requires_grad_(False), tiny_task.splits(), tiny_task.config())
    with pytest.raises(ValueError, match="batch_size is 500"):
        train(tiny_task.network(), tiny_task.splits(), tiny_task.config(batch_size=500))
    with pytest.raises(ValueError, match="resume and tensorboard need a folder"):
        train(tiny_task.network(), tiny_task.splits(), tiny_task.config(), resume=True)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("epochs", 0, "epochs is 0; expected at least 1"),
        ("lr", 0.0, r"lr is 0\.0; expected above 0"),
        ("momentum", 0.0, "expected above 0 with nesterov=True"),
        ("amp", "fp8", "amp is 'fp8'; expected 'none', 'bf16' or 'fp16'"),
        ("optimizer", "lion", "expected 'sgd' or 'adamw'"),
        ("lr_steps", (0.5, 0.4), r"expected rising shares of the training in \(0, 1\), or None"),
        ("lr_steps", (0.5, 1.0), r"expected rising shares"),
        ("warmup_epochs", 50.0, r"expected in \[0, 40\]"),
        ("label_smoothing", 1.0, "label_smoothing is 1"),
        ("ema", 1.0, "ema is 1"),
        ("checkpoint_every", 0, "checkpoint_every is 0; expected above 0, or None"),
    ],
)
def test_settings_that_cannot_be_are_named(setting: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{setting: value})  # type: ignore[arg-type]


def test_devices_that_are_not_there_are_named() -> None:
    with pytest.raises(ValueError, match="device is 'gpu'; use 'auto', 'cpu'"):
        TrainConfig(device="gpu").torch_device()
    with pytest.raises(ValueError, match=r"device is 'cuda:99', but torch sees \d+ CUDA devices"):
        TrainConfig(device="cuda:99").torch_device()


def test_the_loop_reads_the_device_once_per_log_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = 0
    real = Tensor.tolist

    def counted(tensor: Tensor) -> Any:
        nonlocal reads
        reads += 1
        return real(tensor)

    def refused(*args: object) -> Any:
        raise AssertionError("the step waits for the device")

    settings = tiny_task.config(epochs=1, log_every=3)
    trainer = Trainer(tiny_task.network(), CrossEntropy(), tiny_task.splits(), settings)
    monkeypatch.setattr(Tensor, "tolist", counted)
    step = Trainer._step

    def watched(self: Trainer, *args: Any) -> None:
        with monkeypatch.context() as patch:
            for name in ("item", "__bool__", "__float__", "__int__", "tolist", "cpu", "numpy"):
                patch.setattr(Tensor, name, refused)
            step(self, *args)

    monkeypatch.setattr(Trainer, "_step", watched)
    trainer.run()
    assert reads == 2  # after steps 3 and 5


def test_ctrl_c_while_the_test_set_is_measured_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Trainer._result

    def press(self: Trainer) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return measured(self)

    settings = tiny_task.config(epochs=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_result", press)
        train(tiny_task.network(), tiny_task.splits(), settings, folder=tmp_path)
    result = train(tiny_task.network(), tiny_task.splits(), settings, folder=tmp_path, resume=True)
    assert result.test_accuracy_last is not None


def test_the_weights_are_ordinary_ones(tmp_path: Path) -> None:
    model = models.create("resnet8", tiny_task.CLASSES)
    train(model, tiny_task.splits(), tiny_task.config(epochs=1), folder=tmp_path)
    other = models.create("resnet8", tiny_task.CLASSES)
    models.load_weights(other, tmp_path / "last.safetensors")
    assert_same(other.state_dict(), model.state_dict())


def test_a_progress_bar_and_a_compiled_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled: list[nn.Module] = []

    def compile(model: nn.Module) -> Any:
        compiled.append(model)
        return model

    monkeypatch.setattr(torch, "compile", compile)
    model = tiny_task.network()
    train(model, tiny_task.splits(), tiny_task.config(epochs=1, compile=True), progress=True)
    assert compiled == [model]
    assert "5/5" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("changes", [{}, {"ema": 0.9, "clip_grad_norm": 1.0}, {"amp": "bf16", "channels_last": True}])
def test_no_step_waits_for_the_gpu(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer._step

    def watched(self: Trainer, *args: Any) -> None:
        if self.state.step > 2:  # the first ones set up cuDNN and the optimiser's state
            torch.cuda.set_sync_debug_mode("error")
        try:
            step(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "_step", watched)
    result = train(tiny_task.network(), tiny_task.splits(), tiny_task.config(device="cuda", **changes))
    assert result.steps == 15


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("changes", [{"ema": 0.9}, {"amp": "fp16", "optimizer": "adamw", "lr": 2e-3}])
def test_a_run_on_the_gpu_can_be_resumed(tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = tiny_task.config(device="cuda", checkpoint_every=2, **changes)
    with pytest.raises(Crash):
        train(tiny_task.network(), tiny_task.splits(), settings, folder=tmp_path, on_step=crash_at(9))
    result = train(tiny_task.network(seed=5), tiny_task.splits(), settings, folder=tmp_path, resume=True)
    assert result.steps == 15 and result.test_accuracy_last is not None and result.test_accuracy_last > 0.5
