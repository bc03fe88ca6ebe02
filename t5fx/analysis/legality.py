"""Whether an attention may be rewritten at all: its heads, its tokens and their layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from t5fx.analysis.axis import Axis, Cat, Chosen, Merge, Repeat, Unit, made_by, runs_of
from t5fx.analysis.layout import Axes
from t5fx.analysis.packed import Listed, packed_layout
from t5fx.analysis.tokens import Layout, layout_of
from t5fx.analysis.variant import variant_of
from t5fx.config import LinearizeConfig
from t5fx.frontend.positions import is_coarser
from t5fx.graph.sizes import same
from t5fx.graph.view import View
from t5fx.patterns.base import Binding, Refusal
from t5fx.reports import Site


def check_independent(view: View, binding: Binding) -> None:
    """None of q, k and v may be computed from the attention's own scores."""
    first = min(view.order[node] for node in binding.nodes)
    stack = [binding.q.node, binding.k.node, binding.v.node]
    seen: set[Any] = set()
    while stack:
        node = stack.pop()
        if node in binding.nodes:
            detail = f"q, k or v is computed from '{node.name}', a part of the same attention"
            raise Refusal("probabilities-used", detail)
        if node not in seen and view.order[node] > first:
            seen.add(node)
            stack.extend(node.all_input_nodes)


def find_heads(view: View, axes: Axes, binding: Binding) -> None:
    """Find the heads among the outer axes of the queries: the axis that features were split into.

    Raises `Refusal` where several axes are, or where batch items lie inside the heads.
    """
    outer = [axes[binding.q.like][i] for i in binding.q.batch]
    heads = [i for i, axis in enumerate(outer) if axis.features]
    if len(heads) > 1:
        raise Refusal(
            "head-dim", f"{len(heads)} axes count heads: {', '.join(map(in_words, outer))}"
        )
    if not heads:
        binding.heads, binding.merged = None, 1
        return
    axis = outer[heads[0]]
    binding.heads, binding.merged = heads[0], 1
    if isinstance(axis, Merge) and not all(part.features for part in axis.parts):
        inner = axis.parts[-1]
        if not inner.features or any(part.features for part in axis.parts[:-1]):
            raise Refusal("head-dim", f"the heads in {in_words(axis)} are not innermost")
        if not isinstance(inner.size, int):
            raise Refusal("head-dim", f"the number of heads is not static: {inner.size}")
        binding.merged = inner.size


def check_same_tokens(view: View, axes: Axes, binding: Binding) -> None:
    """Queries, keys and values must be the same tokens, proved by where their axes come from."""
    operands = {"queries": binding.q, "keys": binding.k, "values": binding.v}
    tokens = {name: axes[o.like][o.token] for name, o in operands.items()}
    query = tokens["queries"]
    for name, axis in tokens.items():
        # Of tokens that a layer along them made, the channels are features as well.
        if axis.features and not axes[operands[name].like][operands[name].channel].features:
            detail = f"the {name}' tokens are channels: {in_words(axis)}"
            raise Refusal("not-attention", detail)
    for name, axis in tokens.items():
        if axis != query or not same(axis.size, query.size):
            detail = f"the {name} are {in_words(axis)}, the queries {in_words(query)}"
            raise Refusal("cross-attention", detail)
    outer = {n: [axes[o.like][i] for i in o.batch] for n, o in operands.items()}
    for name, found in outer.items():
        if any(axis.sliced for axis in found):
            detail = f"the {name} are a slice of the heads of all items of the batch together"
            raise Refusal("sliced", detail)
    for name in ("keys", "values"):
        pairs = zip(outer["queries"], outer[name], strict=False)
        if len(outer[name]) != len(outer["queries"]) or not all(
            _together(view, *pair) for pair in pairs
        ):
            if any(_one_head(view, axis) for axis in (*outer["queries"], *outer[name])):
                raise Refusal("sliced", "the heads are worked through one by one")
            theirs = ", ".join(map(in_words, outer[name]))
            ours = ", ".join(map(in_words, outer["queries"]))
            detail = f"batch and heads of the {name} are ({theirs}), of the queries ({ours})"
            raise Refusal("cross-attention", detail)
    for run in runs_of(query):
        if isinstance(run, Chosen) and run.how[0] == "chosen by":
            detail = f"'{run.how[1]}' chooses, depending on the input, which tokens take part"
            raise Refusal("masked", detail)


def check_masks(view: View, axes: Axes, binding: Binding) -> None:
    """Masks of keys must say the same for all heads, and their items be those of the queries."""
    for mask in binding.masks:
        outer = mask.outer_axes(view)
        items = _items(axes, binding, len(outer))
        for axis in sorted(mask.outer):
            found, wanted = axes[mask.like][axis], items[outer.index(axis)]
            if found != wanted:
                detail = (
                    f"the mask '{mask.node.name}' differs along {in_words(found)}: expected the "
                    f"same keys hidden from all heads of an item"
                )
                raise Refusal("masked", detail)


def _items(axes: Axes, binding: Binding, count: int) -> list[Axis | None]:
    """Of so many axes of batch and heads those that count items; None for others."""
    q = binding.q
    own: list[Axis | None] = [axes[q.like][i] for i in q.batch]
    heads = binding.heads_in(count)
    if count == len(own) and binding.merged == 1:
        return [None if i == heads else axis for i, axis in enumerate(own)]
    shared = own[0]
    if count == 2 and len(own) == 1 and isinstance(shared, Merge) and len(shared.parts) == 2:
        return [shared.parts[0], None]
    return [None] * count


def _picked_out(view: View, axis: Unit) -> bool:
    """Whether an axis of size one is one of several positions."""
    chosen = bool(axis.made) and axis.made[0] in ("from", "chosen by", "moved by")
    return chosen or _one_head(view, axis)


def _one_head(view: View, axis: Axis) -> bool:
    """Whether an outer axis is one position that was sliced off."""
    if not isinstance(axis, Unit) or not axis.made:
        return False
    node = next((n for n in view.order if n.name == axis.made[0]), None)
    return node is not None and view.op(node) in ("slice", "getitem", "index", "index_select")


def _together(view: View, query: Axis, other: Axis) -> bool:
    """Whether position i of one outer axis meets position i of the other for the same item.

    Heads come from different projections; there only their number has to fit, which the product
    itself ensures. Everything else must be one and the same axis.
    """
    if query == other:
        return True
    if isinstance(query, Unit) and isinstance(other, Unit):  # one item, or one head
        return not (_picked_out(view, query) or _picked_out(view, other))
    if isinstance(query, Merge) and isinstance(other, Merge):
        if len(query.parts) == len(other.parts):
            return all(
                _together(view, *pair) for pair in zip(query.parts, other.parts, strict=True)
            )
    if query.features or isinstance(other, Repeat):
        return query.features and (other.features or isinstance(other, Repeat | Unit))
    return False


def in_words(axis: Axis) -> str:
    if isinstance(axis, Cat):
        return " then ".join(in_words(run) for run in axis.parts)
    if isinstance(axis, Chosen):
        return f"{axis.count} of {in_words(axis.whole)}, {' '.join(map(str, axis.how))}"
    dims = axis.grid
    if dims:
        source = dims[0]
        while source.inside:
            source = source.inside[0]
        return f"{' x '.join(str(d.count) for d in dims)} positions of '{made_by(source)[0]}'"
    made = made_by(axis) or (type(axis).__name__.lower(),)
    return f"{axis.count} tokens of '{made[0]}'"


def proved_layout(axes: Axes, binding: Binding) -> Layout | str:
    """The layout of a site's tokens that the graph proves, or a sentence on what is missing."""
    query, key = (axes[o.like][o.token] for o in (binding.q, binding.k))
    found = layout_of(query)
    return (packed_layout(query, key) or found) if isinstance(found, str) else found


def find_layout(
    found: Layout | str,
    site: Site,
    config: LinearizeConfig,
    objection: Callable[[tuple[int, ...]], str | None],
) -> tuple[tuple[Axis | int, ...], tuple[Axis | int, ...], tuple[Axis | int, ...]]:
    """prefix, grid and suffix of a site: as found by `proved_layout`, or as they are given.

    objection: says of a given grid why it is not that of the call, or None. Raises `Refusal`.
    """
    if config.grid is None and config.prefix is None and config.suffix is None:
        if isinstance(found, str):
            if variant_of(config, axes=2).does_without_grid:
                return (), (), ()
            raise Refusal("grid-unknown", f"{found}; give `grid` (and `prefix`)")
        site.prefix, site.grid, site.suffix = found.counts
        return found.prefix, found.grid, found.suffix
    assert site.num_tokens is not None
    proved = None if isinstance(found, str) else found.counts[1]
    if config.grid is None and proved is None:
        raise Refusal("grid-unknown", f"{found}; give `grid` too")
    prefix, grid, suffix = given_layout(site.num_tokens, config, proved)
    if isinstance(found, str | Listed) and config.grid is not None:
        if (against := objection(grid)) is not None:
            raise Refusal("grid-unknown", against)
    if isinstance(found, Layout):
        before, proved, after = found.counts
        if prefix != before or not is_coarser(grid, proved):
            raise Refusal(
                "grid-unknown",
                f"expected the layout that the graph shows, {before} + "
                f"{'x'.join(map(str, proved))} + {after}, got "
                f"{prefix} + {'x'.join(map(str, grid))} + {suffix}",
            )
        if config.grid is None:
            site.prefix, site.grid, site.suffix = prefix, grid, suffix
            return found.prefix, found.grid, found.suffix
    site.prefix, site.grid, site.suffix = prefix, grid, suffix
    return (prefix,), grid, (suffix,)


def given_layout(
    tokens: int, config: LinearizeConfig, proved: tuple[int, ...] | None
) -> tuple[int, tuple[int, ...], int]:
    """(prefix, grid, suffix) of so many tokens where the configuration gives some of the three.

    proved: the grid where it does not give that. Raises `Refusal` where they do not add up.
    """
    grid = proved if config.grid is None else config.grid
    prefix, suffix = config.prefix, config.suffix
    assert grid is not None
    assert not callable(grid) and not callable(prefix) and not callable(suffix)
    rest = tokens - math.prod(grid)
    if prefix is None:
        prefix = rest - (suffix or 0)
    if suffix is None:
        suffix = rest - prefix
    if prefix < 0 or suffix < 0 or prefix + suffix != rest:
        raise Refusal(
            "grid-unknown",
            f"expected prefix + grid + suffix = {tokens} tokens, got "
            f"{prefix} + {'x'.join(map(str, grid))} + {suffix}",
        )
    return prefix, grid, suffix
