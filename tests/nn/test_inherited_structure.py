"""Inherited networks from a description and weights, without their teacher."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from hyperfast import models
from hyperfast.nn import InheritedConv2d, build_inherited, check_gates, fold, inherit, inherited_layers


def teacher() -> nn.Module:
    torch.manual_seed(0)
    return models.create("resnet8", 5, width=4).eval()


@pytest.mark.parametrize("gate_input", ["compressed", "input"])
def test_a_description_and_weights_are_the_whole_network(gate_input: str) -> None:
    options: Any = {"rank": 2, "heads": 2, "gate_input": gate_input, "only_smaller": False}
    student, report = inherit(teacher(), **options)
    layers = json.loads(json.dumps(inherited_layers(student)))
    assert list(layers) == [row.name for row in report.rows if row.reason is None]
    assert layers["layer1.0.conv1"] == {"rank": 2, "heads": 2, "gate_input": gate_input}
    again = build_inherited(teacher(), layers)
    check_gates(again, student.state_dict(), "file")
    again.load_state_dict(student.state_dict())
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(again(x), student(x)) and not again.training
    # The geometry is that of the layers: a stride of 2 among them.
    assert isinstance(again.get_submodule("layer2.0.conv1"), InheritedConv2d)


def test_folded_layers() -> None:
    student, _ = inherit(teacher(), rank=2, heads=1)
    layers = {name: {**values, "folded": True} for name, values in inherited_layers(student).items()}
    plain = build_inherited(teacher(), layers)
    plain.load_state_dict(fold(student).state_dict())
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(plain(x), student(x))
    assert inherited_layers(plain) == {}


def test_layers_that_the_model_does_not_have() -> None:
    values = {"rank": 2, "heads": 1, "gate_input": "compressed"}
    with pytest.raises(ValueError, match="'layer9' is to be inherited, but this ResNet has no such layer"):
        build_inherited(teacher(), {"layer9": values})
    with pytest.raises(ValueError, match="'bn1' is to be inherited, but this ResNet has a BatchNorm2d there"):
        build_inherited(teacher(), {"bn1": values})


@pytest.mark.parametrize("other", [{"rank": 3}, {"heads": 2}, {"gate_input": "input"}])
def test_gates_of_another_width_are_named(other: dict[str, object]) -> None:
    options = {"rank": 2, "heads": 3, "only_smaller": False, "exclude": ["conv1"]}
    student, _ = inherit(teacher(), **options)  # type: ignore[arg-type]
    another, _ = inherit(teacher(), **{**options, **other})  # type: ignore[arg-type]
    message = (
        r"file: the gate of layer 'layer1.0.conv1' is \[\d, \d\]; rank 2, 3 heads and gate_input='compressed' make it "
        r"\[3, 2\]"
    )
    with pytest.raises(ValueError, match=message):
        check_gates(student, another.state_dict(), "file")
