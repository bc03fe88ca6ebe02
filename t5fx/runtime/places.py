"""What each owner is told of a judged call: its attentions, and where their layout shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from t5fx.analysis.axis import Axis
from t5fx.analysis.packed import Listed
from t5fx.analysis.policy import Plan
from t5fx.errors import CaptureError
from t5fx.frontend.calls import formula, printed
from t5fx.frontend.capture import Capture
from t5fx.frontend.record import Recorded
from t5fx.graph.modules import module_stack
from t5fx.graph.sizes import Size, expr, same
from t5fx.graph.view import View
from t5fx.reports import Tried
from t5fx.rewrite.forms import Judged, Verdict
from t5fx.runtime.state import LISTED, Layout, List, Source, Term


def verdicts_of(
    looked: Looked, places: Places
) -> tuple[dict[str, Verdict], dict[str, tuple[Layout | None, ...]]]:
    """By owner with a rewritten attention: the verdict, and the layout of each attention."""
    by_owner: dict[str, list[Plan]] = {}
    calls: dict[str, Any] = {}
    for entry in looked.plans:
        owner = entry.match.owner
        stack = [key for key, name in module_stack(entry.match.anchor) if name == owner]
        call = stack[-1] if stack else ""
        if calls.setdefault(owner, call) == call:  # of several calls of a module, the first
            by_owner.setdefault(owner, []).append(entry)
    verdicts, layouts = {}, {}
    for owner, entries in by_owner.items():
        if not any(entry.site.status == "rewritten" for entry in entries):
            continue
        inline = frozenset().union(*(entry.match.inline for entry in entries))
        verdicts[owner] = Verdict(tuple(map(_judged, entries)), inline)
        layouts[owner] = tuple(
            places.layout(entry) if entry.site.status == "rewritten" and entry.grid else None
            for entry in entries
        )
    return verdicts, layouts


def _judged(entry: Plan) -> Judged:
    child = entry.match.key.rpartition(".")[2]
    binding = entry.match.binding
    if entry.site.status != "rewritten" or binding is None:
        return Judged(child, rewritten=False)
    size = (entry.site.num_heads, entry.site.head_dim)
    return Judged(
        *(child, True, binding.heads, binding.merged, size, binding.scale, len(entry.grid)),
        masked=bool(binding.masks),
        checked=any(mask.checked for mask in binding.masks),
    )


class Places:
    """Finds where the sizes of a layout can be read in any call of the kind.

    origins: by module, which (leaf, axis) of its output is recorded; starts with what earlier kinds
    have recorded.
    """

    def __init__(self, looked: Looked, recorded: Mapping[str, tuple[tuple[int, int], ...]]) -> None:
        self.looked = looked
        self.origins = {name: list(axes) for name, axes in recorded.items()}
        self.arguments: list[Any] = []
        self.lists: list[List] = []
        self._formulas: dict[str, int] = {}

    def layout(self, entry: Plan) -> Layout:
        listed, owner = entry.listed, entry.match.owner
        terms = (self._term(axis, owner) for axis in entry.grid)
        grid = self._listed(listed) if listed else tuple(terms)
        prefix: Term | None = self._total(entry.prefix)
        suffix = self._total(entry.suffix)
        if prefix is None and suffix is None:
            size: Size = 0
            for axis in entry.prefix:
                size = size + (axis.size if isinstance(axis, Axis) else axis)
            prefix = self._argument(size)
        return Layout(prefix, grid, suffix)

    def _listed(self, layout: Listed) -> tuple[Term, ...]:
        """The sides that a list of positions has in the call."""
        positions, before = layout.positions, 0
        for known in self.lists:
            if known.positions == positions:
                break
            before += len(known.positions.sides)
        else:
            size = layout.run.size
            tokens = size if isinstance(size, int) else self._argument(size)
            self.lists.append(List(positions, tokens))
        return tuple(Source(LISTED, before + i) for i in range(len(positions.sides)))

    def _total(self, axes: tuple[Axis | fx.Node | int, ...]) -> int | None:
        """The number of tokens of some runs, where it is always the same."""
        sizes = [axis.size if isinstance(axis, Axis) else axis for axis in axes]
        return sum(sizes) if all(isinstance(n, int) for n in sizes) else None

    def _term(self, axis: Axis | fx.Node | int, owner: str) -> Term:
        if isinstance(axis, int):
            return axis
        assert isinstance(axis, Axis)
        if isinstance(axis.size, int):
            return axis.size
        if axis.at is not None:
            names = [name for _, name in module_stack(axis.at[0]) if name]
            for name in reversed(names):
                if f"{owner}.".startswith(f"{name}."):
                    continue  # its output comes after the attention
                found = self._shown(name, axis.size)
                if found is not None:
                    return found
        return self._argument(axis.size)

    def _shown(self, name: str, size: Size) -> Source | None:
        outputs = self.looked.recorded.outputs.get(name, [])
        if len(outputs) != 1:
            return None
        for i, leaf in enumerate(pytree.tree_leaves(outputs[0])):
            if not isinstance(leaf, torch.Tensor):
                continue
            # The axes of a grid are the last ones of an image; a batch may have the same size.
            for j in reversed(range(leaf.dim())):
                own = expr(leaf.shape[j])
                if not isinstance(own, int) and same(own, size):
                    axes = self.origins.setdefault(name, [])
                    if (i, j) not in axes:
                        axes.append((i, j))
                    return Source(name, axes.index((i, j)))
        return None

    def _argument(self, size: Size) -> Source:
        assert not isinstance(size, int)
        text = printed(size)
        if text not in self._formulas:
            symbols = self.looked.captured.guards.symbols
            free = {str(symbol) for symbol in size.free_symbols}
            if not free <= set(symbols):
                raise CaptureError(
                    f"expected a layout that follows from the sizes of the arguments, got {text}"
                )
            self._formulas[text] = len(self.arguments)
            self.arguments.append(formula(symbols, text))
        return Source("", self._formulas[text])


@dataclass
class Looked:
    captured: Capture
    view: View
    plans: list[Plan]
    tried: dict[str, Tried]
    recorded: Recorded
