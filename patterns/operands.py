"""From the operand of a product back to q, k or v: layout undone, constant scales taken out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import fx

from t5fx.graph.axes import permutation, regroup_node
from t5fx.graph.sizes import Size
from t5fx.graph.view import View
from t5fx.patterns.base import Binding, Operand, Refusal

_CANONICAL = ("b", "b", "t", "c")


@dataclass(frozen=True)
class _State:
    node: fx.Node
    roles: tuple[str, ...] | None  # None: above this node the axes could not be followed
    below: int  # number of path nodes under it


def operand(
    view: View, node: fx.Node, token: int, channel: int, *, scales: bool = True, climb: bool = True
) -> tuple[Operand, float]:
    """Find the tensor [..., N, D] behind a product's operand, and the constant scale on it.

    Looks up through transposes, views and casts: to the nearest tensor in the order batch, head,
    token, channel, and (with `scales`) past every constant factor that commutes to the product.
    With `climb=False` the operand is taken in the layout it has.
    """
    roles = tuple(
        "t" if i == token else "c" if i == channel else "b" for i in range(len(view.shape(node)))
    )
    states = [_State(node, roles, 0)]
    path: list[fx.Node] = []  # from the operand upwards
    factors: dict[fx.Node, float] = {}
    held = 1.0
    while True:
        state = states[-1]
        in_place = view.mutated(state.node)
        factor = _factor(view, state.node) if scales else None
        if factor is not None and in_place:
            held = factor  # what it read is no more: the factor is divided out of what it wrote
            break
        if factor is not None:
            factors[state.node] = factor
        elif not _layout(view, state.node):
            break
        above = view.inputs(state.node)[0] if factor is None else _unscaled(view, state.node)
        path.append(state.node)
        after = state.roles and _above(view, state.node, state.roles)
        states.append(_State(above, after, len(path)))
    top = max((path.index(n) + 1 for n in factors), default=0)
    chosen = _choose(view, states, path) if climb else states[0]
    total = held
    for value in factors.values():
        total *= value
    start = states[-1] if held != 1.0 else states[max(top, chosen.below)]
    replay = [n for n in path[chosen.below : start.below][::-1] if n not in factors]
    assert chosen.roles is not None
    batch = tuple(i for i, role in enumerate(chosen.roles) if role == "b")
    places = batch, chosen.roles.index("t"), chosen.roles.index("c")
    if view.mutated(start.node, after=start.node):
        raise Refusal(
            "scores-changed",
            f"'{start.node.name}' is changed in place after the attention reads it",
        )
    found = Operand(chosen.node, *places, start.node, tuple(replay), held)
    return found, total


def fused_binding(
    view: View,
    node: fx.Node,
    tensors: tuple[fx.Node, fx.Node, fx.Node],
    scale: Any,
    dropout: Any = 0.0,
) -> Binding:
    """What a fused call means: of queries, keys and values [..., N, D] and its scale or None."""
    query, key, value = (view.shape(n) for n in tensors)
    if scale is None:
        if not isinstance(query[-1], int):
            raise Refusal("head-dim", f"the size of a head is not static: {query[-1]}")
        scale = 1.0 / math.sqrt(query[-1])
    if not isinstance(scale, int | float):
        raise Refusal("scores-changed", f"the scale '{scale}' is not a constant number")
    groups = 1
    if len(query) > 3 and query[-3] != key[-3]:
        groups = _groups(query[-3], key[-3])
    q, q_factor = operand(view, tensors[0], len(query) - 2, len(query) - 1)
    k, k_factor = operand(view, tensors[1], len(key) - 2, len(key) - 1)
    v, _ = operand(view, tensors[2], len(value) - 2, len(value) - 1, scales=False)
    axes = ("b",) * (len(query) - 2) + ("t", "c")
    factor = scale * q_factor * k_factor
    return Binding(q, k, v, factor, _output(view, node), axes, (node,), groups, dropout)


def _groups(heads: Size, shared: Size) -> int:
    if isinstance(heads, int) and isinstance(shared, int) and shared and heads % shared == 0:
        return heads // shared
    raise Refusal("head-dim", f"{heads} query heads are no multiple of {shared} key heads")


def _output(view: View, node: fx.Node) -> fx.Node:
    """The attention's result: the node itself, or item 0 of a backend's tuple."""
    if view.val(node) is not None:
        return node
    for user in node.users:
        if user.args[1] != 0 and view.escapes(node, user, (node,)):
            raise Refusal("probabilities-used", f"'{user.name}' reads the softmax's normaliser")
    return next(user for user in node.users if user.args[1] == 0)


def _choose(view: View, states: list[_State], path: list[fx.Node]) -> _State:
    """The nearest state in canonical order that no cast separates from the operand."""
    reach = next((i for i, n in enumerate(path) if view.op(n) == "to"), len(path))
    usable = [s for s in states[: reach + 1] if s.roles is not None]
    for state in usable:
        if state.roles == _CANONICAL:
            return state
    first = usable[0].roles or ()
    if first.count("b") < 2:
        return next((s for s in usable if (s.roles or ()).count("b") == 2), usable[0])
    return usable[0]


def _above(view: View, node: fx.Node, roles: tuple[str, ...]) -> tuple[str, ...] | None:
    """Roles of the input's axes, given those of a layout node's output."""
    order = permutation(view, node)
    if order is not None:
        return tuple(roles[order.index(i)] for i in range(len(order)))
    if view.op(node) in ("to", "identity", "mul", "div"):
        return roles
    groups = regroup_node(view, node)
    if groups is None:
        return None
    result: list[Any] = [None] * len(view.shape(view.inputs(node)[0]))
    for ins, outs in groups:
        kinds = {roles[j] for j in outs}
        if len(ins) == len(outs) == 1:
            result[ins[0]] = roles[outs[0]]
        elif kinds <= {"b"}:
            for i in ins:
                result[i] = "b"
        else:
            return None
    return tuple(result)


def _layout(view: View, node: fx.Node) -> bool:
    """Whether a node only moves or casts the values of one floating-point tensor."""
    value = view.val(node)
    if value is None or not value.is_floating_point():
        return False
    return view.op(node) in ("to", "identity", "reshape", "expand") or (
        permutation(view, node) is not None
    )


def _unscaled(view: View, node: fx.Node) -> fx.Node:
    """The tensor that a node multiplies by a constant, which may be a tensor of one number."""
    left, right = view.arg(node, "input"), view.arg(node, "other")
    first = isinstance(left, fx.Node) and view.shape(left) == view.shape(node)
    found = left if first else right
    assert isinstance(found, fx.Node)
    return found


def _factor(view: View, node: fx.Node) -> float | None:
    """The constant that a node multiplies its only tensor by, or None."""
    name = view.op(node)
    if name not in ("mul", "div"):
        return None
    left, right = view.arg(node, "input"), view.arg(node, "other")
    if left is right or view.val(node) is None:
        return None
    if isinstance(left, fx.Node) and _unscaled(view, node) is left:
        number = view.scalar(right)
        if number is None or (name == "div" and (node.kwargs.get("rounding_mode") or not number)):
            return None
        return number if name == "mul" else 1.0 / number
    return view.scalar(left) if name == "mul" and isinstance(right, fx.Node) else None
