"""Masks that hide whole tokens as keys: what has to be proved of one, and the proof.

A mask [..., N, N] is one of keys where it says the same of a key for every query (of an item), or
for every query that is itself a key which counts: m_i and m_j, as an outer product has it. Then its
diagonal says which tokens count. The proof reads the operators that make the mask as an expression
of tensors that vary along tokens, once for the query's token and once for the key's, and tries all
truth values of these.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from t5fx.analysis.masks import interval
from t5fx.graph.axes import permutation, regroup_node
from t5fx.graph.view import CONSTANT, View, changed

#: A number that is added to a score and is this small or smaller hides the key.
LEAST = -1e4
#: Tensors of a mask's expression whose values are tried; more are not a mask of padding.
_MOST = 6

#: What an axis of a mask counts: "query", "key", or the position of an axis of batch or heads.
Role = str | int | None


@dataclass(frozen=True)
class KeyMask:
    """A mask that hides keys of whole tokens.

    node: the mask as the graph has it, broadcast from the right to the scores; like: a node with
    their axes of batch and heads, the scores or the queries. rows, columns: the query and the key
    axis, counted from the right as all axes are. kind: "bool", true where a key counts; "fill",
    true where it does not; "added", a number that is added, 0 or at most LEAST. outer: the axes of
    batch and heads along which it varies. checked: the numbers are not proved to be those two, and
    have to be looked at in each call.
    """

    node: fx.Node
    like: fx.Node
    rows: int
    columns: int
    kind: str
    outer: frozenset[int] = frozenset()
    checked: bool = False

    def outer_axes(self, view: View) -> list[int]:
        """The axes of batch and heads of `like`, in order."""
        rank = len(view.shape(self.like))
        return [axis for axis in range(-rank, 0) if axis not in (self.rows, self.columns)]


class _UnprovedError(Exception):
    """Nothing could be proved of a mask."""


def key_mask(
    view: View,
    mask: fx.Node,
    like: fx.Node,
    rows: int,
    columns: int,
    kind: str,
    scores: fx.Node,
) -> KeyMask | None:
    """The mask of scores, if it provably is one of keys.

    like: the scores, or queries that have the same axes of batch and heads; rows, columns:
    positions of the query and the key axis in the scores, which the node `scores` masks. In a
    graph whose masks need no proof it is taken for one.
    """
    rank = len(view.shape(like))
    places = rows - rank, columns - rank
    if view.trusted:
        return KeyMask(mask, like, *places, kind)
    roles: list[Role] = [axis - rank for axis in range(rank)]
    roles[rows], roles[columns] = "query", "key"
    reader = _Reader(view)
    try:
        term = reader.read(mask, _aligned(view, mask, roles), scores)
        checked = reader.prove(term, kind)
    except _UnprovedError:
        return None
    return KeyMask(mask, like, *places, kind, frozenset(reader.outer), checked)


def _aligned(view: View, node: fx.Node, roles: Sequence[Role]) -> tuple[Role, ...]:
    """The roles of a tensor that is broadcast to one with these; axes of size one have none."""
    shape = view.shape(node)
    if len(shape) > len(roles):
        raise _UnprovedError
    own = roles[len(roles) - len(shape) :]
    return tuple(None if size == 1 else role for size, role in zip(shape, own, strict=True))


# --- expressions ----------------------------------------------------------------------------------

#: Of each leaf, seen from the query's token and from the key's, its value.
Values = dict[tuple[Any, str], Any]
Term = Callable[[Values], Any]

#: Any number that is neither 0 nor 1.
_OTHER = math.nan


_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    **{"add": operator.add, "sub": operator.sub, "mul": operator.mul},
    "rsub": lambda a, b: b - a,
    **dict.fromkeys(("logical_and", "bitwise_and", "and"), lambda a, b: float(bool(a and b))),
    **dict.fromkeys(("logical_or", "bitwise_or", "or"), lambda a, b: float(bool(a or b))),
    "eq": lambda a, b: float(_equal(a, b)),
    "ne": lambda a, b: float(not _equal(a, b)),
    "gt": lambda a, b: _compared(operator.gt, a, b),
    "ge": lambda a, b: _compared(operator.ge, a, b),
    "lt": lambda a, b: _compared(operator.lt, a, b),
    "le": lambda a, b: _compared(operator.le, a, b),
}
_LOGIC = ("logical_and", "bitwise_and", "and", "logical_or", "bitwise_or", "or")
_NOT = ("logical_not", "bitwise_not", "invert")


def _equal(a: float, b: float) -> bool:
    if (math.isnan(a) and b not in (0, 1)) or (math.isnan(b) and a not in (0, 1)):
        raise _UnprovedError
    return a == b


def _compared(compare: Callable[[Any, Any], bool], a: float, b: float) -> float:
    if math.isnan(a) or math.isnan(b):
        raise _UnprovedError
    return float(compare(a, b))


class _Reader:
    """Reads one mask. outer: the axes of batch and heads that its leaves vary along."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.outer: set[int] = set()
        #: By leaf, the values that are to be tried; and as what it was met: "query", "key", "item".
        self.leaves: dict[Any, tuple[float, ...]] = {}
        self.met: set[tuple[Any, str]] = set()

    def read(self, node: Any, roles: tuple[Role, ...], reader: fx.Node) -> Term:
        view = self.view
        constant = _constant(view, node, reader)
        if constant is not None:
            return lambda values: constant
        if not isinstance(node, fx.Node) or view.val(node) is None:
            raise _UnprovedError
        if (writer := view.mutated_before(node, reader)) is not None:
            whole = changed(writer) == [node] and view.shape(writer) == view.shape(node)
            if not whole:
                raise _UnprovedError
            return self.read(writer, roles, reader)
        below = self._layout(node, roles)
        if below is not None:
            return self.read(*below, node)
        if not {"query", "key"} <= set(roles) and _is_bool(view, node):
            return self._leaf(node, roles, (0.0, 1.0))
        if (term := self._operator(node, roles)) is not None:
            return term
        # Numbers that the caller hands in; whatever else is computed is no mask.
        given = node.op == "placeholder" and CONSTANT not in node.meta
        if given and not {"query", "key"} <= set(roles):
            return self._leaf(node, roles, (0.0, 1.0, _OTHER))
        raise _UnprovedError

    def _leaf(self, node: fx.Node, roles: tuple[Role, ...], values: tuple[float, ...]) -> Term:
        self.outer |= {role for role in roles if isinstance(role, int)}
        as_token = tuple("token" if role in ("query", "key") else role for role in roles)
        name = (node, as_token)
        who = "query" if "query" in roles else "key" if "key" in roles else "item"
        self.leaves[name] = values
        self.met.add((name, who))
        return lambda given: given[name, who]

    def _layout(
        self, node: fx.Node, roles: tuple[Role, ...]
    ) -> tuple[fx.Node, tuple[Role, ...]] | None:
        """What a layout operator reads, with its roles; None for other operators."""
        view, name = self.view, self.view.op(node)
        inputs = view.inputs(node)
        if not inputs:
            return None
        source = inputs[0]
        same_dtype = name == "to" and view.val(source).dtype == view.val(node).dtype  # type: ignore
        whole = name == "slice" and view.shape(node) == view.shape(source)
        if name in ("identity", "detach") or same_dtype or whole:
            return source, roles
        if name == "expand" or (name in ("repeat", "tile") and self._repeats(node, source)):
            return source, _aligned(view, source, roles)
        order = permutation(view, node)
        if order is not None:
            below: list[Role] = [None] * len(order)
            for out, into in enumerate(order):
                below[into] = roles[out]
            return source, tuple(below)
        if name == "reshape" or (name == "getitem" and _adds_axes(node)):
            regrouped = self._regrouped(node, source, roles)
            return None if regrouped is None else (source, regrouped)
        return None

    def _repeats(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether a repeat only broadcasts axes of size one."""
        after, before = self.view.shape(node), self.view.shape(source)
        own = after[len(after) - len(before) :]
        return all(a == b or b == 1 for a, b in zip(own, before, strict=True))

    def _regrouped(
        self, node: fx.Node, source: fx.Node, roles: tuple[Role, ...]
    ) -> tuple[Role, ...] | None:
        groups = regroup_node(self.view, node)
        if groups is None:
            return None
        below: list[Role] = [None] * len(self.view.shape(source))
        for ins, outs in groups:
            kinds = {roles[i] for i in outs} - {None}
            if not kinds:
                continue
            if len(ins) != 1 or len(outs) != 1:
                return None
            below[ins[0]] = kinds.pop()
        return tuple(below)

    def _operator(self, node: fx.Node, roles: tuple[Role, ...]) -> Term | None:
        """The expression of an operator that maps elements; None for other operators."""
        view, name = self.view, self.view.op(node)

        def operand(which: str) -> Term:
            value = view.arg(node, which)
            own = _aligned(view, value, roles) if isinstance(value, fx.Node) else ()
            return self.read(value, own, node)

        boolean = _is_bool(view, node)
        if name in _BINARY and node.kwargs.get("alpha", 1) == 1:
            if name in _LOGIC and not boolean:
                return None
            apply, first, second = _BINARY[name], operand("input"), operand("other")
            return lambda values: apply(first(values), second(values))
        if name in _NOT and boolean:
            inner = operand("input")
            return lambda values: float(not inner(values))
        if name in ("to", "bool"):
            inner = operand("input")
            return (lambda values: float(bool(inner(values)))) if boolean else inner
        if name == "where":
            chosen, first, second = operand("condition"), operand("input"), operand("other")
            return lambda values: first(values) if chosen(values) else second(values)
        if name == "masked_fill":
            plain, hides, value = operand("input"), operand("mask"), operand("value")
            return lambda values: value(values) if hides(values) else plain(values)
        return None

    # --- the proof --------------------------------------------------------------------------------

    def prove(self, term: Term, kind: str) -> bool:
        """Whether values have to be looked at in each call.

        Raises where the mask is not, or not provably, one of keys.
        """
        names = list(self.leaves)
        if len(self.met) > _MOST:
            raise _UnprovedError
        crossed = any(who == "query" for _, who in self.met)
        checked = False

        def seen(query: Values, key: Values) -> bool | None:
            """Whether the key counts for the query; None for numbers that say neither."""
            nonlocal checked
            values = {(name, "query"): query[name] for name in names}  # type: ignore[index]
            values |= {(name, "key"): key[name] for name in names}  # type: ignore[index]
            values |= {(name, "item"): key[name] for name in names}  # type: ignore[index]
            found = _counts(term(values), kind)
            checked |= found is None
            return found

        items = [n for n in names if (n, "item") in self.met]
        every = [dict(zip(names, v, strict=True)) for v in itertools.product(*self.leaves.values())]
        for query, key in itertools.product(every if crossed else every[:1], every):
            if not crossed:
                seen(key, key)  # type: ignore[arg-type]
            elif all(query[name] == key[name] for name in items):
                own, other = seen(query, query), seen(key, key)  # type: ignore[arg-type]
                both = seen(query, key)  # type: ignore[arg-type]
                if checked or (own and both != other):
                    raise _UnprovedError
        numbers = any(len(values) > 2 for values in self.leaves.values())
        if checked and not (numbers and kind == "added"):
            raise _UnprovedError
        return checked


def _counts(value: float, kind: str) -> bool | None:
    if kind == "added":
        return True if value == 0 else False if value <= LEAST else None
    return bool(value) == (kind == "bool")


def _constant(view: View, node: Any, reader: fx.Node) -> float | None:
    """The number that a value, or every element of it, provably is."""
    if isinstance(node, bool | int | float):
        return float(node)
    bounds = interval(view, node, {}, reader)
    if bounds is not None and bounds[0] == bounds[1]:
        return bounds[0]
    return view.scalar(node) if isinstance(node, fx.Node) else None


def _is_bool(view: View, node: fx.Node) -> bool:
    value = view.val(node)
    return value is not None and value.dtype == torch.bool


def _adds_axes(node: fx.Node) -> bool:
    """x[:, None] and the like, which leave all elements in their order."""
    keys = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return all(key in (None, ...) or key == slice(None) for key in keys)
