"""Modules whose attention was rewritten: their class, with another forward.

Such a module keeps its children, its attributes and its methods; its class is a subclass of its
own class with the same name, as `torch.nn.utils.parametrize` makes one.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from t5fx.errors import RefusedCallError
from t5fx.frontend.calls import Signature
from t5fx.rewrite.forms import Form, Verdict, constants_of, fits, flatten
from t5fx.runtime.state import Kind, Runtime
from t5fx.wrappers import module_at

#: The attribute under which an owner keeps what it needs beside its tensors.
STATE = "_t5fx"


class Owned:
    """What one owner keeps. It does not hold the module, which a replica shares it with.

    name: the module's in the model; replaced: a forward that the module had of its own, instead of
    its class's.
    """

    def __init__(self, runtime: Runtime, name: str, replaced: Any = None) -> None:
        self.runtime = runtime
        self.name = name
        self.replaced = replaced
        self.inside = False

    def layout(self, index: int, tokens: int) -> tuple[int, ...]:
        return self.runtime.layout(self.name, index, tokens)


class OwnedModule:
    """Marks the classes of modules whose attention was rewritten."""

    _t5fx_base: type[nn.Module]


@functools.cache
def owned_class(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a module's class that runs the rewritten form of each kind of call."""

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = self.__dict__[STATE]
        if state.runtime.original:
            return run_original(self, state, args, kwargs)
        if not state.name:  # the model itself, whose calls were judged in one spelling
            args, kwargs = state.runtime.signature.bind(args, kwargs)
        structure, spec, leaves = flatten(args, kwargs)
        form = find_form(self, structure, leaves)
        if form is None:
            make_form(self, structure, spec, leaves)
            form = find_form(self, structure, leaves)
            assert form is not None
        return form(self, state, leaves)

    def reduced(self: Any, protocol: Any) -> Any:
        return _rebuilt, (base,), self.__getstate__()

    members = {
        "forward": forward,
        "__reduce_ex__": reduced,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_t5fx_base": base,
    }
    return type(base.__name__, (base, OwnedModule), members)


def _rebuilt(base: type[nn.Module]) -> nn.Module:
    kind = owned_class(base)  # type: ignore[arg-type]
    return kind.__new__(kind)


def state_of(module: nn.Module) -> Owned | None:
    """What an owner keeps; None for a module that is none."""
    found = vars(module).get(STATE)
    return found if isinstance(found, Owned) else None


def own(module: nn.Module, runtime: Runtime, name: str) -> None:
    """Make a module an owner, in place."""
    replaced = vars(module).pop("forward", None)
    vars(module)[STATE] = Owned(runtime, name, replaced)
    module.__class__ = owned_class(type(module))  # type: ignore[arg-type]


def disown(module: nn.Module) -> None:
    """Make an owner what it was."""
    state = vars(module).pop(STATE)
    module.__class__ = type(module)._t5fx_base  # type: ignore[attr-defined]
    if state.replaced is not None:
        vars(module)["forward"] = state.replaced


def run_original(module: Any, state: Owned, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an owner did before it was one."""
    base = type(module)._t5fx_base.forward
    if state.replaced is None or state.inside:
        return base(module, *args, **kwargs)
    state.inside = True  # a replaced forward may well call the class's
    try:
        return state.replaced(*args, **kwargs)
    finally:
        state.inside = False


def find_form(module: Any, structure: str, leaves: list[Any]) -> Form | None:
    """The form that serves a call of an owner, if there is one."""
    state = module.__dict__[STATE]
    runtime = state.runtime
    forms = runtime.forms.get(state.name)
    if not forms:
        return None
    constants = constants_of(leaves)
    flags = flags_of(module, forms[-1].flags[0])
    for form in reversed(forms):
        if form.flags == flags and form.serves(structure, constants, leaves):
            kind = runtime.running()[0]
            verdict = None if kind is None else kind.verdicts.get(state.name)
            if form.proved or (
                verdict is not None
                and form.masks == verdict.masks
                and has_flags(module, kind.flags[state.name])
            ):
                return form  # type: ignore[no-any-return]
    return None


@torch.compiler.disable(
    reason="this module of a linearized model was not called in this way yet: call the model once "
    "without torch.compile, with arguments like these, then compile it"
)
def make_form(module: Any, structure: str, spec: Any, leaves: list[Any]) -> None:
    """Make the form for a kind of call that has none yet.

    Raises `RefusedCallError` for a kind of call that no judged call of the model contained.
    """
    state = module.__dict__[STATE]
    runtime, name = state.runtime, state.name
    kind, _ = runtime.running()
    call = call_of(module, *pytree.tree_unflatten(leaves, spec))
    about = (runtime, module, name, structure, spec, leaves)
    if kind is None:
        for judged in runtime.kinds[::-1]:
            if _contains(judged, name, call):
                runtime.extend(*about, judged, False, False)
                return
        raise RefusedCallError(
            f"'{name}' was called alone and with arguments of a kind that no call of the "
            f"whole model has given it yet, so that it is not known whether its attention may be "
            f"rewritten; call the whole model in this way first, or use t5fx.softmax(model)"
        )
    if name in kind.verdicts:
        inside = has_flags(module, kind.flags[name])
        try:
            runtime.extend(*about, kind, inside and _contains(kind, name, call), inside)
            return
        except RefusedCallError:
            # Unless the module's code is another one than when the call was judged, this is it.
            again = None if inside else runtime.judged_again()
            if again is None:
                raise
            kind = again
    if name not in kind.verdicts:
        raise RefusedCallError(
            f"expected a call that uses the attention of '{name}', which was rewritten, got "
            f"one of {runtime.report.model} that runs the module and uses none; use "
            f"t5fx.softmax(model) for it, or linearize again with this call as the example"
        )
    inside = has_flags(module, kind.flags[name])
    runtime.extend(*about, kind, inside and _contains(kind, name, call), inside)


def _contains(kind: Kind, name: str, call: tuple[str, tuple[Any, ...]]) -> bool:
    """Whether a judged kind of calls of the model contains such a call of an owner."""
    known = kind.calls.get(name, ())
    return any(structure == call[0] and fits(c, call[1]) for structure, c in known)


def call_of(module: nn.Module, args: Any, kwargs: Any) -> tuple[str, tuple[Any, ...]]:
    """A call of a module, however it was written: by position or name, with defaults or without."""
    base = getattr(type(module), "_t5fx_base", type(module))
    signature = Signature(base.forward)
    bound, named = signature.bind((module, *args), kwargs)
    named = {name: value for name, value in named.items() if value is not module}
    structure, _, leaves = flatten(tuple(a for a in bound if a is not module), named)
    return structure, constants_of(leaves)


# --- attributes -----------------------------------------------------------------------------------

#: Values that are compared as they are, and what has attributes that are not looked at.
_PLAIN = (bool, int, float, str)
_NO_OBJECTS = (torch.Tensor, nn.Module, type, str, bytes, dict, list, tuple)
#: What every module has.
_OWN = frozenset((*vars(nn.Module()), STATE))


def current_flags(module: Any, verdict: Verdict, forms: Sequence[Form] = ()) -> tuple[Any, ...]:
    """`flags_of` a module, of the attributes that are to be watched now."""
    return flags_of(module, watched(module, verdict, forms))


def watched(
    module: Any, verdict: Verdict, forms: Sequence[Form] = ()
) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The attributes that choose the way of a module's code, for it ("") and what runs in it.

    Those that the code names, itself or in properties, of the module and of objects that it keeps,
    and those that are None or a truth value: functions that the code calls read these (`is_causal`
    in transformers). The names that earlier `forms` have watched stay.
    """
    found: dict[str, set[str]] = {}
    for path in ("", *sorted(verdict.inline)):
        found[path] = _watched(module_at(module, path))
    for form in forms[-1:]:
        for path, names in form.flags[0]:
            found.setdefault(path, set()).update(names)
    return tuple((path, tuple(sorted(names))) for path, names in found.items())


def _watched(module: Any) -> set[str]:
    attributes = {n: v for n, v in vars(module).items() if n not in _OWN}
    names = {n for n, v in attributes.items() if v is None or isinstance(v, bool)}
    base = getattr(type(module), "_t5fx_base", type(module))
    objects = [v for v in attributes.values() if _is_object(v)]
    calls = (getattr(type(o), "__call__", None) for o in objects)  # noqa: B004
    for function in (base.forward, *calls):
        names |= _names(function)
    for kind in {base, *map(type, objects)}:
        for found in [getattr(kind, name, None) for name in names]:
            if isinstance(found, property):
                names |= _names(found.fget)
    return names - {"forward"}  # an owner has its class's


def _names(function: Any) -> set[str]:
    function = getattr(function, "__wrapped__", function)
    code = getattr(function, "__code__", None)
    if code is None:
        return set()
    found, stack = set(code.co_names), [c for c in code.co_consts if isinstance(c, types.CodeType)]
    while stack:
        inner = stack.pop()
        found |= set(inner.co_names)
        stack += [c for c in inner.co_consts if isinstance(c, types.CodeType)]
    return found


def _is_object(value: Any) -> bool:
    return not issubclass(type(value), _NO_OBJECTS) and hasattr(value, "__dict__")


def _is_plain(value: Any) -> bool:
    return value is None or issubclass(type(value), _PLAIN)  # isinstance asks the value, slowly


def flags_of(module: Any, known: Any) -> tuple[Any, ...]:
    """(the watched names, the train/eval flag, the values): they choose the code's way."""
    return (known, module.training, *_values(module, known))


def has_flags(module: Any, flags: tuple[Any, ...]) -> bool:
    """Whether a module has the train/eval flag and the attributes of earlier `flags_of` it."""
    return flags_of(module, flags[0]) == flags


def _values(module: Any, known: Any) -> list[Any]:
    found: list[Any] = []
    for path, names in known:
        attributes = module_at(module, path).__dict__
        for name in names:
            if name not in attributes:
                continue
            value = attributes[name]
            if _is_plain(value):
                found.append((path, name, value))
            elif _is_object(value):
                theirs = value.__dict__
                inner = tuple((n, theirs[n]) for n in names if n in theirs and _is_plain(theirs[n]))
                found.append((path, name, type(value).__name__, inner))
    return found
