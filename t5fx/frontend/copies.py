"""Copies of models that are the copy's own through and through.

`copy.deepcopy` keeps functions as they are: a forward that somebody replaced by a closure still
runs the modules and tensors of the original. Here such functions are made again around the copy's.
"""

from __future__ import annotations

import copy
import functools
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch._library.custom_ops import CustomOpDef

from t5fx.errors import CaptureError

#: What is never looked into for functions.
_PLAIN = (torch.Tensor, str, bytes, int, float, bool, type(None), type, types.ModuleType)


def duplicate(model: nn.Module, *, share: bool = False) -> nn.Module:
    """A deep copy of a model, closures included; its tensors are copies too.

    share: its tensors are the model's own, and it has none of the hooks around the model's calls,
    only torch's own that compute a weight.

    Raises `CaptureError` where a model cannot be copied.
    """
    memo: dict[int, Any] = {id(d): type(d)() for m in model.modules() for d in _empty(m)}
    if share:
        memo |= {id(t): t for t in (*model.parameters(), *model.buffers())}
        for module in model.modules():
            memo.update((id(d), kept) for d, kept in _without_hooks(module))
    try:
        with _copied(model):
            twin = copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"expected a model that copy.deepcopy can copy; {type(model).__name__} failed with "
            f"{type(error).__name__}: {error}; a module that keeps computed tensors, as the old "
            f"torch.nn.utils.weight_norm does, needs remove_weight_norm first, or "
            f"torch.nn.utils.parametrizations"
        ) from error
    _Rebinder(memo).visit(twin)
    for module in twin.modules() if share else ():
        # transformers puts its hooks for hidden states and attentions there again.
        vars(module).pop("_output_capturing_hooks_installed", None)
    return twin


def _empty(module: nn.Module) -> Iterator[Any]:
    """A module's own dicts and sets with nothing in them: most are, and copying each takes time."""
    own = vars(module).values()
    return (value for value in own if type(value) in (dict, OrderedDict, set) and not value)


def _without_hooks(module: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Each dict of a module's hooks, with what is left of it; and what FSDP keeps with a module."""
    for name, value in vars(module).items():
        if name.startswith("__composable_api_state_key"):
            yield value, type(value)()
        elif name.startswith(("_forward_", "_backward_")) and "hooks" in name and value:
            own = (
                (key, hook)
                for key, hook in value.items()
                if type(hook).__module__.startswith("torch.nn.utils.")
            )
            yield value, type(value)(own)


@contextmanager
def _copied(model: nn.Module) -> Iterator[None]:
    """Let modules that FSDP2 has sharded be copied: as what they were; custom operators stay."""
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    dispatch: dict[type, Any] = copy._deepcopy_dispatch  # type: ignore[attr-defined]
    kinds = {type(m) for m in model.modules() if isinstance(m, fsdp)} - set(dispatch)

    def duplicated(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
        base: Any = next(c for c in type(module).__mro__[1:] if not issubclass(c, fsdp))
        twin = memo[id(module)] = base.__new__(base)
        vars(twin).update(copy.deepcopy(vars(module), memo))
        return twin

    dispatch.update(dict.fromkeys(kinds, duplicated))
    if CustomOpDef not in dispatch:
        kinds.add(CustomOpDef)  # type: ignore[arg-type]
        dispatch[CustomOpDef] = lambda operator, memo: operator
    try:
        yield
    finally:
        for kind in kinds:
            dispatch.pop(kind, None)


class _Rebinder:
    """Makes functions again whose closures, defaults or arguments reach what was copied."""

    def __init__(self, memo: dict[int, Any]) -> None:
        self.memo = memo
        self.made: dict[int, Any] = {}
        self.seen: set[int] = set()

    def visit(self, value: Any) -> None:
        """Replace the functions in a copied object's attributes, items and elements, in place."""
        if isinstance(value, _PLAIN) or (callable(value) and not hasattr(value, "__dict__")):
            return
        if id(value) in self.seen:
            return
        self.seen.add(id(value))
        if isinstance(value, dict):
            for key, item in list(value.items()):
                new = self.rebound(item)
                if new is not item:
                    value[key] = new
                self.visit(new)
        elif isinstance(value, list):
            for i, item in enumerate(value):
                value[i] = self.rebound(item)
                self.visit(value[i])
        elif isinstance(value, tuple | set | frozenset):
            for item in value:
                self.visit(item)
        elif isinstance(value, functools.partial):
            self.visit(value.keywords)
        elif not isinstance(value, types.FunctionType | types.MethodType | fx.Graph | fx.Node):
            attributes = getattr(value, "__dict__", None)
            if isinstance(attributes, dict):
                self.visit(attributes)

    def rebound(self, value: Any) -> Any:
        """`value` with copies in it if it is a function, method or partial; else `value` itself."""
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            owner = self._mapped(value.__self__)
            function = self.rebound(value.__func__)
            same = owner is value.__self__ and function is value.__func__
            return value if same else types.MethodType(function, owner)
        if isinstance(value, functools.partial):
            parts: list[Any] = [self.rebound(value.func), *map(self._mapped, value.args)]
            named = {name: self._mapped(item) for name, item in value.keywords.items()}
            before = [value.func, *value.args, *value.keywords.values()]
            if all(a is b for a, b in zip(before, [*parts, *named.values()], strict=True)):
                return value
            new: Any = functools.partial(parts[0], *parts[1:], **named)
            new.__dict__.update({n: self._mapped(v) for n, v in vars(value).items()})
            return new
        return value

    def _mapped(self, value: Any) -> Any:
        if isinstance(value, types.FunctionType | types.MethodType | functools.partial):
            return self.rebound(value)
        found = self.memo.get(id(value), value)
        if found is not value and not isinstance(value, _PLAIN[1:]):
            return found
        if isinstance(value, list | tuple) and type(value) in (list, tuple):
            items = [self._mapped(item) for item in value]
            changed = any(a is not b for a, b in zip(items, value, strict=True))
            return type(value)(items) if changed else value
        if type(value) is dict:
            named = {key: self._mapped(item) for key, item in value.items()}
            return named if any(named[k] is not value[k] for k in value) else value
        return value

    def _function(self, function: types.FunctionType) -> Any:
        if id(function) in self.made:
            return self.made[id(function)]
        self.made[id(function)] = function  # for a closure that holds itself
        cells = function.__closure__ or ()
        contents = [_content(cell) for cell in cells]
        new_contents = [self._mapped(item) for item in contents]
        defaults = self._mapped(function.__defaults__)
        named = self._mapped(function.__kwdefaults__)
        wrapped = getattr(function, "__wrapped__", None)
        changed = any(a is not b for a, b in zip(contents, new_contents, strict=True))
        if not changed and defaults is function.__defaults__ and named is function.__kwdefaults__:
            return function
        new = types.FunctionType(
            function.__code__,
            function.__globals__,
            function.__name__,
            defaults,
            tuple(
                cell if a is b else types.CellType(b)
                for cell, a, b in zip(cells, contents, new_contents, strict=True)
            ),
        )
        new.__kwdefaults__ = named
        new.__dict__.update(function.__dict__)
        if wrapped is not None:
            new.__wrapped__ = self._mapped(wrapped)  # type: ignore[attr-defined]
        new.__qualname__, new.__doc__ = function.__qualname__, function.__doc__
        for cell, content in zip(new.__closure__ or (), new_contents, strict=True):
            if content is function:
                cell.cell_contents = new
        self.made[id(function)] = new
        return new


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet filled
        return None
