from __future__ import annotations

import pytest
import tiny_task
import torch
import torch.nn.functional as F

from hyperfast.data import DeviceLoader
from hyperfast.recipes import evaluate
from hyperfast.recipes.cost import Stopwatch, peak_memory, reset_peak_memory

CPU = torch.device("cpu")


@pytest.mark.parametrize("batch_size", [7, 24])
def test_accuracy_and_loss_over_all_images(batch_size: int) -> None:
    model = tiny_task.network()
    loader = DeviceLoader(tiny_task.image_set(24, 2), batch_size, device=CPU, train=False)
    found = evaluate(model, loader.epoch(), CPU)
    model.eval()
    batches = list(loader.epoch())
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    logits = model(images)
    assert found.images == 24
    assert found.accuracy == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert found.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def test_the_mode_and_the_statistics_of_the_model_are_left_alone() -> None:
    model = tiny_task.network().train()
    before = model.layer1[1].running_mean.clone()
    evaluate(model, DeviceLoader(tiny_task.image_set(8, 2), 8, device=CPU, train=False).epoch(), CPU)
    assert model.training and torch.equal(model.layer1[1].running_mean, before)


def test_no_images() -> None:
    with pytest.raises(ValueError, match="no images"):
        evaluate(tiny_task.network(), [], CPU)


def test_peak_memory_sees_a_large_tensor() -> None:
    reset_peak_memory(CPU)
    before = peak_memory(CPU)
    torch.ones(64 * 2**20, dtype=torch.uint8).sum()
    assert peak_memory(CPU) >= before
    assert before > 2**20


def test_a_pause_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    watch = Stopwatch(CPU)
    assert watch.lap() is None
    now = 103.0
    with watch.paused():
        now = 110.0
    watch.tick()
    watch.tick()
    assert watch.lap() == 1500.0
