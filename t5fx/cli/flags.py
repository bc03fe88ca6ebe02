"""Options of a command line from the fields of a dataclass or the arguments of a function.

A field is an option where its type has a form on a command line: numbers, words, choices, flags,
paths, lists of those, and JSON for mappings. Types and choices are those of the annotations, the
help is that of the docstring. What was not given is not in the namespace, so that the defaults stay
the source's own.
"""

from __future__ import annotations

import argparse
import collections.abc
import dataclasses
import functools
import inspect
import json
import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

Source = Callable[..., Any]

_LISTS = (tuple, list, collections.abc.Sequence)
_MAPPINGS = (dict, collections.abc.Mapping)


def add_flags(
    parser: argparse.ArgumentParser,
    source: Source,
    *,
    supplied: Iterable[str] = (),
    prefix: str = "",
) -> None:
    """Add an option for each field of `source` that has a form on a command line.

    Args:
        parser: gets them as a group under the source's name.
        source: a dataclass or a function.
        supplied: fields that the command itself gives.
        prefix: comes before each name, such as "align-". A name that the parser has already gets
            the source's own name as its prefix.
    """
    title = _name(source)
    group = parser.add_argument_group(f"options of {title}")
    texts = help_texts(source)
    for name, annotation, default in _fields(source):
        form = None if name in supplied else _form(annotation)
        if form is None:
            continue
        text = texts.get(name, "")
        if default not in (None, inspect.Parameter.empty, (), {}):
            text = f"{text} (default: {_shown(default)})"
        settings = {
            **form,
            "dest": _dest(source, name),
            "default": argparse.SUPPRESS,
            "help": text.replace("%", "%%").strip(),
        }
        flag = name.replace("_", "-")
        try:
            group.add_argument(f"--{prefix}{flag}", **settings)
        except argparse.ArgumentError:
            group.add_argument(f"--{title.lower()}-{flag}", **settings)


def given(options: argparse.Namespace, source: Source) -> dict[str, Any]:
    """The fields of `source` that stand on the command line, by name."""
    values = {
        name: getattr(options, _dest(source, name))
        for name, _, _ in _fields(source)
        if hasattr(options, _dest(source, name))
    }
    return {name: tuple(v) if isinstance(v, list) and _flat(v) else v for name, v in values.items()}


def help_texts(source: Source) -> dict[str, str]:
    """What the docstring of a dataclass or function says of each field: `a, b: text`.

    "As for `Other`" is followed to what the docstring of t5fx's `Other` says of that field. A field
    without an entry has the one that mentions it.
    """
    names = [name for name, _, _ in _fields(source)]
    found: dict[str, str] = {}
    entry = re.compile(r"^( *)(\w+(?:, \w+)*): (.*)$")
    lines = inspect.cleandoc(source.__doc__ or "").splitlines()
    for index, line in enumerate(lines):
        match = entry.match(line)
        if match is None or not set(match[2].split(", ")) <= set(names):
            continue
        words, depth = [match[3]], len(match[1])
        for following in lines[index + 1 :]:
            if len(following) - len(following.lstrip()) <= depth:
                break
            words.append(following.strip())
        for name in match[2].split(", "):
            found[name] = _followed(" ".join(words), name)
    for name in set(names) - set(found):
        mentions = [text for text in found.values() if f"`{name}`" in text]
        if mentions:
            found[name] = mentions[0]
    return found


def _followed(text: str, name: str) -> str:
    reference = re.match(r"as for `(\w+)`", text)
    other = reference and getattr(sys.modules["t5fx"], reference[1], None)
    return help_texts(other).get(name, text) if other else text


def _fields(source: Source) -> list[tuple[str, Any, Any]]:
    """(name, annotation, default) of each field that can be given."""
    found = []
    made: dict[str, Any] = {}
    if dataclasses.is_dataclass(source):
        made = {f.name: f.default_factory for f in dataclasses.fields(source)}
    for name, one in inspect.signature(source).parameters.items():
        default = made[name]() if callable(made.get(name)) else one.default
        found.append((name, _evaluated(one.annotation, source), default))
    return found


def _evaluated(annotation: Any, source: Source) -> Any:
    """The type that an annotation names, or None where that is imported for type checkers only."""
    if not isinstance(annotation, str):
        return annotation
    function = inspect.unwrap(source)
    try:
        return eval(annotation, vars(sys.modules[function.__module__]))
    except NameError:
        return None


def _form(annotation: Any) -> dict[str, Any] | None:
    """What argparse has to know of a type, or None for one without a form on a command line."""
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [part for part in get_args(annotation) if part is not type(None)]
        forms = [form for form in map(_form, parts) if form is not None]
        if not forms:
            return None
        forms.sort(key=lambda form: "nargs" not in form)  # a list, where one of a kind will do too
        if (
            len(parts) < len(get_args(annotation))
            and "type" in forms[0]
            and "nargs" not in forms[0]
        ):
            return forms[0] | {"type": _or_none(forms[0]["type"])}
        return forms[0]
    if annotation is bool:
        return {"action": argparse.BooleanOptionalAction}
    if annotation in (int, float, str, Path):
        return {"type": annotation, "metavar": annotation.__name__.upper()}
    origin = get_origin(annotation)
    if origin is Literal:
        return {"choices": get_args(annotation)}
    if origin in _MAPPINGS:
        return {"type": _json, "metavar": "JSON"}
    if origin in _LISTS:
        item = _form(get_args(annotation)[0])
        if item is None or "nargs" in item or "action" in item:
            return None
        return item if item.get("metavar") == "JSON" else item | {"nargs": "*"}
    return None


def _or_none(kind: type) -> Callable[[str], Any]:
    @functools.wraps(kind, updated=())  # its name is in the message for a value that does not fit
    def convert(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    return convert


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"expected JSON, got {text!r}: {error}") from error


def _shown(default: Any) -> str:
    if isinstance(default, tuple | list):
        return " ".join(map(str, default))
    return str(default)


def _flat(values: list[Any]) -> bool:
    return not any(isinstance(value, Mapping) for value in values)


def _name(source: Source) -> str:
    return source.__name__


def _dest(source: Source, name: str) -> str:
    return f"{_name(source)}.{name}"
