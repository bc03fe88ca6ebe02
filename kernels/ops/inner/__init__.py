"""Inner models of the TTT node and their peers: found by discovery in the files of this folder."""

import importlib
import inspect
import pkgutil

from ..errors import require_name
from .base import InnerModel, TokenMixer

__all__ = ["INNER_MODELS", "InnerModel", "TokenMixer", "inner_model"]


def _discover() -> dict[str, TokenMixer]:
    """One instance of every TokenMixer that a module of this package defines."""
    found: dict[str, TokenMixer] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for value in vars(module).values():
            if (
                isinstance(value, type)
                and issubclass(value, TokenMixer)
                and value.__module__ == module.__name__
                and not inspect.isabstract(value)
            ):
                found[value.name] = value()
    return found


#: Every inner model, and what stands in its place in a comparison, by its name.
INNER_MODELS = _discover()


def inner_model(name: str) -> TokenMixer:
    """The inner model of that name; NodeArgumentError names the valid ones."""
    require_name("inner", name, INNER_MODELS)
    return INNER_MODELS[name]
