"""Models that are after a trace what they were before it."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

#: What changes in place and has its items alone.
_CONTAINERS = (dict, OrderedDict, defaultdict, list, set)
#: What has attributes that are not a module's: it is a module itself, or many share it.
_OTHERS = torch.Tensor | nn.Module | type | FunctionType | ModuleType


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Afterwards the modules of a model, and the objects that they have, are what they were.

    That goes for attributes, hooks and children, and for what is in dicts, lists and sets: tables
    that the code makes in its first call and keeps would be a trace's, and fail the next; hooks
    that it adds in its first call would be there twice in the next.
    """
    known = [(one, copy.copy(one)) for one in _changeable(model)]
    try:
        yield
    finally:
        for now, before in known:
            _restore(now, before)


def _changeable(model: nn.Module) -> Iterator[Any]:
    """The dicts of attributes and the containers in them, each once, of modules and of objects that
    are among their attributes or in their containers.
    """
    seen: set[int] = set()
    objects: list[Any] = list(model.modules())
    owned = len(objects)
    for i, one in enumerate(objects):
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield vars(one)
        for value in list(vars(one).values()):
            inside = [value]
            if type(value) in _CONTAINERS:
                if id(value) not in seen:
                    seen.add(id(value))
                    yield value
                inside = list(value.values() if isinstance(value, dict) else value)
            if i < owned:
                objects += [x for x in inside if hasattr(x, "__dict__") and _is_own(x)]


def _is_own(value: Any) -> bool:
    return type(value) not in _CONTAINERS and not isinstance(value, _OTHERS)


def _restore(now: Any, before: Any) -> None:
    """Give a container the items that it had, in their order; no two items are compared."""
    if isinstance(now, dict):
        pairs = [(id(key), id(value)) for key, value in now.items()]
        if pairs != [(id(key), id(value)) for key, value in before.items()]:
            now.clear()
            now.update(before)
    elif isinstance(now, list):
        now[:] = before
    else:
        now.clear()
        now.update(before)
