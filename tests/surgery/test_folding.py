import pytest
import torch
from torch import Tensor, nn

from hyperfast import models
from hyperfast.surgery.folding import fold_batch_norm, freeze


def _trained(model: nn.Module, *shape: int) -> tuple[nn.Module, Tensor]:
    """`model` with running statistics and affine parameters that matter, and an input."""
    x = torch.randn(*shape)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias)
    with torch.no_grad():
        for _ in range(3):
            model(x * 2 + 1)
    return model.eval(), x


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()), (4, 3, 8, 8)),
        (nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6, affine=False)), (4, 4, 8, 8)),
        (nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), (4, 4, 8, 8)),
        (nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7)), (9, 5)),
        (nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), (4, 3, 9)),
    ],
    ids=["conv2d", "grouped-no-affine", "transposed-grouped", "linear", "conv1d"],
)
def test_the_function_stays_and_the_norm_goes(model: nn.Module, shape: tuple[int, ...]) -> None:
    model, x = _trained(model, *shape)
    expected = model(x)
    folded = fold_batch_norm(model)
    torch.testing.assert_close(folded(x), expected, rtol=1e-5, atol=1e-5)
    assert isinstance(folded[1], nn.Identity)
    assert isinstance(model[1], nn.modules.batchnorm._BatchNorm), "the original must be left alone"


class _ReadTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class _CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.norm(self.conv(x))))


@pytest.mark.parametrize("kind", [_ReadTwice, _CalledTwice])
def test_what_has_another_reader_is_left_alone(kind: type[nn.Module]) -> None:
    model, x = _trained(kind(), 4, 3, 5, 5)
    folded = fold_batch_norm(model)
    assert isinstance(folded.norm, nn.BatchNorm2d)
    torch.testing.assert_close(folded(x), model(x))


class _Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) if x.sum() > 0 else x


def test_a_model_that_cannot_be_traced_is_copied(caplog: pytest.LogCaptureFixture) -> None:
    model = _Untraceable().eval()
    assert isinstance(fold_batch_norm(model).norm, nn.BatchNorm2d)
    assert "_Untraceable cannot be traced" in caplog.text


def test_what_is_tapped_is_kept() -> None:
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)]
    model, x = _trained(nn.Sequential(*layers), 2, 3, 8, 8)
    folded = fold_batch_norm(model, keep=["0"])
    assert isinstance(folded[1], nn.BatchNorm2d)
    assert isinstance(folded[3], nn.Identity)
    torch.testing.assert_close(folded[0](x), model[0](x))
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_frozen_network_answers_the_same() -> None:
    model, x = _trained(models.create("resnet8", in_channels=1), 4, 1, 8, 8)
    model.train()
    frozen = freeze(model)
    assert not frozen.training
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in frozen.modules())
    assert frozen.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(frozen(x), model.eval()(x), rtol=1e-4, atol=1e-4)
    assert all(parameter.requires_grad for parameter in model.parameters())
