"""Where models come from: a module each, found by discovery; its name stands before MODEL's colon.

A source has `load(name, asked)`, which returns a model, or a model with the arguments of a call.
One whose models can be told by what they are has also

- `owns(model)`: whether a model is of this kind, wherever it was built;
- `example(model, asked)`: the arguments (args, kwargs) of a call of such a model;
- `preprocessing(model, size)`: how it wants its photographs (`t5fx.cli.images`).
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import nn

from t5fx.errors import T5Error


@dataclass(frozen=True)
class Asked:
    """What the command line says of a model: None where it says nothing."""

    pretrained: bool | None
    size: int | None
    batch: int


def sources() -> list[str]:
    """The names of all sources."""
    return [module.name for module in pkgutil.iter_modules(__path__)]


def source(name: str) -> ModuleType:
    """The module of a source."""
    return importlib.import_module(f"{__name__}.{name}")


def owner(model: nn.Module) -> ModuleType:
    """The source whose models a model is one of. Raises `T5Error` where it is none's."""
    for module in map(source, sources()):
        if hasattr(module, "owns") and module.owns(model):
            return module
    raise T5Error(
        f"expected a model of timm or transformers, or example inputs of a call, got a "
        f"{type(model).__name__} alone: let the function return (model, args) or "
        f"(model, args, kwargs)"
    )


def of_library(model: nn.Module, library: str) -> bool:
    """Whether the class of a model, or one that it derives from, is a library's."""
    return any(c.__module__.partition(".")[0] == library for c in type(model).__mro__)


def failed(what: str, error: Exception, advice: str = "") -> T5Error:
    """An error of a library as one of t5fx's."""
    reason = " ".join(str(error).split()).rstrip(".") or "no reason given"
    return T5Error(f"{what}: {type(error).__name__}: {reason}{advice}")


Call = tuple[tuple[Any, ...], dict[str, Any]]
