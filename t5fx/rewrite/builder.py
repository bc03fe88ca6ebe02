"""Nodes that bring queries, keys and values to a TTT node, and its output back."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch.nn import functional

from t5fx.analysis.axis import Axis
from t5fx.analysis.key_masks import LEAST, KeyMask
from t5fx.errors import RefusedCallError
from t5fx.graph.blocks import INSIDE
from t5fx.graph.sizes import Size
from t5fx.graph.view import View
from t5fx.patterns.base import Binding, Operand

#: Overloads of the ATen operators that are added to ATen graphs, where not "default".
_OVERLOADS = {
    **{"to": "dtype", "mul": "Tensor", "div": "Tensor", "repeat_interleave": "self_int"},
    **{"flatten": "using_ints", "select": "int", "gt": "Scalar"},
}


#: Operators whose output's strides follow from their input's.
STRIDED = {
    *("permute", "transpose", "t", "mT", "slice", "select", "getitem", "unbind", "chunk", "split"),
    *("expand", "movedim"),
}


def counted(mask: torch.Tensor) -> torch.Tensor:
    """Where a mask that is added to scores is 0; elsewhere it must hide the key.

    Raises `RefusedCallError` where it does not; in compiled code a check is part of the graph.
    """
    seen = mask == 0
    legal = (seen | (mask <= LEAST)).all()
    message = f"expected a mask that is 0 where keys count and at most {LEAST} elsewhere"
    if torch.compiler.is_compiling() or detect_fake_mode([mask]) is not None:
        torch._assert_async(legal, message)
    elif not legal:
        raise RefusedCallError(
            f"{message}, got values from {mask.min():.4g} to {mask.max():.4g}: other numbers are "
            f"a bias, which a TTT node has no place for; t5fx.softmax(model) brings the original "
            f"attention back for such calls"
        )
    return seen


def _heads_last(count: int, heads: int | None) -> list[int]:
    """Outer axes in the order batch..., heads."""
    return sorted(range(count), key=lambda i: i == heads)


class Builder:
    """Adds nodes to a graph in the dialect that the replaced node was written in."""

    def __init__(self, view: View, like: fx.Node, replaced: dict[fx.Node, fx.Node]) -> None:
        self.view, self.graph, self.replaced = view, view.graph, replaced
        self.aten = isinstance(like.target, torch._ops.OpOverload)
        keys = ("nn_module_stack", "stack_trace", "source_fn_stack", INSIDE)
        self.key = "example_value" if "example_value" in like.meta else "val"
        self.meta = {k: like.meta[k] for k in keys if k in like.meta}

    def call(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        """An operator: as an ATen overload in ATen graphs, as a method in torch-level ones."""
        if not self.aten:
            return self._stamp(self.graph.call_method(name, args, kwargs))
        packet = getattr(torch.ops.aten, name)
        target = getattr(packet, _OVERLOADS.get(name, "default"))
        return self._stamp(self.graph.call_function(target, args, kwargs))

    def module(self, target: str, args: tuple[fx.Node, ...], kwargs: dict[str, Any]) -> fx.Node:
        """The node itself: [B, H, N, D] twice and [B, H, N, Dv] -> [B, H, N, Dv]."""
        node = self.graph.create_node("call_module", target, args, kwargs)
        q, _, v = (self.view.val(n) for n in args)
        assert q is not None and v is not None
        return self._stamp(node, q.new_empty((*q.shape[:-1], v.shape[-1])))

    def again(self, node: fx.Node, instead: dict[fx.Node, fx.Node]) -> fx.Node:
        """A copy of a node that reads other nodes instead of some of its inputs."""
        return self._stamp(self.graph.node_copy(node, lambda n: instead.get(n, n)))

    def _stamp(self, node: fx.Node, value: Any = None) -> fx.Node:
        """Give a new node what tracing would have: where it is from, and its (fake) value."""
        node.meta.update(self.meta)
        if value is None:
            args, kwargs = fx.map_arg((node.args, node.kwargs), View.meta)
            if node.op == "call_method":
                value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            elif node.op == "call_module":  # a dropout
                value = args[0]
            else:
                value = node.target(*args, **kwargs)
        node.meta[self.key] = value
        return node

    def canonical(self, operand: Operand, binding: Binding) -> fx.Node:
        """The operand as [B, H, N, D]."""
        node = self.replaced.get(operand.node, operand.node)
        for layout in operand.replay:
            source = self.view.inputs(layout)[0]
            node = self.again(layout, {source: node})
        if operand.factor != 1.0:
            node = self.call("mul", node, 1.0 / operand.factor)
        outer = [operand.batch[i] for i in _heads_last(len(operand.batch), binding.heads)]
        order = [*outer, operand.token, operand.channel]
        if order != list(range(len(order))):
            node = self.call("permute", node, order)
        if binding.merged > 1:
            tokens = self.size_of(operand.like, operand.token)
            channels = self.view.shape(operand.like)[operand.channel]
            return self.call("reshape", node, [-1, binding.merged, tokens, channels])
        batch = len(outer) - (binding.heads is not None)
        if batch > 1:
            node = self.call("flatten", node, 0, batch - 1)
        if batch == 0:
            node = self.call("unsqueeze", node, 0)
        return node if binding.heads is not None else self.call("unsqueeze", node, 1)

    def key_mask(self, masks: tuple[KeyMask, ...], binding: Binding, q: fx.Node) -> fx.Node:
        """[B, N], true for tokens that count as keys; q: the queries [B, H, N, D]."""
        found: fx.Node | None = None
        for mask in masks:
            one = self._counting(mask, binding, q)
            found = one if found is None else self.call("logical_and", found, one)
        assert found is not None
        return found

    def _counting(self, mask: KeyMask, binding: Binding, q: fx.Node) -> fx.Node:
        """What one mask says of the tokens of an item: its diagonal, where it has queries."""
        node = self.replaced.get(mask.node, mask.node)
        for _ in range(-min(mask.rows, mask.columns) - len(self.view.shape(node))):
            node = self.call("unsqueeze", node, 0)
        rank = len(self.view.shape(node))
        rows, columns = mask.rows + rank, mask.columns + rank
        order = [i for i in range(rank) if i not in (rows, columns)]
        if [*order, rows, columns] != list(range(rank)):
            node = self.call("permute", node, [*order, rows, columns])
        if self.view.shape(node)[-2] == 1:
            node = self.call("select", node, -2, 0)
        else:
            node = self.call("diagonal", node, 0, -2, -1)
        count = len(mask.outer_axes(self.view))
        heads = binding.heads_in(count)
        if heads is not None and count - heads < len(self.view.shape(node)):
            node = self.call("select", node, heads - count - 1, 0)
        batch = [i for i in range(count) if i != heads]
        tokens = self.size_of(q, 2)
        if len(batch) > 1 and count == len(binding.q.batch):
            sizes = [self.size_of(binding.q.like, binding.q.batch[i]) for i in batch]
            node = self.call("expand", node, [*sizes, tokens])
            node = self.call("reshape", node, [-1, tokens])
        else:
            node = self.call("expand", node, [self.size_of(q, 0), tokens])
        if mask.checked:
            return self._stamp(self.graph.call_function(counted, (node,)))
        if mask.kind == "added":
            return self.call("gt", node, LEAST / 2)
        return self.call("bitwise_not", node) if mask.kind == "fill" else node

    def broadcast(self, node: fx.Node, heads: Size) -> fx.Node:
        """Keys or values [B, 1, N, D] of one head for all heads of the queries."""
        one = self.view.shape(node)[1] == 1 != heads
        return self.call("expand", node, [-1, heads, -1, -1]) if one else node

    def restored(self, node: fx.Node, binding: Binding) -> fx.Node:
        """[B, H, N, Dv] in the axes and the shape of the tensor that it replaces."""
        q, width = binding.q, self.view.shape(node)[3]
        order = _heads_last(len(q.batch), binding.heads)
        tokens = self.size_of(q.like, q.token)
        if len(order) != 2 or binding.heads is None or binding.merged > 1:
            sizes = [self.size_of(q.like, q.batch[i]) for i in order]
            node = self.call("reshape", node, [*sizes, tokens, width])
        back = [order.index(i) for i in range(len(order))]  # outer axes as the query has them
        axes = binding.output_axes
        outer = [i for i, kind in enumerate(axes) if kind == "b"]
        if len(outer) != len(order):  # batch and heads were one axis, seen apart further up
            if back != sorted(back):
                node = self.call("permute", node, [*back, len(back), len(back) + 1])
            node = self.call("reshape", node, [-1, tokens, width])
            back = [0]
        places = dict(zip(outer, back, strict=True))
        places |= {axes.index("t"): len(back), axes.index("c"): len(back) + 1}
        final = [places[i] for i in range(len(axes))]
        return node if final == sorted(final) else self.call("permute", node, final)

    def temperature(self, node: fx.Node, q: fx.Node) -> fx.Node:
        other = next(a for a in node.args if isinstance(a, fx.Node) and self._learned(a))
        return self.call(self.view.op(node), q, other)

    def _learned(self, node: fx.Node) -> bool:
        return not self.view.depends_on_input(node)

    def dropped(self, ones: fx.Node, dropout: Any) -> fx.Node:
        """Dropout of the probabilities as one draw per batch item, head and token, [B, H, N, 1].

        In the inner loss, each token loses its value with the same probability, and the others
        grow by 1 / (1 - p). The expected W' is unchanged: its gradient is linear in v.
        """
        if isinstance(dropout, fx.Node):  # a dropout module, which knows whether it trains
            return self.again(dropout, {self.view.inputs(dropout)[0]: ones})
        target = torch.ops.aten.dropout.default if self.aten else functional.dropout
        return self._stamp(self.graph.call_function(target, (ones, float(dropout), True)))

    def ones(self, v: fx.Node) -> fx.Node:
        """[B, H, N, 1]: one for each token of v."""
        first = self.call("narrow", v, -1, 0, 1)
        return self.call("new_ones", first, self._stamp(self.graph.call_method("size", (first,))))

    def size_of(self, node: fx.Node, axis: int) -> int | fx.Node:
        """A size of an existing node: a number, or a node that reads it."""
        node = self.replaced.get(node, node)
        size = self.view.shape(node)[axis]
        if isinstance(size, int):
            return size
        if not self.aten:
            return self._stamp(self.graph.call_method("size", (node, axis)))
        return self._stamp(self.graph.call_function(torch.ops.aten.sym_size.int, (node, axis)))

    def size(self, axis: Axis | fx.Node | int) -> int | fx.Node:
        if isinstance(axis, int | fx.Node):
            return axis
        if isinstance(axis.size, int):
            return axis.size
        return self.size_of(*axis.at) if axis.at else self.view.sizes[axis.size]

    def total(self, axes: tuple[Axis | fx.Node | int, ...]) -> int | fx.Node:
        result: int | fx.Node = 0
        for size in map(self.size, axes):
            if isinstance(result, int) and (isinstance(size, int) or result == 0):
                result = result + size if isinstance(size, int) else size
            else:
                result = self._stamp(self.graph.call_function(operator.add, (result, size)))
        return result
