"""CIFAR in both official layouts, whole and damaged."""

import logging
import os
import pickle

import numpy as np
import pytest
import torch

from hyperfast import data
from hyperfast.data import read_cifar

from .pickles import py2_batch

BATCHES = [f"data_batch_{k}" for k in range(1, 6)]


def batch(seed, classes, count=4):
    random = np.random.RandomState(seed)
    return random.randint(0, 256, (count, 3072)).astype(np.uint8), random.randint(0, classes, count).astype(np.uint8)


def write_binary(root, classes=10):
    """A tiny set in the binary layout; returns its folder."""
    folder = root / ("cifar-10-batches-bin" if classes == 10 else "cifar-100-binary")
    folder.mkdir(parents=True)
    for seed, name in enumerate([*BATCHES, "test_batch"] if classes == 10 else ["train", "test"]):
        images, labels = batch(seed, classes)
        columns = [labels[:, None], images] if classes == 10 else [labels[:, None] // 5, labels[:, None], images]
        np.concatenate(columns, 1).tofile(folder / f"{name}.bin")
    return folder


def write_pickled(root, classes=10, *, python2=False):
    """The same set in the pickled layout; returns its folder."""
    folder = root / ("cifar-10-batches-py" if classes == 10 else "cifar-100-python")
    folder.mkdir(parents=True)
    key = "labels" if classes == 10 else "fine_labels"
    for seed, name in enumerate([*BATCHES, "test_batch"] if classes == 10 else ["train", "test"]):
        images, labels = batch(seed, classes)
        if python2:
            content = py2_batch(images, labels.tolist(), key.encode())
        else:
            content = pickle.dumps({"data": images, key: labels.tolist()})
        (folder / name).write_bytes(content)
    return folder


def assert_whole(splits, classes=10):
    names = [*BATCHES, "test_batch"] if classes == 10 else ["train", "test"]
    expected = [batch(seed, classes) for seed in range(len(names))]
    for part, batches in ((splits.train, expected[:-1]), (splits.test, expected[-1:])):
        assert np.array_equal(part.images.flatten(1).numpy(), np.concatenate([images for images, _ in batches]))
        assert part.labels.tolist() == np.concatenate([labels for _, labels in batches]).tolist()
        assert part.images.shape[1:] == (3, 32, 32)
        assert len(part.classes) == classes
    assert len(splits.val) == 0


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("form", ["binary", "pickled", "python2"])
@pytest.mark.parametrize("inside", [False, True])
def test_both_layouts_read_alike(tmp_path, classes, form, inside):
    if form == "binary":
        folder = write_binary(tmp_path, classes)
    else:
        folder = write_pickled(tmp_path, classes, python2=form == "python2")
    assert_whole(read_cifar(folder if inside else tmp_path, classes), classes)


def test_labels_may_be_an_array(tmp_path):
    folder = write_pickled(tmp_path)
    images, labels = batch(0, 10)
    (folder / "data_batch_1").write_bytes(pickle.dumps({"data": images, "labels": labels.astype(np.int64)}))
    assert_whole(read_cifar(tmp_path))


def test_load_sets_validation_images_apart(tmp_path):
    write_binary(tmp_path)
    splits = data.load("cifar10", tmp_path, val_fraction=5)
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [15, 5, 4]
    assert torch.equal(splits.test.images, read_cifar(tmp_path).test.images)


def test_fewer_images_than_the_official_set_are_reported(tmp_path, caplog):
    write_binary(tmp_path, 100)
    with caplog.at_level(logging.WARNING):
        read_cifar(tmp_path, 100)
    assert "has 4 training images; the official set has 50000" in caplog.text
    assert "has 4 test images; the official set has 10000" in caplog.text


def test_no_set_lists_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no CIFAR-10 at .*; looked for .*kriz") as caught:
        read_cifar(tmp_path)
    for place in (
        tmp_path / "cifar-10-batches-bin" / "data_batch_1.bin",
        tmp_path / "data_batch_1.bin",
        tmp_path / "cifar-10-batches-py" / "data_batch_1",
        tmp_path / "data_batch_1",
    ):
        assert str(place) in str(caught.value)
    with pytest.raises(FileNotFoundError, match="CIFAR-100 needs root, the folder that holds cifar-100-binary or"):
        read_cifar(None, 100)


def test_missing_batches_are_listed_or_allowed(tmp_path, caplog):
    folder = write_binary(tmp_path)
    for k in (2, 5):
        (folder / f"data_batch_{k}.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no data_batch_2.bin, data_batch_5.bin; pass allow_missing=True"):
        read_cifar(tmp_path)
    splits = data.load("cifar10", tmp_path, allow_missing=True, val_fraction=0)
    assert len(splits.train) == 12
    assert "going on without data_batch_2.bin, data_batch_5.bin" in caplog.text
    (folder / "test_batch.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no test_batch.bin$"):
        read_cifar(tmp_path, allow_missing=True)


@pytest.mark.parametrize("lost", [1, 3072, 5000])
def test_a_binary_file_cut_short(tmp_path, lost):
    path = write_binary(tmp_path) / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-lost])
    whole, rest = divmod(4 * 3073 - lost, 3073)
    message = (
        rf"data_batch_3.bin is cut short: {4 * 3073 - lost:,} bytes are {whole} records of 3,073 bytes and {rest:,} mo"
    )
    with pytest.raises(ValueError, match=message):
        read_cifar(tmp_path)


@pytest.mark.parametrize("kept", [0, 1, 0.5, -1])
def test_a_pickled_file_cut_short(tmp_path, kept):
    path = write_pickled(tmp_path) / "data_batch_3"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match="data_batch_3 cannot be read: it is cut short or not a pickle"):
        read_cifar(tmp_path)


def test_an_empty_binary_file(tmp_path):
    (write_binary(tmp_path) / "test_batch.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"test_batch.bin is cut short: 0 bytes"):
        read_cifar(tmp_path)


def test_labels_out_of_range_in_a_binary_file(tmp_path):
    path = write_binary(tmp_path) / "data_batch_4.bin"
    content = bytearray(path.read_bytes())
    content[2 * 3073] = 10
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"data_batch_4.bin: label 10 of image 2 is out of range 0 to 9 \(1 of 4 are\)"
    ):
        read_cifar(tmp_path)


@pytest.mark.parametrize(
    ("column", "value", "message"), [(0, 20, "coarse label 20 .* 0 to 19"), (1, 100, "label 100 .* 99")]
)
def test_labels_out_of_range_in_cifar100(tmp_path, column, value, message):
    path = write_binary(tmp_path, 100) / "train.bin"
    content = bytearray(path.read_bytes())
    content[column] = value
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_cifar(tmp_path, 100)


IMAGES = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"data": IMAGES, "labels": [0, -1]}, "label -1 of image 1 is out of range 0 to 9"),
        ({"data": IMAGES, "labels": [0, 2**70]}, "the labels are object"),
        ({"data": IMAGES, "labels": [0, 1.5]}, "the labels are a list; expected a list of whole numbers"),
        ({"data": IMAGES, "labels": "cats"}, "the labels are a str; expected a list of whole numbers"),
        ({"data": IMAGES, "labels": [1, 2, 3]}, r"'data' is uint8 \[2, 3072\]; expected uint8 \[3, 3072\]"),
        ({"data": IMAGES.astype(np.int64), "labels": [1, 2]}, r"'data' is int64 \[2, 3072\]; expected uint8"),
        ({"data": [1, 2], "labels": [1, 2]}, "'data' is list; expected uint8"),
        ({"data": IMAGES, "fine_labels": [1, 2]}, "has no 'labels'; it has data, fine_labels"),
        ({}, "has no 'data'; it has nothing"),
        ([IMAGES], "holds a list; expected a dict with 'data' and 'labels'"),
    ],
)
def test_a_pickle_of_something_else(tmp_path, content, message):
    (write_pickled(tmp_path) / "data_batch_2").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=rf"data_batch_2.*{message}"):
        read_cifar(tmp_path)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_malicious_pickle_names_what_it_wanted_and_does_not_run(tmp_path):
    images, labels = batch(0, 10)
    content = {"data": images, "labels": labels.tolist(), "filenames": [Payload(tmp_path / "hacked")]}
    (write_pickled(tmp_path) / "test_batch").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=rf"test_batch cannot be read: it asks for {os.system.__module__}\.system"):
        read_cifar(tmp_path)
    assert not (tmp_path / "hacked").exists()


def test_classes_is_10_or_100(tmp_path):
    with pytest.raises(ValueError, match="classes is 20; CIFAR has 10 or 100"):
        read_cifar(tmp_path, 20)
