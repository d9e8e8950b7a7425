"""RepVGG in its two forms."""

import pytest
import torch
from torch import nn

import hyperfast
from hyperfast import models
from hyperfast.surgery import freeze


def trained(name="repvgg_a0", dtype=torch.float32, **options):
    """A network with running statistics and affine parameters that matter, in eval mode."""
    model = models.create(name, num_classes=7, **options).to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.2)
            nn.init.normal_(module.bias, 0.0, 0.2)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, 16, 16, dtype=dtype) * 2 + 1)
    return model.eval()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("name", ["repvgg_a0", "repvgg_a2"])
def test_the_fused_network_answers_the_same(name, dtype, tolerance):
    model = trained(name, dtype, width=8)
    images = torch.randn(3, 3, 32, 32, dtype=dtype)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    fused = model.fuse()
    expected = model(images)
    assert expected.std() > 1e-2
    torch.testing.assert_close(fused(images), expected, rtol=tolerance, atol=tolerance)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert sum(isinstance(module, nn.Conv2d) for module in fused.modules()) == 22
    assert {tensor.dtype for tensor in fused.state_dict().values()} == {dtype}
    assert not fused.training
    # The original is left alone.
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_block_is_the_sum_of_its_branches():
    block = trained(width=8).stage1[1]
    x = torch.randn(2, 8, 6, 6)
    dense = block.rbr_dense.bn(block.rbr_dense.conv(x))
    total = dense + block.rbr_1x1.bn(block.rbr_1x1.conv(x)) + block.rbr_identity(x)
    torch.testing.assert_close(block(x), total.relu())
    with hyperfast.taps(block, at="activations") as taps:
        block(x)
    torch.testing.assert_close(next(iter(taps.student.values())), total)


def test_an_identity_branch_is_where_shapes_agree():
    blocks = {
        path for path, module in models.repvgg_a2(width=8).named_modules() if path.endswith("rbr_identity") and module
    }
    expected = {f"stage{stage}.{i}" for stage, depth in ((1, 2), (2, 4), (3, 14)) for i in range(1, depth)}
    assert {path.removesuffix(".rbr_identity") for path in blocks} == expected


def test_both_forms_of_the_weights_load(tmp_path):
    model = trained(width=8)
    images = torch.randn(2, 3, 32, 32)
    torch.save(model.state_dict(), tmp_path / "trained.pt")
    torch.save(model.fuse().state_dict(), tmp_path / "fused.pt")
    again = models.create("repvgg_a0", num_classes=7, width=8).eval()
    models.load_weights(again, tmp_path / "trained.pt")
    assert torch.equal(again(images), model(images))
    deployed = models.create("repvgg_a0", num_classes=7, width=8, deploy=True).eval()
    models.load_weights(deployed, tmp_path / "fused.pt")
    assert torch.equal(deployed(images), model.fuse()(images))
    message = "One of the two is fused: a RepVGG takes fused weights with deploy=True, others without"
    for network, file in ((again, "fused.pt"), (deployed, "trained.pt")):
        with pytest.raises(ValueError, match=message):
            models.load_weights(network, tmp_path / file)


def test_names_of_the_fused_form():
    fused = models.create("repvgg_a0", width=2, deploy=True)
    blocks = ["stage0"] + [f"stage{stage}.{i}" for stage, n in enumerate((2, 4, 14, 1), 1) for i in range(n)]
    expected = [f"{block}.rbr_reparam.{leaf}" for block in blocks for leaf in ("weight", "bias")]
    assert list(fused.state_dict()) == [*expected, "linear.weight", "linear.bias"]
    assert models.create("repvgg_a0", width=2).fuse().state_dict().keys() == fused.state_dict().keys()


@pytest.mark.parametrize("norm", ["keep", "generate"])
def test_a_hypernetised_network_is_materialised_and_fused(norm):
    student = hyperfast.hypernetize(trained(width=8), hidden=(4, 4), norm=norm).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = student(images)
    with pytest.raises(RuntimeError, match=r"no weight of its own.* fuse what its materialize\(\) returns"):
        student.primary.fuse()
    fused = student.materialize().fuse()
    torch.testing.assert_close(fused(images), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())


def test_fused_twice_frozen_and_the_other_way_round():
    model = trained(width=8)
    images = torch.randn(2, 3, 32, 32)
    fused = model.fuse()
    assert torch.equal(fused.fuse()(images), fused(images))
    torch.testing.assert_close(freeze(fused)(images), model(images), rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match=r"a Identity in it has no .*call fuse\(\) before freeze\(\)"):
        freeze(model).fuse()


def test_fusing_draws_no_random_numbers():
    model = trained(width=8)
    before = torch.get_rng_state()
    model.fuse()
    assert torch.equal(torch.get_rng_state(), before)
