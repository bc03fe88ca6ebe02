"""What a mask or bias added to attention scores provably is.

Interval analysis over the graph: a mask that is all true, or a bias that is all zero, whatever the
inputs, changes nothing and may be dropped (transformers builds such masks for plain ViTs). Any
other one is named for what made it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from t5fx.graph.view import CONSTANT, View

Interval = tuple[float, float]

_SAME = {
    *("reshape", "expand", "identity", "permute", "transpose", "slice", "select", "repeat"),
    *("unbind", "getitem", "t", "mT", "roll", "flip", "detach", "index", "index_select"),
    *("gather", "repeat_interleave", "tile", "upsample_nearest2d", "interpolate"),
}
_FILLED = {
    **{"zeros": 0.0, "zeros_like": 0.0, "new_zeros": 0.0},
    **{"ones": 1.0, "ones_like": 1.0, "new_ones": 1.0},
}
_COMPARE = {
    "ge": lambda a, b: _truth(a[0] >= b[1], a[1] < b[0]),
    "gt": lambda a, b: _truth(a[0] > b[1], a[1] <= b[0]),
    "le": lambda a, b: _truth(a[1] <= b[0], a[0] > b[1]),
    "lt": lambda a, b: _truth(a[1] < b[0], a[0] >= b[1]),
    "eq": lambda a, b: _truth(a[0] == a[1] == b[0] == b[1], a[1] < b[0] or a[0] > b[1]),
    "ne": lambda a, b: _truth(a[1] < b[0] or a[0] > b[1], a[0] == a[1] == b[0] == b[1]),
}
_LOGIC = {
    "logical_and": lambda a, b: (min(a[0], b[0]), min(a[1], b[1])),
    "logical_or": lambda a, b: (max(a[0], b[0]), max(a[1], b[1])),
}
_LOGIC |= {"bitwise_and": _LOGIC["logical_and"], "and": _LOGIC["logical_and"]}
_LOGIC |= {"bitwise_or": _LOGIC["logical_or"], "or": _LOGIC["logical_or"]}


def _truth(yes: bool, no: bool) -> Interval:
    return (1.0, 1.0) if yes else (0.0, 0.0) if no else (0.0, 1.0)


def interval(
    view: View, value: Any, memo: dict[fx.Node, Interval | None], reader: fx.Node | None = None
) -> Interval | None:
    """Bounds that every element of a node (or number) provably keeps, or None.

    reader: they are kept until this node reads it.
    """
    if isinstance(value, bool | int | float):
        return (float(value), float(value))
    if not isinstance(value, fx.Node):
        return None
    if value not in memo:
        memo[value] = None
        if not (view.mutated(value) if reader is None else view.mutated_before(value, reader)):
            memo[value] = _interval(view, value, memo)
    return memo[value]


def _interval(view: View, node: fx.Node, memo: dict[fx.Node, Interval | None]) -> Interval | None:
    name = view.op(node)
    if name in _FILLED:
        return (_FILLED[name],) * 2
    if name in ("full", "full_like", "new_full"):
        value = view.arg(node, "fill_value", node.args[-1])
        return interval(view, value, memo)
    if name == "arange":
        return _arange(node)
    if node.op == "get_attr":
        return _constant(view, node)
    operands = [interval(view, a, memo) for a in node.args[:3]]
    if not operands:
        return None
    first = operands[0]
    if name in _SAME:
        return first
    if name == "to" or name in ("bool", "long", "int"):
        boolean = name == "bool" or _dtype(view, node) == torch.bool
        if first is None or not boolean:
            return first
        return _truth(first[0] > 0 or first[1] < 0, first == (0.0, 0.0))
    if name in ("logical_not", "bitwise_not", "invert"):
        boolean = _dtype(view, node) == torch.bool
        return (1 - first[1], 1 - first[0]) if first is not None and boolean else None
    if name == "where" and len(operands) == 3:
        if first in ((1.0, 1.0), (0.0, 0.0)):
            return operands[1] if first == (1.0, 1.0) else operands[2]
        return _hull(operands[1], operands[2])
    if name == "masked_fill" and len(operands) == 3:
        mask = operands[1]
        return first if mask == (0.0, 0.0) else _hull(first, operands[2])
    if name == "slice_scatter":
        return _hull(first, operands[1])
    if name in ("tril", "triu"):
        return _hull(first, (0.0, 0.0))
    if len(operands) < 2 or first is None or operands[1] is None:
        return None
    a, b = first, operands[1]
    if name in _COMPARE:
        return _COMPARE[name](a, b)
    if name in _LOGIC:
        return _LOGIC[name](a, b) if _dtype(view, node) == torch.bool else None
    if node.kwargs.get("alpha", 1) != 1:
        return None
    if name == "add":
        return (a[0] + b[0], a[1] + b[1])
    if name in ("sub", "rsub"):
        a, b = (b, a) if name == "rsub" else (a, b)
        return (a[0] - b[1], a[1] - b[0])
    if name == "mul":
        corners = [0.0 if 0 in (x, y) else x * y for x in a for y in b]
        return None if any(map(math.isnan, corners)) else (min(corners), max(corners))
    return None


def _arange(node: fx.Node) -> Interval | None:
    bounds = [a for a in node.args[:2] if not isinstance(a, torch.dtype)]
    start = bounds[0] if len(bounds) == 2 else 0
    step = node.args[2] if len(node.args) > 2 else node.kwargs.get("step", 1)
    start = node.kwargs.get("start", start)
    if not isinstance(start, int | float) or not isinstance(step, int | float) or step <= 0:
        return None
    end = node.kwargs.get("end", bounds[-1] if bounds else math.inf)
    return (float(start), float(end) if isinstance(end, int | float) else math.inf)


def _constant(view: View, node: fx.Node) -> Interval | None:
    """Bounds of a constant; of a buffer only if no checkpoint can replace it."""
    value = view.attribute(node)
    if str(node.target) not in view.constants and _persistent(view, str(node.target)):
        return None
    constant = isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter)
    fake = type(value).__name__ == "FakeTensor" or (constant and value.is_meta)
    if not constant or fake or not value.numel() or value.is_complex():
        return None
    numbers = value.detach().double()
    return (float(numbers.min()), float(numbers.max()))


def _persistent(view: View, target: str) -> bool:
    owner, _, name = target.rpartition(".")
    try:
        module = view.root.get_submodule(owner)
    except AttributeError:
        return False
    traced = name.startswith(("_tensor_constant", "lifted_tensor"))  # tracers keep constants so
    return name in module._buffers and name not in module._non_persistent_buffers_set and not traced


def _hull(a: Interval | None, b: Interval | None) -> Interval | None:
    return None if a is None or b is None else (min(a[0], b[0]), max(a[1], b[1]))


def _dtype(view: View, node: fx.Node) -> torch.dtype | None:
    value = view.val(node)
    return None if value is None else value.dtype


def harmless(view: View, mask: fx.Node) -> bool:
    """Whether a mask hides nothing: a boolean one that is all true, another that is all zero."""
    bounds = interval(view, mask, {})
    return bounds == ((1.0, 1.0) if _dtype(view, mask) == torch.bool else (0.0, 0.0))


def refusal(view: View, mask: fx.Node) -> tuple[str, str]:
    """The reason, and a sentence, why a mask or bias that is not harmless stops a rewrite."""
    seen: set[fx.Node] = set()
    stack = [(mask, False)]
    learned = given = None
    while stack:
        node, boolean = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        # What is learned before a comparison decides what is hidden, and is added to nothing.
        boolean = boolean or _dtype(view, node) == torch.bool
        name = view.op(node)
        triangle = name in ("tril", "triu") or _triangle(view, node)
        if triangle or (name in _COMPARE and _positions(view, node)):
            return "causal", f"the mask '{mask.name}' is built from token positions ({node.name})"
        if node.op == "get_attr":
            learned = learned or (None if boolean else node)
        elif node.op == "placeholder":
            given = given or node
        stack.extend((above, boolean) for above in _read_by(view, node))
    if learned is not None:
        detail = f"'{mask.name}', which stems from '{learned.target}', is added to the scores"
        return "additive-bias", detail
    if given is not None:
        source = f"'{mask.name}', which stems from the input '{given.name}',"
    else:
        source = f"'{mask.name}'"
    return "masked", f"{source} could not be proved to hide the same keys from all queries"


def origin(view: View, mask: fx.Node) -> fx.Node:
    """The input of the model that a mask stems from; itself where there is none."""
    seen: set[fx.Node] = set()
    stack = [mask]
    while stack:
        node = stack.pop()
        if node.op == "placeholder" and CONSTANT not in node.meta:
            return node
        if node not in seen:
            seen.add(node)
            stack.extend(_read_by(view, node))
    return mask


def _read_by(view: View, node: fx.Node) -> list[fx.Node]:
    """The inputs whose values an operator reads; others lend it their dtype, sizes or device."""
    name, inputs = view.op(node), view.inputs(node)
    if name in ("to", "type_as", "expand_as", "view_as", "reshape_as"):
        return inputs[:1]
    return inputs[1:] if name.endswith("_like") or name.startswith("new_") else inputs


def _triangle(view: View, node: fx.Node) -> bool:
    """Whether a node reads a constant that lets each query see the keys up to its own."""
    value = view.attribute(node) if node.op == "get_attr" else None
    if not isinstance(value, torch.Tensor) or isinstance(value, torch.nn.Parameter):
        return False
    if value.is_meta or value.dim() < 2 or value.shape[-1] != value.shape[-2] or value.is_complex():
        return False
    seen = value == 0 if value.is_floating_point() else value != 0
    return value.shape[-1] > 1 and bool(torch.equal(seen, torch.ones_like(seen).tril()))


def _positions(view: View, node: fx.Node) -> bool:
    """Whether a comparison sets one range of positions against another."""
    sides = [a for a in node.args[:2] if isinstance(a, fx.Node)]
    return len(sides) == 2 and all(_is_range(view, side) for side in sides)


def _is_range(view: View, node: fx.Node) -> bool:
    while view.op(node) != "arange":
        above = view.inputs(node)
        if view.op(node) in ("index", "gather"):
            above = above[:1]  # some of the positions
        if len(above) != 1 or view.op(node) not in _SAME | {"add", "sub", "to"}:
            return False
        node = above[0]
    return True
