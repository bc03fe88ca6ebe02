"""The layouts that a compiled graph's options give: those of each call, and a form for each."""

from __future__ import annotations

import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn

from t5fx.analysis.legality import given_layout
from t5fx.config import LinearizeConfig
from t5fx.errors import ConfigError, RefusedCallError
from t5fx.frontend.calls import Signature
from t5fx.frontend.dynamo import Region, traced_module
from t5fx.frontend.positions import Positions, Reading, Unchanged, lists_in, may_list, objection
from t5fx.graph.view import View
from t5fx.patterns.base import Refusal
from t5fx.pipeline import objector
from t5fx.rewrite.forms import flatten
from t5fx.runtime.state import KEPT

#: Keys of a TTT node's metadata: the name of its module in the model; the list of positions among
#: the graph's inputs that tells its grid, or None.
SITE, LIST = "t5fx_site", "t5fx_list"

#: The sides of grids that the lists of positions among a graph's inputs tell.
Told = dict[Positions, tuple[int, ...]]


class Layouts:
    """What the options of a compiled graph give of layouts, seen from its calls.

    A graph has the call's tensors, not its arguments: these are those of the call of the model that
    is on the stack whenever the graph is compiled or runs.
    """

    def __init__(self, config: LinearizeConfig, region: Region) -> None:
        self.config = config
        models = region.models.values() if config.gives_layout else ()
        model = next((m for m in models if m is not None), None)
        self._model = None if model is None else weakref.ref(model)
        self._class = type(model)
        self._signature = None if model is None else Signature(model.forward)
        self._grids: set[tuple[int, ...]] = set()
        self._checked = Unchanged()

    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """(args, kwargs) of the call that runs: of the model, or of another one of its class."""
        if self._model is None or self._signature is None:
            return None
        found: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code is nn.Module._wrapped_call_impl.__code__:
                variables = frame.f_locals
                module = traced_module(variables["self"])
                if module is self._model() or type(module) is self._class:
                    found = variables["args"], variables["kwargs"]
            frame = frame.f_back  # type: ignore[assignment]
        try:
            return None if found is None else self._signature.bind(*found)
        except TypeError:  # a hook makes other arguments of these
            return None

    def resolved(self) -> LinearizeConfig:
        """The options with values for callables; raises `ConfigError` where no call is seen."""
        if not self.config.has_callables:
            return self.config
        call = self.call()
        if call is None:
            raise ConfigError(
                "grid, prefix, suffix: expected the call of a compiled module, whose arguments a "
                "callable is given, got a graph that runs outside of one: compile the module "
                "itself, or give values"
            )
        return self.config.called(lambda f: f(*call[0], **call[1]))

    def objection(self) -> Callable[[str, tuple[int, ...]], str | None]:
        """Says of a grid that is given for an owner why it is not that of the call, or None."""
        args, kwargs = self.call() or ((), {})
        against = objector(self.config, args, kwargs)

        def noted(owner: str, grid: tuple[int, ...]) -> str | None:
            self._grids.add(grid)
            return against(owner, grid)

        return noted

    def check(self) -> None:
        """Raise `RefusedCallError` where a call tells of another grid than the given numbers."""
        if self.config.has_callables or not self._grids or (call := self.call()) is None:
            return
        leaves = flatten(*call)[2]
        lists = [leaf for leaf in leaves if may_list(leaf)]
        known = self._checked("lists", lists)
        for grid in self._grids:
            seen = [leaf for leaf in leaves if not isinstance(leaf, torch.Tensor)]
            if (against := objection(seen if known else leaves, grid, constant=True)) is not None:
                raise RefusedCallError(against)
        self._checked.note("lists", lists)


class Lists:
    """The lists of positions that tell the grids of a graph, seen from its calls.

    inputs: the number of the graph's inputs.
    """

    def __init__(self, lists: Iterable[Positions], inputs: int) -> None:
        self.told: Told = {one: one.sides for one in lists}
        self._inputs = inputs
        self._reading = Reading()

    def __call__(self, args: Sequence[Any]) -> Told:
        """What they tell in a call, of whose arguments the last are the graph's inputs."""
        told: Told = {}
        for positions in self.told:
            value = args[positions.leaf - self._inputs]
            sides = self._reading(positions, value)
            if sides is None:
                raise RefusedCallError(
                    f"expected positions of the tokens on one grid, row by row, as when the "
                    f"model was compiled (there {' x '.join(map(str, positions.sides))}), got "
                    f"positions that {lists_in([value]).get(0, 'do not vary')}"
                )
            told[positions] = sides
        return told


def set_layouts(graph: fx.Graph, operator: Any, config: LinearizeConfig, told: Told) -> None:
    """Give the TTT nodes of a graph the layouts of another call, in place.

    Raises `RefusedCallError` where that is no layout of their tokens, or not one of as many axes.
    """
    for node in graph.find_nodes(op="call_function", target=operator):
        name, old = node.meta[SITE].rpartition(".")[0], node.kwargs["grid"]
        chosen, listed = config.at(name), node.meta[LIST]
        if listed is not None:
            node.kwargs = {**node.kwargs, "grid": told[listed]}
        if chosen.grid is None:
            continue  # the graph itself shows it
        try:
            tokens = int(View.meta(node.args[0]).shape[2])
            prefix, grid, _ = given_layout(tokens, chosen, None)
        except Refusal as refusal:
            raise RefusedCallError(f"'{name}': {refusal.detail}") from refusal
        if len(grid) != len(old):
            raise RefusedCallError(
                f"'{name}': expected a grid of {len(old)} axes, as when the model was compiled, "
                f"got {grid}: its new parameters were made for that many axes"
            )
        node.kwargs = {**node.kwargs, "grid": grid, "prefix": prefix}


class Variants:
    """The compiled forms of one graph: one for each layout that callables or positions tell.

    make: compiles the graph with the layouts of a configuration and of lists, for given inputs.
    """

    def __init__(
        self,
        layouts: Layouts,
        lists: Lists,
        config: LinearizeConfig,
        first: Callable[..., Any],
        make: Callable[[LinearizeConfig, Told, list[Any]], Callable[..., Any]],
    ) -> None:
        self.layouts, self.lists, self.make = layouts, lists, make
        self._first = (self._key(config, lists.told), first)
        self._others: OrderedDict[Any, Callable[..., Any]] = OrderedDict()

    def __call__(self, *args: Any) -> Any:
        config, told = self.layouts.resolved(), self.lists(args)
        key = self._key(config, told)
        if key == self._first[0]:
            return self._first[1](*args)
        # They are compiled outside of Dynamo, for the sizes at hand.
        sizes = tuple(x.shape if isinstance(x, torch.Tensor) else x for x in args)
        if (key, sizes) not in self._others:
            self._others[key, sizes] = self.make(config, told, list(args))
            if len(self._others) > KEPT:
                self._others.popitem(last=False)
        self._others.move_to_end((key, sizes))
        return self._others[key, sizes](*args)

    @staticmethod
    def _key(config: LinearizeConfig, told: Told) -> tuple[Any, ...]:
        return (config.layout_key, *told.values())
