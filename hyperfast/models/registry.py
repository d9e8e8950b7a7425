"""Models by name: hyperfast's own, other packages' zoos, and any importable function."""

from __future__ import annotations

import difflib
import importlib
import inspect
from typing import TYPE_CHECKING, Any

from torch import nn

from hyperfast.models import mobilenet, repvgg, resnet, shufflenet, tokens, vgg

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["create", "names"]

_MODELS: dict[str, Callable[..., nn.Module]] = {
    factory.__name__: factory
    for factory in (
        resnet.resnet8,
        resnet.resnet20,
        resnet.resnet32,
        resnet.resnet44,
        resnet.resnet56,
        vgg.vgg11_bn,
        vgg.vgg13_bn,
        vgg.vgg16_bn,
        vgg.vgg19_bn,
        mobilenet.mobilenetv2_x0_5,
        mobilenet.mobilenetv2_x0_75,
        mobilenet.mobilenetv2_x1_0,
        mobilenet.mobilenetv2_x1_4,
        shufflenet.shufflenetv2_x0_5,
        shufflenet.shufflenetv2_x1_0,
        shufflenet.shufflenetv2_x1_5,
        shufflenet.shufflenetv2_x2_0,
        repvgg.repvgg_a0,
        repvgg.repvgg_a1,
        repvgg.repvgg_a2,
        tokens.vit_tiny32,
        tokens.mixer_tiny32,
    )
}


def names() -> tuple[str, ...]:
    """The names of hyperfast's own models."""
    return tuple(_MODELS)


def create(name: str, num_classes: int = 10, **options: Any) -> nn.Module:
    """A freshly initialised model.

    Args:
        name: one of `names()`; `timm:NAME` or `torchvision:NAME` for a model of those packages (which must be
            installed); or `package.module:function` for any importable function that returns a module.
        num_classes: width of the logits.
        options: passed on, after `num_classes`, as keywords. Own models have `in_channels` and `width` (channels of the
            first layer, the others in proportion), ResNets also `shortcut`, VGGs and MobileNets `dropout`, RepVGGs
            `deploy`, the networks over patches `depth`, `patch` and `image_size`, the transformer `heads`. For what the
            others take, see there.

    Raises:
        ValueError: an unknown name or option of an own model, with the nearest ones.
        ModuleNotFoundError: the package in the name is not installed.
        AttributeError: the module in the name has no such function.
        TypeError: the function named returned something that is no module.

    Example:
        >>> student = hyperfast.models.create("resnet20", num_classes=100, shortcut="B")
    """
    prefix, separator, rest = name.partition(":")
    if not separator:
        return _create_own(name, num_classes, options)
    if prefix == "timm":
        factory = _import(prefix, name).create_model
        model = factory(rest, num_classes=num_classes, **options)
    elif prefix == "torchvision":
        factory = _import("torchvision.models", name).get_model
        model = factory(rest, num_classes=num_classes, **options)
    else:
        factory = _function(_import(prefix, name), rest, name)
        model = factory(num_classes=num_classes, **options)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model {name!r} is a {type(model).__name__}; the function must return a torch.nn.Module")
    return model


def _create_own(name: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    if name not in _MODELS:
        raise ValueError(
            f"unknown model {name!r}{_nearest(name, _MODELS)}; choose one of {', '.join(_MODELS)}, "
            "or timm:NAME, torchvision:NAME or package.module:function"
        )
    accepted = [option for option in inspect.signature(_MODELS[name]).parameters if option != "num_classes"]
    for option in options:
        if option not in accepted:
            near = _nearest(option, accepted)
            raise ValueError(f"model {name!r} has no option {option!r}{near}; it has {', '.join(accepted)}")
    return _MODELS[name](num_classes, **options)


def _nearest(given: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(given, list(known), n=3)
    return f" (did you mean {' or '.join(matches)}?)" if matches else ""


def _import(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A module that is there but itself misses an import must say so, not that it is not there.
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        package = module.partition(".")[0]
        raise ModuleNotFoundError(
            f"model {name!r} needs the module {module!r}, which is not installed; "
            f"try `pip install {package}`, or set PYTHONPATH to where it lies",
            name=error.name,
        ) from error


def _function(module: Any, path: str, name: str) -> Callable[..., Any]:
    found = module
    for part in path.split("."):
        if not hasattr(found, part):
            public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            raise AttributeError(f"model {name!r}: module {module.__name__!r} has no {path!r}{_nearest(path, public)}")
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"model {name!r} is a {type(found).__name__}; name a function or a class")
    function: Callable[..., Any] = found
    return function
