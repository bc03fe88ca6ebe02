"""Inner models of the TTT node: one file each in this folder, found by discovery."""

import importlib
import pkgutil

from ..errors import require_name
from .base import InnerModel


def _discover() -> dict[str, InnerModel]:
    """One instance of every InnerModel subclass that a module of this package defines."""
    found: dict[str, InnerModel] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for value in vars(module).values():
            if (
                isinstance(value, type)
                and issubclass(value, InnerModel)
                and value.__module__ == module.__name__
                and value is not InnerModel
            ):
                found[value.name] = value()
    return found


#: Every inner model by its name.
INNER_MODELS = _discover()


def inner_model(name: str) -> InnerModel:
    """The inner model of that name; NodeArgumentError names the valid ones."""
    require_name("inner", name, INNER_MODELS)
    return INNER_MODELS[name]
