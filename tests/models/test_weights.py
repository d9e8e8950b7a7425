"""Loading weights of other projects, and refusing what is not theirs."""

import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hyperfast import models


def small(num_classes=10, shortcut="A", width=4):
    return models.resnet8(num_classes, width=width, shortcut=shortcut)


def assert_same(model, state):
    found = model.state_dict()
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def state():
    model = small()
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape) * 10)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_safetensors_and_their_metadata(tmp_path, state):
    save_file(state, tmp_path / "weights.safetensors", {"mean": "0.1,0.2,0.3", "shortcut": "A"})
    model = small()
    assert models.load_weights(model, tmp_path / "weights.safetensors") == {"mean": "0.1,0.2,0.3", "shortcut": "A"}
    assert_same(model, state)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("nest", [None, "state_dict", "model"])
def test_torch_files_bare_and_nested(tmp_path, state, zipped, nest):
    content = {nest: state, "epoch": 7, "best": 91.5, "optimizer": {}} if nest else state
    torch.save(content, tmp_path / "weights.bin", _use_new_zipfile_serialization=zipped)
    model = small()
    assert models.load_weights(model, str(tmp_path / "weights.bin")) == ({"epoch": "7", "best": "91.5"} if nest else {})
    assert_same(model, state)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_taken_off(tmp_path, state, prefix):
    torch.save({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "weights.pt")
    model = small()
    models.load_weights(model, tmp_path / "weights.pt")
    assert_same(model, state)


def test_a_wrapped_model_takes_bare_weights(tmp_path, state):
    torch.save(state, tmp_path / "weights.pt")
    model = nn.DataParallel(small())
    models.load_weights(model, tmp_path / "weights.pt")
    assert_same(model.module, state)


def test_a_module_that_is_called_module_keeps_its_name(tmp_path):
    first, second = (nn.ModuleDict({"module": nn.Linear(2, 2), "head": nn.Linear(2, 2)}) for _ in range(2))
    torch.save(first.state_dict(), tmp_path / "weights.pt")
    models.load_weights(second, tmp_path / "weights.pt")
    assert_same(second, first.state_dict())


@pytest.mark.parametrize("theirs", ["fc", "linear", "classifier"])
def test_the_classifier_s_name_and_missing_batch_counts_are_bridged(tmp_path, state, theirs):
    renamed = {name.replace("fc.", f"{theirs}."): tensor for name, tensor in state.items() if "num_batches" not in name}
    save_file(renamed, tmp_path / "weights.safetensors")
    model = small()
    models.load_weights(model, tmp_path / "weights.safetensors")
    assert torch.equal(model.fc.weight, state["fc.weight"])
    assert torch.equal(model.bn1.running_mean, state["bn1.running_mean"])
    assert model.bn1.num_batches_tracked == 0


def test_tensors_are_converted_to_the_model_s_dtype(tmp_path, state):
    save_file({name: tensor.half() for name, tensor in state.items()}, tmp_path / "weights.safetensors")
    model = small()
    models.load_weights(model, tmp_path / "weights.safetensors")
    assert torch.equal(model.fc.weight, state["fc.weight"].half().float())


def test_another_architecture_is_described_and_nothing_is_changed(tmp_path):
    save_file(models.resnet20(100, shortcut="B").state_dict(), tmp_path / "weights.safetensors")
    model = small(width=16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="holds the weights of another architecture than this ResNet") as caught:
        models.load_weights(model, tmp_path / "weights.safetensors")
    message = str(caught.value)
    # Two more blocks in each of three stages, with 12 entries each, and two shortcuts with 6.
    assert "84 unexpected in the file: layer1.1.bn1.bias, " in message
    assert "2 of another shape in the file: fc.weight ([100, 64] for [10, 64]), fc.bias ([100] for [10])" in message
    assert "shortcut='B'" in message
    assert max(line.count("layer") for line in message.splitlines()) == 5
    assert_same(model, before)


def test_missing_weights_are_counted(tmp_path, state):
    del state["conv1.weight"], state["layer3.0.bn2.running_var"]
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"2 missing from the file: conv1\.weight, layer3\.0\.bn2\.running_var$"):
        models.load_weights(small(), tmp_path / "weights.safetensors")


@pytest.mark.parametrize("kind", ["safetensors", "zip", "pickle"])
@pytest.mark.parametrize("kept", [0, 5, 9, 100, 0.5, -1])
def test_a_truncated_checkpoint_is_refused(tmp_path, state, kind, kept):
    path = tmp_path / "weights"
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(
        ValueError, match=r"weights \([\d,]+ bytes\) is not a checkpoint hyperfast can read: it is trunc"
    ):
        models.load_weights(small(), path)


@pytest.mark.parametrize(
    "content", [b"\x89PNG\r\n\x1a\n" + bytes(100), b"epoch,loss\n1,2\n", b"PK\x03\x04" + bytes(50), bytes(4096)]
)
def test_a_foreign_file_is_refused(tmp_path, content):
    (tmp_path / "foreign.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"foreign\.pt .* is not a checkpoint hyperfast can read"):
        models.read_checkpoint(tmp_path / "foreign.pt")


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(2), {"epoch": 3}, {"weight": [1.0]}, {3: torch.zeros(2)}])
def test_a_torch_file_of_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="is not a checkpoint hyperfast can read"):
        models.read_checkpoint(tmp_path / "other.pt")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path):
    torch.save({"weight": Payload(tmp_path / "hacked")}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="is not a checkpoint hyperfast can read"):
        models.read_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "hacked").exists()


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nothing\.pt"):
        models.read_checkpoint(tmp_path / "nothing.pt")
    with pytest.raises(FileNotFoundError, match="it is a folder"):
        models.read_checkpoint(tmp_path)
