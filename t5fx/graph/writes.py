"""Values that a graph changes in place, made values of their own.

What reads a tensor after a change is made to read what the change returns, so that the patterns
see one operator after another, whatever was written where.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from t5fx.graph.view import View, changed


def settle(view: View) -> None:
    """`chain_in_place`, then `scatter_writes`. To be called before anything else of the view."""
    chain_in_place(view)
    scatter_writes(view)


def chain_in_place(view: View) -> None:
    """Let what reads a tensor after it was changed in place read the operator that changed it.

    It returns that tensor, so the values are the same, and `x.mul_(s)` on its own is seen like
    `x = x * s`. Changes the graph: to be called before anything else is asked of the view.
    """
    for node in view.graph.nodes:
        value = view.val(node)
        if value is None or not _returns_it(node):
            continue
        for tensor in changed(node):
            same = view.val(tensor)
            if same is None or (same.shape, same.dtype) != (value.shape, value.dtype):
                continue
            for user in list(tensor.users):
                if view.order[user] > view.order[node]:
                    user.replace_input_with(tensor, node)


def drop_unread(view: View) -> None:
    """Remove operators whose values nobody reads, writes to the graph's own tensors included.

    Inputs, calls of modules, random draws and writes to tensors that are not made in the graph
    stay.
    """
    bases = {node: _made_by(view, node) for node in view.graph.nodes}
    writers: dict[fx.Node, list[fx.Node]] = {}
    queue = []
    for node in view.graph.nodes:
        written = [bases[tensor] for tensor in changed(node)]
        for base in written:
            writers.setdefault(base, []).append(node)
        own = bool(written) and all(base.op == "call_function" for base in written)
        stays = node.op in ("placeholder", "output", "call_module")
        if stays or ((written or node.is_impure()) and not own):
            queue.append(node)
    needed: set[fx.Node] = set()
    while queue:
        node = queue.pop()
        if node not in needed:
            needed.add(node)
            queue += [*node.all_input_nodes, *writers.get(bases[node], ())]
    for node in reversed(list(view.graph.nodes)):
        if node not in needed:
            view.graph.erase_node(node)
    for cached in ("order", "live", "_mutations"):
        vars(view).pop(cached, None)


def _made_by(view: View, node: fx.Node) -> fx.Node:
    """The operator, input or module that made the tensor that a node is a view of."""
    while node.op == "call_function" and view.aliases(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _returns_it(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    returns = node.target._schema.returns
    info = returns[0].alias_info if returns else None
    return info is not None and info.is_write


@dataclass(frozen=True)
class _Bounds:
    """x[start:end:step] along axis `dim`; one: x[start], without that axis."""

    dim: int
    start: Any
    end: Any
    step: Any
    one: bool = False

    @property
    def arguments(self) -> tuple[Any, ...]:
        return (self.dim, self.start, self.end, self.step)


def scatter_writes(view: View) -> None:
    """Write parts of tensors out of place: `x[:, 3:] = y` becomes x = slice_scatter(x, y, 1, 3).

    That is, slices and items (or all) of tensors that the graph itself makes, where no other view
    of what is written is read afterwards. All else stays as it is, and everything in a graph that
    switches gradients off, since what is changed in place keeps its history. Changes the graph.
    """
    if any("set_grad_enabled" in str(node.target) for node in view.graph.nodes):
        return
    for node in list(view.graph.nodes):
        found = _part_of(view, node)
        if found is None:
            continue
        whole, bounds = found
        if whole is node.args[0] and not bounds and view.op(node) not in _COPIES:
            continue  # that is what `chain_in_place` is for
        if not _alone(view, whole, node):
            continue
        after = [u for u in whole.users if view.order[u] > view.order[node]]
        if not after and not node.users:
            continue
        with view.graph.inserting_before(node):
            written = _scattered(view, node, whole, bounds)
        if written is None:
            continue
        for user in after:
            user.replace_input_with(whole, written)
        view.graph.erase_node(node)
    for cached in ("order", "live", "_mutations"):
        vars(view).pop(cached, None)


def _part_of(view: View, node: fx.Node) -> tuple[fx.Node, list[_Bounds]] | None:
    """The tensor and the part of it that a node writes: slices, or items, of slices of it."""
    written = changed(node)
    if len(written) != 1 or written[0] is not node.args[0] or node.kwargs:
        return None
    whole, bounds = written[0], []
    if view.op(node) == "setitem":
        if (keys := _keys(view, whole, node.args[1])) is None:
            return None
        bounds = keys
    while True:
        if view.op(whole) == "slice":
            names = ("dim", "start", "end", "step")
            bounds.insert(0, _Bounds(*(view.arg(whole, name) for name in names)))
        elif view.op(whole) == "select":
            dim, index = view.arg(whole, "dim"), view.arg(whole, "index")
            if not isinstance(index, int):
                break
            bounds.insert(0, _Bounds(dim, index, index + 1 or None, 1, one=True))
        elif view.op(whole) == "getitem" and view.val(whole.args[0]) is not None:
            if (keys := _keys(view, whole.args[0], whole.args[1])) is None:
                break
            bounds[:0] = keys
        elif whole.target is not torch.ops.aten.alias.default:
            break
        whole = whole.args[0]
    return whole, bounds


def _keys(view: View, whole: fx.Node, key: Any) -> list[_Bounds] | None:
    """The slices and single places of x[key] where there is nothing else in it."""
    keys = list(key) if isinstance(key, tuple) else [key]
    if keys.count(...) > 1 or not all(k is ... or type(k) in (slice, int) for k in keys):
        return None
    if ... in keys:
        at = keys.index(...)
        keys[at : at + 1] = [slice(None)] * (len(view.shape(whole)) - len(keys) + 1)
    found, dim = [], 0
    for k in keys:
        if isinstance(k, int):
            found.append(_Bounds(dim, k, k + 1 or None, 1, one=True))
            continue
        if k != slice(None):
            found.append(_Bounds(dim, k.start, k.stop, 1 if k.step is None else k.step))
        dim += 1
    return found


def _alone(view: View, whole: fx.Node, write: fx.Node) -> bool:
    """Whether nothing that is read after a write could be another view of what it writes."""
    if view.base_of(whole).op in ("placeholder", "get_attr") or _seen_later(view, whole, write):
        return False
    node = whole
    while view.aliases(node):
        above = node.args[0]
        siblings = view.op(above) in ("unbind", "chunk", "split")  # which do not overlap
        for user in () if siblings else above.users:
            if user is not node and (
                view.order[user] > view.order[write]
                or (view.aliases(user) and _read_later(view, user, write))
            ):
                return False
        node = above
    return True


def _seen_later(view: View, whole: fx.Node, write: fx.Node) -> bool:
    """Whether a view of `whole` that was made before the write is read after it."""
    return any(
        user is not write
        and view.order[user] < view.order[write]
        and view.aliases(user)
        and _read_later(view, user, write)
        for user in whole.users
    )


def _read_later(view: View, node: fx.Node, write: fx.Node) -> bool:
    return any(
        user is not write
        and (
            view.order[user] > view.order[write]
            or (view.aliases(user) and _read_later(view, user, write))
        )
        for user in node.users
    )


def _scattered(view: View, node: fx.Node, whole: fx.Node, bounds: list[_Bounds]) -> fx.Node | None:
    """New nodes before `node`: what it writes, and `whole` with that in it."""
    made: list[fx.Node] = []

    def call(function: Any, *args: Any) -> fx.Node:
        new = view.graph.call_function(function, args)
        made.append(new)
        view.order[new] = view.order[node]
        new.meta = {key: v for key, v in node.meta.items() if key not in _VALUES}
        values = fx.node.map_arg(args, View.meta)
        new.meta["val"] = new.meta["example_value"] = function(*values)
        return new

    try:
        parts = [whole]
        for one in bounds:
            parts.append(call(*_taken(parts[-1], one)))
        copied = view.op(node) in _COPIES
        if copied:
            value = node.args[-1]
        else:
            value = call(_OUT_OF_PLACE[view.op(node)], parts[-1], *node.args[1:])
        if copied and isinstance(value, fx.Node) and view.mutated(value, after=node):
            raise ValueError(value)
        part, new = view.val(parts[-1]), view.val(value) if isinstance(value, fx.Node) else None
        if part is None or new is None:
            raise ValueError(value)
        if copied and part.dtype != new.dtype:
            value = call(torch.ops.aten.type_as.default, value, parts[-1])
        if copied and part.shape != new.shape:
            value = call(torch.ops.aten.expand_as.default, value, parts[-1])
        if not copied and (part.shape, part.dtype) != (new.shape, new.dtype):
            raise ValueError(value)
        written = call(torch.ops.aten.clone.default, value) if copied and not bounds else value
        for one, part in zip(bounds[::-1], parts[-2::-1], strict=True):
            if one.one:
                written = call(torch.ops.aten.unsqueeze.default, written, one.dim)
            written = call(torch.ops.aten.slice_scatter.default, part, written, *one.arguments)
    except (KeyError, RuntimeError, TypeError, ValueError):
        for new in made[::-1]:
            view.graph.erase_node(new)
        return None
    result = value if bounds else written
    if bounds and _is_kept(view, node, whole):
        result = written
        for one in bounds:
            result = call(*_taken(result, one))
    node.replace_all_uses_with(result)
    if bounds and not parts[-1].users:
        view.graph.erase_node(parts[-1])
    return written


def _taken(tensor: fx.Node, one: _Bounds) -> tuple[Any, ...]:
    """The operator that takes a part of a tensor, and its arguments."""
    if one.one:
        return torch.ops.aten.select.int, tensor, one.dim, one.start
    return torch.ops.aten.slice.Tensor, tensor, *one.arguments


def _is_kept(view: View, write: fx.Node, whole: fx.Node) -> bool:
    """Whether what a write returns, a part of `whole`, is changed with it or changes it later."""
    if not write.users:
        return False
    later = _changes(view, whole, write)
    return any(_read_later(view, write, change) for change in later) or any(
        _changes(view, write, write)
    )


def _changes(view: View, node: fx.Node, write: fx.Node) -> Iterator[fx.Node]:
    """What changes a tensor in place, itself or through a view of it, after a write."""
    for user in node.users:
        if view.order[user] > view.order[write] and node in changed(user):
            yield user
        if view.aliases(user):
            yield from _changes(view, user, write)


_VALUES = ("val", "example_value", "tensor_meta")
_COPIES = ("copy", "setitem")
_OUT_OF_PLACE = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
}
