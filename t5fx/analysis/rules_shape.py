"""Rules for operators that rearrange, join and cut tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from t5fx.analysis.axis import (
    Axis,
    Batch,
    Plain,
    Repeat,
    Spatial,
    Unit,
    joined,
    put_back,
    runs_of,
)
from t5fx.analysis.meaning import Axes, meet, meet_items, rank_of, rule
from t5fx.analysis.tokens import merge, split
from t5fx.graph.axes import Groups, permutation, regroup_node
from t5fx.graph.sizes import hint, same


@rule("transpose", "t", "mT", "permute", "movedim", "adjoint")
def _permute(axes: Axes, node: fx.Node) -> tuple[Axis, ...] | None:
    order = permutation(axes.view, node)
    source = axes[axes.view.inputs(node)[0]]
    return None if order is None else tuple(source[i] for i in order)


@rule("reshape")
def _reshape(axes: Axes, node: fx.Node) -> tuple[Axis, ...] | None:
    groups = regroup_node(axes.view, node)
    if groups is None:
        return None
    source = axes[axes.view.inputs(node)[0]]
    shape = axes.view.shape(node)
    value = axes.view.val(node)
    result: list[Axis | None] = [None] * len(shape)
    for ins, outs in _with_sides(groups, source):
        parts = [source[i] for i in ins if not isinstance(source[i], Unit)]
        real = [j for j in outs if shape[j] != 1] or outs[:1]
        for j in outs:
            result[j] = Unit()
        if len(ins) == len(outs) == 1:
            result[outs[0]] = source[ins[0]]
        elif len(parts) == 1 and len(real) == 1:
            result[real[0]] = parts[0]
        elif parts and len(real) == 1:
            result[real[0]] = merge(parts, shape[real[0]])
        elif parts and value is not None:
            sizes = [(shape[j], hint(value.shape[j])) for j in real]
            whole = parts[0] if len(parts) == 1 else merge(parts, None)
            for j, piece in zip(real, split(whole, sizes), strict=True):
                result[j] = piece
    return tuple(r if r is not None else axes.plain(node, i) for i, r in enumerate(result))


def _with_sides(groups: Groups, source: tuple[Axis, ...]) -> Groups:
    """Sides of a grid that have size one, which vanish in a reshape, join their neighbours."""
    joined = [(list(ins), outs) for ins, outs in groups]
    for k, (ins, outs) in enumerate(joined):
        if outs or not ins or not all(source[i].grid for i in ins):
            continue
        for other in (k + 1, k - 1):
            beside = joined[other][0] if 0 <= other < len(joined) else []
            if joined[other : other + 1] and joined[other][1] and beside:
                if all(source[i].grid for i in beside):
                    joined[other] = (sorted(beside + ins), joined[other][1])
                    joined[k] = ([], [])
                    break
    return joined


@rule("cat")
def _cat(axes: Axes, node: fx.Node) -> tuple[Axis, ...]:
    tensors = [n for n in axes.view.arg(node, "tensors") if isinstance(n, fx.Node)]
    rank = rank_of(axes, node)
    dim = (axes.view.arg(node, "dim", 0) or 0) % rank
    channels = any(axes[n][dim].features for n in tensors if len(axes[n]) == rank)
    result = []
    for i in range(rank):
        meeting = [axes[n][i] for n in tensors if len(axes[n]) == rank]
        if i != dim:
            result.append(meet(meeting) if channels else meet_items(meeting))
            continue
        runs = tuple(
            Unit(made=(n.name, i), data=axes.data(n))
            if isinstance(run, Unit) and not run.made
            else run
            for n, run in zip(tensors, meeting, strict=True)
            if run.size != 0
        )
        runs = tuple(part for run in runs for part in runs_of(run))
        result.append(joined(axes.view.shape(node)[i], runs))
    return tuple(result)


@rule("stack")
def _stack(axes: Axes, node: fx.Node) -> tuple[Axis, ...]:
    tensors = [n for n in axes.view.arg(node, "tensors") if isinstance(n, fx.Node)]
    dim = (axes.view.arg(node, "dim", 0) or 0) % rank_of(axes, node)
    batch, result = _items(axes, tensors)
    result.insert(dim, batch or axes.plain(node, dim))
    return tuple(result)


@rule("pad_sequence")
def _sequences(axes: Axes, node: fx.Node) -> tuple[Axis, ...] | None:
    """One sequence an item, all of them as long as the result or padded."""
    tensors = [n for n in axes.view.arg(node, "sequences") if isinstance(n, fx.Node)]
    if not axes.view.arg(node, "batch_first", False):
        return None
    batch, result = _items(axes, tensors)
    return (batch or axes.fresh(node, 0, Batch), *result)


def _items(axes: Axes, tensors: Sequence[fx.Node]) -> tuple[Axis | None, list[Axis]]:
    """The axes of several tensors that become one; the first is of what they are the items of.

    That is known only where each of them, in order, is an item of the same tokens: neither one
    item again, as the keys of a first frame for all frames, nor items that were swapped.
    """
    found: list[set[Axis]] = [set() for _ in tensors]
    items = [[put_back(axis, i, found[i]) for axis in axes[n]] for i, n in enumerate(tensors)]
    rows = list(zip(*items, strict=True))
    each = all(its == found[0] for its in found)
    if each and all(same(one.size, len(tensors)) for one in found[0]) and all(map(_alike, rows)):
        # Of several batches, such as those of words and patches, the result is neither.
        return found[0].pop() if len(found[0]) == 1 else None, [meet_items(row) for row in rows]
    rows = list(zip(*(axes[n] for n in tensors), strict=True))  # what was picked stays picked
    return None, [meet_items(row) for row in rows]


def _alike(items: Sequence[Axis]) -> bool:
    """Whether the same axis of several items counts the same tokens; of channels, any may."""
    first = runs_of(items[0])
    return all(
        len(runs_of(item)) == len(first)
        and all(
            a == b or (a.features and b.features) or not (a.data and b.data)
            for a, b in zip(first, runs_of(item), strict=True)
        )
        for item in items
    )


@rule("expand")
def _expand(axes: Axes, node: fx.Node) -> tuple[Axis, ...]:
    source = axes[axes.view.inputs(node)[0]]
    rank = rank_of(axes, node)
    padded = (Unit(),) * (rank - len(source)) + source
    fresh = [axes.fresh(node, i, Repeat) for i in range(rank)]
    return tuple(a if same(a.size, f.size) else f for a, f in zip(padded, fresh, strict=True))


@rule("repeat_interleave")
def _repeated(axes: Axes, node: fx.Node) -> tuple[Axis, ...] | None:
    """Heads that are repeated because several heads of the queries share them."""
    result = list(axes[axes.view.inputs(node)[0]])
    repeats, dim = axes.view.arg(node, "repeats"), axes.view.arg(node, "dim")
    if not isinstance(repeats, int) or not isinstance(dim, int):
        return None
    if repeats == 1:
        return tuple(result)
    dim %= len(result)
    copies = _copies(axes, node, dim, repeats)
    unit = isinstance(result[dim], Unit)
    result[dim] = copies if unit else merge([result[dim], copies], axes.view.shape(node)[dim])
    return tuple(result)


def _copies(axes: Axes, node: fx.Node, i: int, times: int) -> Axis:
    return replace(axes.fresh(node, i, Repeat), size=times, example=times)


@rule("pad", "constant_pad_nd")
def _padded(axes: Axes, node: fx.Node) -> tuple[Axis, ...]:
    """A side of a grid that grew is a side of a larger grid."""
    return tuple(
        axis if same(axis.size, size) else axes.fresh(node, i, Spatial if axis.grid else Plain)
        for i, (axis, size) in enumerate(
            zip(axes[axes.view.inputs(node)[0]], axes.view.shape(node), strict=True)
        )
    )


@rule("repeat")
def _tiled(axes: Axes, node: fx.Node) -> tuple[Axis, ...] | None:
    source = axes[axes.view.inputs(node)[0]]
    shape = axes.view.shape(node)
    if len(shape) != len(source):
        return None
    result = []
    for i, (axis, size) in enumerate(zip(source, shape, strict=True)):
        if same(axis.size, size):
            result.append(axis)
        elif isinstance(axis, Unit):
            result.append(axes.fresh(node, i, Repeat))
        elif isinstance(size, int) and isinstance(axis.size, int):
            result.append(merge([_copies(axes, node, i, size // axis.size), axis], size))
        else:
            return None
    return tuple(result)
