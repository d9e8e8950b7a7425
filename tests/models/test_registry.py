"""Models by name, also those of other packages."""

import sys
import types

import pytest
from torch import nn

from hyperfast import models


@pytest.mark.parametrize("name", models.names())
def test_every_name_makes_a_model_with_the_common_options(name):
    model = models.create(name, num_classes=3, in_channels=2, width=2)
    assert next(module for module in model.modules() if isinstance(module, nn.Conv2d)).in_channels == 2
    assert [module for module in model.modules() if isinstance(module, nn.Linear)][-1].out_features == 3


def test_an_unknown_name_lists_near_ones_and_all():
    with pytest.raises(
        ValueError, match=r"unknown model 'resnet65' \(did you mean .*resnet56.*\); choose one of resnet8, "
    ):
        models.create("resnet65")


def test_an_unknown_option_lists_near_ones_and_all():
    with pytest.raises(
        ValueError, match=r"no option 'short_cut' \(did you mean shortcut\?\); it has in_channels, width"
    ):
        models.create("resnet20", short_cut="A")


@pytest.fixture
def module(tmp_path, monkeypatch):
    source = """
    from torch import nn
    def net(num_classes, depth=1): return nn.Sequential(*(nn.Linear(2, num_classes) for _ in range(depth)))
    def number(num_classes): return num_classes
    constant = 3
    class Family:
        small = staticmethod(net)
    """
    (tmp_path / "some_models.py").write_text("\n".join(line[4:] for line in source.splitlines()))
    (tmp_path / "broken_models.py").write_text("import a_package_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    yield "some_models"
    for name in ("some_models", "broken_models"):
        sys.modules.pop(name, None)


def test_any_importable_function(module):
    model = models.create("some_models:net", num_classes=5, depth=2)
    assert [layer.out_features for layer in model] == [5, 5]
    assert isinstance(models.create("some_models:Family.small"), nn.Sequential)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("some_models:nett", AttributeError, r"has no 'nett' \(did you mean net\?\)"),
        ("some_models:number", TypeError, "is a int; the function must return a torch.nn.Module"),
        ("some_models:constant", TypeError, "is a int; name a function or a class"),
        ("no_such_module:net", ModuleNotFoundError, "'no_such_module', which is not installed; try `pip install"),
        ("broken_models:net", ModuleNotFoundError, "^No module named 'a_package_that_is_not_there'$"),
    ],
)
def test_what_is_wrong_with_a_function_is_said(module, name, error, message):
    with pytest.raises(error, match=message):
        models.create(name)


@pytest.mark.parametrize(
    ("package", "path", "function"),
    [
        ("timm", "timm", "create_model"),
        ("torchvision", "torchvision.models", "get_model"),
    ],
)
def test_other_zoos(monkeypatch, package, path, function):
    asked = []

    def make(name, **options):
        asked.append((name, options))
        return nn.Identity()

    for name in (package, path):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    setattr(sys.modules[path], function, make)
    models.create(f"{package}:some_net", num_classes=4, drop=0.5)
    assert asked == [("some_net", {"num_classes": 4, "drop": 0.5})]


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_a_zoo_that_is_not_installed_is_named(monkeypatch, package):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=f"'{package}:net' needs .* try `pip install {package}`"):
        models.create(f"{package}:net")
