"""Which of the attentions found may, and should, become TTT nodes.

Legality is judged before the grid, the grid before cost; the first objection is the reason.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from t5fx.canon import View, expr, hint, same
from t5fx.config import LinearizeConfig
from t5fx.errors import LayoutError
from t5fx.kernels import flops
from t5fx.layout import Axes, Axis, layout_of
from t5fx.match import Match, find
from t5fx.patterns.base import Binding, Operand, Refusal
from t5fx.report import Site


@dataclass
class Plan:
    """One attention and what is to become of it.

    prefix, grid: token layout where it is rewritten: an axis of the graph, or a number.
    """

    match: Match
    site: Site
    config: LinearizeConfig
    prefix: tuple[Axis | int, ...] = ()
    grid: tuple[Axis | int, ...] = ()


def plan(view: View, config: LinearizeConfig, keep: frozenset[str] | None = None) -> list[Plan]:
    """Judge every attention of a graph.

    keep: keys of the sites to rewrite, decided before; they are judged again for legality and
    layout, not for selection and cost, and all others are left.
    """
    matches = find(view)
    axes = Axes(view) if matches else None
    plans = []
    for match in matches:
        chosen = config.at(match.owner)
        site = Site(fqn=match.owner, status="skipped", pattern=match.pattern)
        entry = Plan(match, site, chosen)
        plans.append(entry)
        assert axes is not None
        try:
            _judge(view, axes, entry, keep)
            site.status = "rewritten"
        except Refusal as refusal:
            site.reason, site.detail = refusal.reason, refusal.detail
    return plans


def _judge(view: View, axes: Axes, entry: Plan, keep: frozenset[str] | None) -> None:
    match, site, config = entry.match, entry.site, entry.config
    if match.binding is None:
        value = view.val(match.anchor)
        if value is not None and value.dim() >= 2:
            site.num_tokens = hint(value.shape[-1 if match.pattern != "fused" else -2])
        assert match.refusal is not None
        raise match.refusal
    binding = match.binding
    _measure(view, site, binding, config)
    _same_tokens(view, axes, binding)
    if keep is None and not config.selects(match.owner):
        raise Refusal("excluded", "left out by `include` or `exclude`")
    if keep is not None and match.key not in keep:
        raise Refusal("excluded", "was not rewritten when the model was linearized")
    tokens = axes[binding.q.like][binding.q.token]
    entry.prefix, entry.grid = _layout(tokens, site, config)
    if keep is None:
        _pays(site, config)


def _measure(view: View, site: Site, binding: Binding, config: LinearizeConfig) -> None:
    """Fill in the sizes and the FLOPs of both forms."""
    q, k, v = (_sizes(view, o) for o in (binding.q, binding.k, binding.v))
    site.num_tokens, site.num_heads, site.head_dim = q.tokens, q.heads, q.channels
    for name, operand in (("q", binding.q), ("k", binding.k), ("v", binding.v)):
        value = view.val(operand.like)
        assert value is not None
        if not isinstance(expr(value.shape[operand.channel]), int):
            raise Refusal("head-dim", f"the size of {name}'s heads is not static")
    inner = {"inner": config.inner, "inner_loss": config.inner_loss}
    site.flops_before = 2 * q.batch * q.heads * q.tokens * k.tokens * (q.channels + v.channels)
    site.flops_after = flops(
        q.tokens, q.channels, v.channels, num_heads=q.heads, batch=q.batch, **inner
    )


@dataclass(frozen=True)
class _Sizes:
    batch: int
    heads: int
    tokens: int
    channels: int


def _sizes(view: View, operand: Operand) -> _Sizes:
    value = view.val(operand.like)
    assert value is not None
    shape = [hint(n) for n in value.shape]
    outer = [shape[i] for i in operand.batch]
    heads = outer[-1] if len(outer) > 1 else 1
    return _Sizes(math.prod(outer) // heads, heads, shape[operand.token], shape[operand.channel])


def _same_tokens(view: View, axes: Axes, binding: Binding) -> None:
    """Queries, keys and values must be the same tokens, proved by where their axes come from."""
    operands = {"queries": binding.q, "keys": binding.k, "values": binding.v}
    tokens = {name: axes[o.like][o.token] for name, o in operands.items()}
    query = tokens["queries"]
    for name, axis in tokens.items():
        if axis.features:
            detail = f"the {name}' tokens are channels: {_words(axis)}"
            raise Refusal("not-attention", detail)
    for name, axis in tokens.items():
        if axis != query or not same(axis.size, query.size):
            detail = f"the {name} are {_words(axis)}, the queries {_words(query)}"
            raise Refusal("cross-attention", detail)
    outer = {name: _outer(view, o) for name, o in operands.items()}
    shared = list(outer["queries"])
    if binding.groups > 1:
        shared[-1] //= binding.groups
    for name in ("keys", "values"):
        sizes = outer[name]
        if len(sizes) != len(shared) or not all(map(same, sizes, shared)):
            detail = f"batch and heads of the {name} are {sizes}, of the queries {outer['queries']}"
            raise Refusal("cross-attention", detail)


def _outer(view: View, operand: Operand) -> list[Any]:
    return [view.shape(operand.like)[i] for i in operand.batch]


def _words(axis: Axis) -> str:
    if axis.kind == "cat":
        return " then ".join(_words(run) for run in axis.parts)
    dims = axis.grid()
    if dims:
        source = dims[0]
        while source.parts:
            source = source.parts[0]
        return f"{' x '.join(str(d.example) for d in dims)} positions of '{source.source[0]}'"
    source_name = axis.source[0] if isinstance(axis.source, tuple) else axis.kind
    return f"{_example(axis)} tokens of '{source_name}'"


def _layout(
    tokens: Axis, site: Site, config: LinearizeConfig
) -> tuple[tuple[Axis | int, ...], tuple[Axis | int, ...]]:
    found = layout_of(tokens)
    if config.grid is None and config.prefix is None and config.suffix is None:
        if isinstance(found, str):
            if config.locality == "none":
                return (), ()
            raise Refusal("grid-unknown", f"{found}; give `grid` (and `prefix`)")
        site.prefix = sum(_example(a) for a in found.prefix)
        site.suffix = sum(_example(a) for a in found.suffix)
        site.grid = tuple(_example(a) for a in found.grid)
        return found.prefix, found.grid
    assert site.num_tokens is not None
    grid = config.grid
    if grid is None:
        if isinstance(found, str):
            raise Refusal("grid-unknown", f"{found}; give `grid` too")
        grid = tuple(_example(a) for a in found.grid)
    assert not callable(grid) and not callable(config.prefix) and not callable(config.suffix)
    rest = site.num_tokens - math.prod(grid)
    prefix, suffix = config.prefix, config.suffix
    if prefix is None:
        prefix = rest - (suffix or 0)
    if suffix is None:
        suffix = rest - prefix
    if prefix < 0 or suffix < 0 or prefix + suffix != rest:
        raise LayoutError(
            f"site '{site.fqn}': expected prefix + grid + suffix = {site.num_tokens} tokens, got "
            f"{prefix} + {'x'.join(map(str, grid))} + {suffix}"
        )
    site.prefix, site.grid, site.suffix = prefix, grid, suffix
    return (prefix,), grid


def _example(axis: Axis) -> int:
    return 1 if axis.kind == "unit" else axis.example


def _pays(site: Site, config: LinearizeConfig) -> None:
    assert site.num_tokens is not None
    if config.min_tokens is not None:
        if site.num_tokens < config.min_tokens:
            detail = f"{site.num_tokens} tokens, fewer than min_tokens={config.min_tokens}"
            raise Refusal("below-break-even", detail)
        return
    before, after = site.flops_before or 0, site.flops_after or 0
    if after >= before:
        even = math.ceil(site.num_tokens * after / before) if before else 0
        raise Refusal(
            "below-break-even",
            f"{site.num_tokens} tokens; the node needs fewer FLOPs than softmax from "
            f"{even} on (min_tokens=0 rewrites anyway)",
        )
