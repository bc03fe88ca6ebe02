"""Rules for operators that cut, pick and write parts of tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from t5fx.analysis.axis import (
    Axis,
    Cat,
    Chosen,
    Feature,
    Leaf,
    Picked,
    Plain,
    Unit,
    joined,
    put_back,
    runs_of,
)
from t5fx.analysis.meaning import RULES, Axes, rank_of, rule
from t5fx.analysis.rules_compute import attention, normalised, reduced
from t5fx.graph.sizes import Size, expr, same
from t5fx.graph.view import View


@rule("slice")
def _slice(axes: Axes, node: fx.Node) -> tuple[Axis, ...]:
    source = axes.view.inputs(node)[0]
    dim = (axes.view.arg(node, "dim", 0) or 0) % rank_of(axes, node)
    bounds = (axes.view.arg(node, "start"), axes.view.arg(node, "end"))
    result = list(axes[source])
    if axes.view.arg(node, "step", 1) not in (1, None):
        result[dim] = axes.fresh(node, dim, Feature if result[dim].features else Plain)
        return tuple(result)
    result[dim] = _cut(axes, node, dim, axes[source][dim], *bounds)
    return tuple(result)


def _cut(axes: Axes, node: fx.Node, dim: int, axis: Axis, start: Any, end: Any) -> Axis:
    """The runs of a concatenation that lie between two positions."""
    size = axes.view.shape(node)[dim]
    if same(axis.size, size):
        return axis
    runs = runs_of(axis)
    found = _between(runs, _position(axes.view, start, axis.size), size)
    if found is None and axis.features and not axis.of_items:
        return axes.fresh(node, dim, Feature)
    if found is None:
        return _neighbours(axis, _position(axes.view, start, axis.size), size)
    kept = runs[found]
    return kept[0] if len(kept) == 1 else Cat(size, kept)


def _neighbours(axis: Axis, begin: Size, size: Size) -> Axis:
    """Some neighbouring positions of an axis that are no whole run."""
    return Chosen(size, axis, ("from", begin), data=axis.data)


def _between(runs: tuple[Axis, ...], begin: Size, size: Size) -> slice | None:
    """The runs that make up `size` positions from `begin` on, or None."""
    total: Size = 0
    for i in range(len(runs)):
        if same(total, begin):
            rest: Size = 0
            for j in range(i, len(runs)):
                rest = rest + runs[j].size
                if same(rest, size):
                    return slice(i, j + 1)
        total = total + runs[i].size
    return None


@rule("slice_scatter")
def _scatter(axes: Axes, node: fx.Node) -> tuple[Axis, ...] | None:
    """What is written takes the place of the runs that were there.

    Every axis but the one that is written along stays; so does that one where it counts channels.
    """
    whole, written = (axes[n] for n in axes.view.inputs(node)[:2])
    dim = (axes.view.arg(node, "dim", 0) or 0) % len(whole)
    if len(written) != len(whole):
        return None
    axis, new = whole[dim], written[dim]
    items: set[Axis] = set()
    if same(new.size, 1):
        index = axes.view.arg(node, "start")
        written = tuple(put_back(b, index, items) for b in written)
        items = {one for one in items if isinstance(one, Leaf) or same(one.size, axis.size)}
        items = {replace(one, size=axis.size, example=axis.example) for one in items}
    result: list[Axis | None] = [
        a if a == b or (a.features and b.features) or not b.data else _filled(a, b)
        for a, b in zip(whole, written, strict=True)
    ]
    result[dim] = None
    if axes.view.arg(node, "step", 1) != 1:  # between the others, as rotary embeddings do it
        if new.features:
            result[dim] = axes.fresh(node, dim, Feature)
    elif len(items) == 1 and (not axis.data or axis in items):  # those of another batch
        (result[dim],) = items
    elif not axis.features:
        runs = runs_of(axis)
        start = _position(axes.view, axes.view.arg(node, "start"), axis.size)
        found = _between(runs, start, new.size)
        if new == _neighbours(axis, start, new.size):  # what was there, changed
            result[dim] = axis
        elif found is None and len(runs) == 1 and not axis.data:  # made to be filled
            empty = axis if isinstance(axis, Leaf) else _unknown(axis)
            before = replace(empty, size=start, made=(node.name, dim))
            left = axis.size - start - new.size
            rest = replace(empty, size=left, made=(node.name, dim, "rest"))
            result[dim] = joined(axis.size, [r for r in (before, new, rest) if r.size != 0])
        elif found is not None:
            result[dim] = joined(axis.size, [*runs[: found.start], new, *runs[found.stop :]])
    return tuple(
        axes.fresh(node, i, Feature if before.features else Plain) if a is None else a
        for i, (a, before) in enumerate(zip(result, whole, strict=True))
    )


def _filled(axis: Axis, written: Axis) -> Axis | None:
    """An axis of an item of a batch that is written, where that of the others is the same.

    Runs of it that were made to be filled, and are not yet, are what is written to them.
    """
    if not axis.data:
        return written
    before, after = runs_of(axis), runs_of(written)
    alike = len(before) == len(after) and all(
        (a == b or not a.data) and same(a.size, b.size) for a, b in zip(before, after, strict=True)
    )
    return written if alike else None


def _unknown(axis: Axis) -> Plain:
    return Plain(axis.size, (), data=axis.data, at=axis.at, example=axis.example)


def _position(view: View, value: Any, size: Size) -> Size:
    if isinstance(value, fx.Node):
        symbolic = View.meta(value)
        value = symbolic.node.expr if isinstance(symbolic, torch.SymInt) else symbolic
    if value is None:
        return 0
    return value + size if isinstance(value, int) and value < 0 else value


@rule("getitem")
def _getitem(axes: Axes, node: fx.Node) -> tuple[Axis, ...] | None:
    producer, key = node.args[0], node.args[1]
    if not isinstance(producer, fx.Node):
        return None
    if axes.view.val(producer) is not None:
        return _index(axes, node, producer, key)
    name = axes.view.op(producer)
    if RULES.get(name) is attention and key == 0:
        return attention(axes, producer)
    if name in ("native_group_norm", "layer_norm", "native_batch_norm", "max_pool2d") and key == 0:
        return RULES.get(name, normalised)(axes, producer)
    if name in ("max", "min") and key == 0:
        return reduced(axes, producer)
    if name not in ("unbind", "chunk", "split") or not isinstance(key, int):
        return None
    source = axes.view.inputs(producer)[0]
    dim = (axes.view.arg(producer, "dim", 0) or 0) % len(axes[source])
    result = list(axes[source])
    if name == "unbind":
        return _pick(axes[source], dim, key)
    sizes = [t.shape[dim] for t in View.meta(producer)]
    if len(sizes) == 1:  # all of it, whose size the capture holds to be that
        result[dim] = replace(result[dim], size=expr(sizes[0]))
        return tuple(result)
    start = sum((expr(s) for s in sizes[: key % len(sizes)]), start=0)
    result[dim] = _cut(axes, node, dim, axes[source][dim], start, None)
    return tuple(result)


def _index(axes: Axes, node: fx.Node, source: fx.Node, key: Any) -> tuple[Axis, ...] | None:
    keys = list(key) if isinstance(key, tuple) else [key]
    rank = len(axes[source])
    used = sum(k is not None and k is not Ellipsis for k in keys)
    if Ellipsis not in keys:
        keys.append(Ellipsis)
    at = keys.index(Ellipsis)
    keys[at : at + 1] = [slice(None)] * (rank - used)
    result: list[Axis] = []
    position = 0
    picks: list[tuple[Axis, int]] = []
    for k in keys:
        if k is None:
            result.append(Unit())
            continue
        axis = axes[source][position]
        if isinstance(k, slice) and k.step in (None, 1):
            result.append(_cut(axes, node, len(result), axis, k.start, k.stop))
        elif isinstance(k, slice):  # every other one, say
            kind = Feature if axis.features else Plain
            result.append(axes.fresh(node, len(result), kind))
        elif isinstance(k, int):
            picks.append((axis, k))
        else:
            return None
        position += 1
    for axis, k in picks:
        result = list(_picked(tuple(result), axis, k))
    return tuple(result)


def _pick(source: tuple[Axis, ...], dim: int, index: int) -> tuple[Axis, ...]:
    """The axes of a tensor without axis `dim`, of which one position was taken."""
    return _picked(source[:dim] + source[dim + 1 :], source[dim], index)


def _picked(rest: tuple[Axis, ...], axis: Axis, index: int) -> tuple[Axis, ...]:
    """Remember which position was taken, but for q, k and v out of one projection's features."""
    if axis.features or isinstance(axis, Unit):
        return rest

    def one(a: Axis) -> Axis:
        if a.features or isinstance(a, Unit):
            return a
        if isinstance(a, Cat):
            return replace(a, parts=tuple(map(one, a.parts)))
        return Picked(a.size, a, axis, index, data=a.data, example=a.example)

    return tuple(map(one, rest))


@rule("select")
def _select(axes: Axes, node: fx.Node) -> tuple[Axis, ...]:
    source = axes[axes.view.inputs(node)[0]]
    dim = axes.view.arg(node, "dim", 0) % len(source)
    return _pick(source, dim, axes.view.arg(node, "index"))


@rule("index")
def _chosen(axes: Axes, node: fx.Node) -> tuple[Axis, ...] | None:
    """x[..., positions]: what is picked along one axis by one row of positions."""
    source = axes[axes.view.inputs(node)[0]]
    used = [(i, k) for i, k in enumerate(node.args[1]) if k is not None]
    if len(used) != 1 or len(axes[used[0][1]]) != 1 or rank_of(axes, node) != len(source):
        return None
    dim, positions = used[0]
    size, data = axes.view.shape(node)[dim], axes.data(positions)
    how = ("chosen by" if data else "moved by", positions.name)
    result = list(source)
    if not source[dim].features:
        result[dim] = Chosen(size, source[dim], how, data=source[dim].data)
    else:
        result[dim] = axes.fresh(node, dim, Feature)
    return tuple(result)
