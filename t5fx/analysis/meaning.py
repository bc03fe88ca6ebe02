"""Where tokens come from: prefix, grid and suffix of each token axis, proved from the graph.

One forward pass gives every axis of every tensor a meaning: spatial (it came out of a convolution
or of an image), a row-major merge or a split of other axes, a concatenation of runs, features. A
token axis whose runs hold exactly one grid has a layout; anything else is unknown, never guessed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import fx

from t5fx.analysis.axis import (
    Axis,
    Batch,
    Feature,
    Leaf,
    Plain,
    Repeat,
    Row,
    Side,
    Unit,
    joined,
    made_by,
)
from t5fx.analysis.packed import lists_positions, with_tables
from t5fx.analysis.tokens import Layout, layout_of
from t5fx.frontend.positions import Handed, Positions
from t5fx.graph.sizes import Size, hint, same
from t5fx.graph.view import CONSTANT, View

log = logging.getLogger(__name__)

Rule = Callable[["Axes", fx.Node], "tuple[Axis, ...] | None"]
RULES: dict[str, Rule] = {}

Kind = TypeVar("Kind", bound=Leaf)

#: Of the batch items of all inputs.
_BATCH = ("batch",)


#: Operators that read nothing of a tensor but its sizes, dtype and device.
_FILLED = {
    *("zeros_like", "ones_like", "full_like", "empty_like"),
    *("new_zeros", "new_ones", "new_full", "new_empty"),
}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register how the axes of an operator's output come from those of its inputs."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


class Axes:
    """The meaning of every axis of every tensor of a graph: `axes[node][i]`.

    lists: what inputs that list positions tell of the grid, as `frontend.positions.lists_in`.
    """

    def __init__(self, view: View, lists: Mapping[fx.Node, Positions | str] | None = None) -> None:
        self.view = view
        self.lists = lists or {}
        self.known: dict[fx.Node, tuple[Axis, ...]] = {}
        self._data: dict[fx.Node, bool] = {}
        for node in view.graph.nodes:
            value = view.val(node)
            sized = isinstance(View.meta(node), int | torch.SymInt)
            inputs = (self._data[n] for n in node.all_input_nodes)
            constant = sized or view.op(node) in _FILLED or CONSTANT in node.meta
            self._data[node] = not constant and (node.op == "placeholder" or any(inputs))
            if value is not None:
                self.known[node] = self._infer(node, value)

    def __getitem__(self, node: fx.Node) -> tuple[Axis, ...]:
        return self.known[node]

    def _infer(self, node: fx.Node, value: torch.Tensor) -> tuple[Axis, ...]:
        shape = self.view.shape(node)
        name = self.view.op(node)
        function = RULES.get(name)
        if function is None and self.view.pointwise(node):
            function = pointwise
        try:
            axes = function(self, node) if function and shape else None
        except (IndexError, KeyError, TypeError, ValueError) as error:
            # A call written in a way that the rule does not know: its axes are unknown.
            log.info("the axes of %s are unknown: %s", node.format_node(), error, exc_info=True)
            axes = None
        if axes is None or len(axes) != len(shape):
            axes = tuple(self.plain(node, i) for i in range(len(shape)))
        # An axis of size one says nothing unless it is a side of a grid; a size that a rule got
        # wrong is not believed.
        return tuple(
            Unit(made=made_by(a), data=a.data, at=(node, i), example=1)
            if size == 1 and not a.grid and not a.sliced
            else replace(a, at=(node, i), example=hint(value.shape[i]))
            if same(a.size, size)
            else self.plain(node, i)
            for i, (a, size) in enumerate(zip(axes, shape, strict=True))
        )

    def data(self, node: fx.Node) -> bool:
        """Whether the values of a node depend on the inputs of the model, not only its sizes."""
        return self._data[node]

    def fresh(self, node: fx.Node, i: int, kind: type[Kind]) -> Kind:
        """A new axis that `node` makes."""
        return kind(self.view.shape(node)[i], (node.name, i), data=self.data(node))

    def beside_batch(self, node: fx.Node) -> bool:
        """Whether inputs whose first axis surely counts the batch say that it has another size."""
        batches = [
            self.view.shape(other)[0]
            for other in self.view.graph.find_nodes(op="placeholder")
            if (value := self.view.val(other)) is not None
            and value.is_floating_point()
            and value.dim() > 2
            and other not in self.lists
            and CONSTANT not in other.meta
        ]
        return bool(batches) and not any(same(b, self.view.shape(node)[0]) for b in batches)

    def plain(self, node: fx.Node, i: int) -> Plain:
        """A new axis of which no more is known."""
        return self.fresh(node, i, Plain)


@rule("placeholder")
def _input(axes: Axes, node: fx.Node) -> tuple[Axis, ...]:
    """The first axis counts batch items, the same in all inputs; the others are undecided.

    But for lists of positions, and for a table [N, D] beside inputs whose batch has another size.
    Only [B, N, C] has its channels last for sure; of [B, C, H, W], [B, H, W, C], [B, T, N, C] the
    operators that read them tell: a convolution, or what cuts two sides into equal patches.
    """
    rank = len(axes.view.shape(node))
    if not axes.data(node):  # a constant of the model
        return tuple(axes.plain(node, i) for i in range(rank))
    value = axes.view.val(node)
    floating = value is not None and value.is_floating_point()
    kinds: list[type[Leaf]] = [Side if floating and rank > 3 else Plain] * rank
    if floating and rank == 3:
        kinds[-1] = Feature
    result: list[Axis] = [axes.fresh(node, i, kinds[i]) for i in range(rank)]
    if not (floating and rank == 2 and axes.beside_batch(node)):
        result[0] = replace(axes.fresh(node, 0, Batch), made=_BATCH)
    known = axes.lists.get(node)
    if isinstance(known, Handed):
        result[known.axis] = _handed(axes, node, known)
    elif known is not None:
        result[rank - 2] = replace(axes.fresh(node, rank - 2, Row), positions=known)
    return tuple(result)


def _handed(axes: Axes, node: fx.Node, known: Handed) -> Axis:
    """The tokens of an input whose layout an earlier graph has proved."""
    whole, count = axes.fresh(node, known.axis, Plain), math.prod(known.sides)
    size = whole.size - known.prefix - known.suffix
    rows = Row(size, whole.made, positions=known, at=(node, known.axis), example=count)
    parts: list[tuple[str, Size, int]] = [
        ("before", known.prefix, known.prefix),
        ("grid", size, count),
        ("after", known.suffix, known.suffix),
    ]
    runs = tuple(
        Plain(size, (*whole.made, part), example=n, tables=(rows,) if part == "grid" else ())
        for part, size, n in parts
        if n
    )
    return joined(whole.size, runs)


def pointwise(axes: Axes, node: fx.Node) -> tuple[Axis, ...]:
    """Broadcast the inputs; of the axes that meet, the one that says most about tokens stays.

    Of those that say as much, it is that of the input with the most axes: a table has fewer.
    """
    shape, sources = axes.view.shape(node), axes.view.inputs(node)
    if len(sources) == 1 and len(axes[sources[0]]) == len(shape):
        return axes[sources[0]]
    product = axes.view.op(node) == "mul"
    sources.sort(key=lambda n: -sum(not isinstance(a, Unit) for a in axes[n]))
    result = []
    for i, size in enumerate(shape):
        places = [(axes[source], i - len(shape) + len(axes[source])) for source in sources]
        there = [its[j] for its, j in places if j >= 0]
        meeting = [axis for axis in there if same(axis.size, size)]
        known = [a for a in meeting if not isinstance(a, Unit) or a.made]
        known = [a for a in known if not isinstance(a, Unit)] or known
        best = meet(known) if known else (meeting or [axes.plain(node, i)])[0]
        # Those of a table may have another expression for their size: that they met proves it.
        count = max((a.count for a in known), default=1)
        tables = [a for a in there if a not in known and a.count == count > 1]
        result.append(with_tables(best, [*known, *tables], product=product))
    return tuple(result)


def meet(meeting: Sequence[Axis]) -> Axis:
    """Of several axes, the one that says most; a plain one where grids contradict each other."""
    if len(meeting) == 1:
        return meeting[0]

    def says(axis: Axis) -> tuple[bool, bool, int, bool]:
        weight = 2 if isinstance(axis, Plain | Side) else 3
        weight = 0 if isinstance(axis, Repeat) else 1 if lists_positions(axis) else weight
        return axis.data, _grids(axis), weight, not axis.repeats

    best = max(meeting, key=says)  # the first of equals
    rivals = [a for a in meeting if a.data == best.data and _grids(a) and a != best]
    if _grids(best) and any(_shape_of(a) != _shape_of(best) for a in rivals):
        return _conflict(best, meeting)
    return best


def meet_items(meeting: Sequence[Axis]) -> Axis:
    """Of the same axis of several items of a batch, the one that says most.

    Unlike tokens that are added to each other, those of one item need not be where those of
    another are: a plain axis where only some of them are known to be a grid.
    """
    best = meet(meeting)
    if _grids(best) and any(a.data and not isinstance(a, Unit) and not _grids(a) for a in meeting):
        return _conflict(best, meeting)
    return best


def _conflict(best: Axis, meeting: Sequence[Axis]) -> Plain:
    return Plain(best.size, ("conflict", *(repr(made_by(a)) for a in meeting)))


def _grids(axis: Axis) -> bool:
    return isinstance(layout_of(axis), Layout)


def _shape_of(axis: Axis) -> tuple[Size, ...]:
    found = layout_of(axis)
    sides = found.grid if isinstance(found, Layout) else ()
    return tuple(a if isinstance(a, int) else a.size for a in sides)


def rank_of(axes: Axes, node: fx.Node) -> int:
    return len(axes.view.shape(node))
