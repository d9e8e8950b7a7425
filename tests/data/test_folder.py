"""Image trees, in order and out of it."""

import sys

import numpy as np
import pytest
import torch

from hyperfast import data
from hyperfast.data import read_folder

Image = pytest.importorskip("PIL.Image")


def write(path, value, size=(8, 8), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


def values(part):
    """(class, value of the first channel) of every image, in order."""
    return [(part.classes[label], image[0, 0, 0].item()) for image, label in zip(part.images, part.labels, strict=True)]


@pytest.fixture
def tree(tmp_path):
    """Two classes of ten images each, written out of order."""
    for k in reversed(range(10)):
        write(tmp_path / "dog" / f"{k}.png", (k, 0, 0))
        write(tmp_path / "cat" / f"{k}.png", (100 + k, 0, 0))
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "cat" / "._0.png").write_bytes(b"not an image either")
    (tmp_path / ".cache").mkdir()
    return tmp_path


def test_class_folders_in_the_order_of_names(tree):
    splits = read_folder(tree, size=8)
    assert splits.train.classes == ("cat", "dog")
    everything = values(splits.train) + values(splits.test)
    assert sorted(everything) == [("cat", 100 + k) for k in range(10)] + [("dog", k) for k in range(10)]
    assert values(splits.train) == sorted(values(splits.train))
    assert torch.bincount(splits.test.labels).tolist() == [2, 2]
    assert (splits.train.images.shape, len(splits.val)) == ((16, 3, 8, 8), 0)
    assert splits.train.mean[0] == pytest.approx((splits.train.images[:, 0].double() / 255).mean().item())


def test_load_sets_validation_images_apart_and_keeps_the_test_images(tree):
    first, second = (data.load("folder", tree, size=8, val_fraction=0.25, seed=seed) for seed in (0, 1))
    assert [len(part) for part in (first.train, first.val, first.test)] == [12, 4, 4]
    assert values(first.test) == values(second.test)
    assert not set(values(first.val)) & set(values(first.test) + values(first.train))


@pytest.mark.parametrize("parts", [("train", "test"), ("train", "val"), ("train", "val", "test")])
def test_folders_of_splits(tmp_path, parts):
    for number, part in enumerate(parts):
        write(tmp_path / part / "cat" / "a.png", (number, 0, 0))
        write(tmp_path / part / "dog" / "a.png", (10 + number, 0, 0))
    splits = read_folder(tmp_path, size=8)
    last = len(parts) - 1
    assert values(splits.train) == [("cat", 0), ("dog", 10)]
    assert values(splits.test) == [("cat", last), ("dog", 10 + last)]
    assert values(splits.val) == ([("cat", 1), ("dog", 11)] if len(parts) == 3 else [])


def test_a_training_folder_alone_is_divided(tree, tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    tree.rename(root / "train")
    assert values(read_folder(root, size=8).test) == values(read_folder(root / "train", size=8).test)


def test_train_may_be_a_class(tmp_path):
    for name in ("train", "car"):
        for k in range(3):
            write(tmp_path / name / f"{k}.png", (k, 0, 0))
    assert read_folder(tmp_path, size=8).train.classes == ("car", "train")


def test_images_are_scaled_cut_to_a_square_and_converted(tmp_path):
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, :2] = pixels[:, 6:] = 255  # outside the central square
    pixels[:, 2:6] = (10, 20, 30)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "wide.png")
        write(tmp_path / name / "grey.png", 7, mode="L")
    colour = read_folder(tmp_path, size=4, test_fraction=0.5)
    wide = [image for part in (colour.train, colour.test) for image in part.images if image[0, 0, 0] != 7]
    assert len(wide) == 2
    for image in wide:
        assert image.flatten(1).unique(dim=1).flatten().tolist() == [10, 20, 30]
    grey = read_folder(tmp_path, size=4, channels=1)
    assert grey.train.images.shape[1:] == (1, 4, 4)
    assert set(grey.train.images.flatten().tolist()) | set(grey.test.images.flatten().tolist()) == {7, 18}


def test_no_folder_and_no_classes(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder at .*nowhere"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no folders; put the images of each class in a folder of its own"):
        read_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="folder needs root"):
        read_folder(None)


def test_an_empty_class(tree):
    (tree / "emu").mkdir()
    with pytest.raises(ValueError, match="emu has no images; add some, or remove the folder"):
        read_folder(tree)


def test_too_few_images_to_set_a_test_set_apart(tmp_path):
    write(tmp_path / "cat" / "a.png", (0, 0, 0))
    with pytest.raises(ValueError, match=r"has 1 images; with test_fraction 0\.2 none is left to train with"):
        read_folder(tmp_path)


def test_an_unreadable_image_is_named(tree):
    (tree / "dog" / "7.png").write_bytes((tree / "dog" / "7.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"7\.png cannot be read as an image"):
        read_folder(tree)


def test_classes_of_the_test_folder_must_be_known(tmp_path):
    for part, name in (("train", "cat"), ("test", "dgo")):
        write(tmp_path / part / name / "a.png", (0, 0, 0))
    with pytest.raises(ValueError, match="test has classes that the training folder has not: dgo"):
        read_folder(tmp_path)
    (tmp_path / "test" / "dgo" / "a.png").unlink()
    (tmp_path / "test" / "dgo").rmdir()
    with pytest.raises(ValueError, match="test has no images of cat"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"channels": 4}, "channels is 4; choose 3"),
        ({"size": 0}, "size is 0"),
        ({"test_fraction": 1.0}, "test_fraction is 1.0; give a fraction between 0 and 1"),
    ],
)
def test_impossible_options(tree, option, message):
    with pytest.raises(ValueError, match=message):
        read_folder(tree, **option)


def test_without_pillow_the_extra_is_named(tree, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'hyperfast\[images\]'"):
        read_folder(tree)
