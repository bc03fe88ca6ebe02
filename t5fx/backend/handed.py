"""Layouts that one graph of a model hands on to the next, past a graph break.

What a graph returns is what the next one is given, the very same tensor. Where the first graph
proves on which grid the positions along an axis of it lie, they lie there in the second one too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from t5fx.analysis.axis import Axis
from t5fx.analysis.layout import Axes, Layout, layout_of
from t5fx.analysis.packed import Listed, packed_layout
from t5fx.backend.layouts import Told
from t5fx.frontend.calls import formula, printed
from t5fx.frontend.dynamo import Region, inside_compiled_module
from t5fx.frontend.positions import Handed, Positions, hand_on
from t5fx.graph.sizes import Size, expr
from t5fx.graph.view import View


@dataclass(frozen=True)
class Offer:
    """The layout along an axis of an output of a graph; sizes in it are those of each call.

    grid: numbers or expressions, or the positions that tell it.
    """

    output: int
    axis: int
    prefix: Size
    grid: tuple[Size, ...] | Positions
    suffix: Size


def offers_of(region: Region, lists: dict[fx.Node, Positions | str]) -> tuple[Offer, ...]:
    """What a graph proves of the tensors that it returns, unless it ends with the compiled call."""
    if region.end is None and not inside_compiled_module():
        return ()
    axes = Axes(region.view, lists)
    (last,) = region.view.graph.find_nodes(op="output")
    found = []
    for i, node in enumerate(last.args[0]):
        if isinstance(node, fx.Node) and node in axes.known:
            for j, axis in enumerate(axes[node]):
                layout = layout_of(axis)
                layout = packed_layout(axis, axis) if isinstance(layout, str) else layout
                if isinstance(layout, Layout):
                    found.append(_offer(i, j, layout))
    return tuple(found)


def _offer(output: int, axis: int, layout: Layout) -> Offer:
    def total(runs: Sequence[Axis]) -> Size:
        return sum((run.size for run in runs), start=0)

    sides = tuple(side if isinstance(side, int) else side.size for side in layout.grid)
    grid = layout.positions if isinstance(layout, Listed) else sides
    return Offer(output, axis, total(layout.prefix), grid, total(layout.suffix))


def handed_to(region: Region, example_inputs: list[Any]) -> dict[fx.Node, Handed]:
    """The layouts that an earlier graph has handed on with inputs of this one."""
    found: dict[fx.Node, Handed] = {}
    for i, (node, value) in enumerate(zip(region.inputs, example_inputs, strict=True)):
        if node not in region.tensors and isinstance(value, torch.Tensor):
            known = Handed.of(i, value)
            if known is not None:
                found[node] = known
    return found


class Handing:
    """A compiled graph that hands on what its outputs are; lists: those among its inputs."""

    def __init__(
        self,
        function: Callable[..., Any],
        offers: tuple[Offer, ...],
        gm: fx.GraphModule,
        lists: Callable[[Sequence[Any]], Told],
    ) -> None:
        self.function, self.offers, self.lists = function, offers, lists
        self._places: dict[str, tuple[int, int | None]] = {}
        for i, node in enumerate(gm.graph.find_nodes(op="placeholder")):
            value = View.meta(node)
            sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
            for j, size in enumerate(sizes):
                if isinstance(size, torch.SymInt):
                    at = (i, j if isinstance(value, torch.Tensor) else None)
                    self._places.setdefault(str(expr(size)), at)
        self._formulas: dict[str, Callable[..., int]] = {}

    def __call__(self, *args: Any) -> Any:
        outputs = self.function(*args)
        told = self.lists(args)
        for offer in self.offers:
            grid = offer.grid
            sides = told[grid] if isinstance(grid, Positions) else [self._of(n, args) for n in grid]
            before, after = self._of(offer.prefix, args), self._of(offer.suffix, args)
            hand_on(outputs[offer.output], offer.axis, (before, tuple(sides), after))
        return outputs

    def _of(self, size: Size, args: tuple[Any, ...]) -> int:
        """A size in a call."""
        if isinstance(size, int):
            return size
        names = tuple(sorted(map(str, size.free_symbols)))
        text = printed(size)
        if text not in self._formulas:
            self._formulas[text] = formula(names, text)
        places = [self._places[name] for name in names]
        return self._formulas[text](
            *(args[i] if j is None else args[i].shape[j] for i, j in places)
        )
