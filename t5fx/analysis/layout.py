"""Where tokens come from: prefix, grid and suffix of each token axis, proved from the graph.

One forward pass gives every axis of every tensor a meaning: spatial (it came out of a convolution
or of an image), a row-major merge or a split of other axes, a concatenation of runs, features. A
token axis whose runs hold exactly one grid has a layout; anything else is unknown, never guessed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from t5fx.analysis.tokens import Axis, Layout, layout_of, merge, split
from t5fx.graph.axes import permutation, regroup_node
from t5fx.graph.view import View, expr, hint, same

log = logging.getLogger(__name__)

Rule = Callable[["Axes", fx.Node], "tuple[Axis, ...] | None"]
_RULES: dict[str, Rule] = {}


#: Operators that read nothing of a tensor but its sizes, dtype and device.
_FILLED = {
    *("zeros_like", "ones_like", "full_like", "empty_like"),
    *("new_zeros", "new_ones", "new_full", "new_empty"),
}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register how the axes of an operator's output come from those of its inputs."""

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return register


class Axes:
    """The meaning of every axis of every tensor of a graph: `axes[node][i]`."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.known: dict[fx.Node, tuple[Axis, ...]] = {}
        self._data: dict[fx.Node, bool] = {}
        for node in view.graph.nodes:
            value = view.val(node)
            sized = isinstance(View.meta(node), int | torch.SymInt)
            inputs = (self._data[n] for n in node.all_input_nodes)
            computed = not sized and view.op(node) not in _FILLED
            self._data[node] = node.op == "placeholder" or (computed and any(inputs))
            if value is not None:
                self.known[node] = self._infer(node, value)

    def __getitem__(self, node: fx.Node) -> tuple[Axis, ...]:
        return self.known[node]

    def _infer(self, node: fx.Node, value: torch.Tensor) -> tuple[Axis, ...]:
        shape = self.view.shape(node)
        name = self.view.op(node)
        function = _RULES.get(name)
        if function is None and self.view.pointwise(node):
            function = _pointwise
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
            replace(a, kind="unit", size=1, parts=(), sizes=(), at=(node, i), example=1)
            if size == 1 and not a.grid() and not a.sliced
            else replace(a, at=(node, i), example=hint(value.shape[i]))
            if same(a.size, size)
            else self.plain(node, i)
            for i, (a, size) in enumerate(zip(axes, shape, strict=True))
        )

    def data(self, node: fx.Node) -> bool:
        """Whether the values of a node depend on the inputs of the model, not only its sizes."""
        return self._data[node]

    def plain(self, node: fx.Node, i: int, kind: str = "plain") -> Axis:
        """A fresh axis that `node` makes."""
        size = self.view.shape(node)[i]
        return Axis(kind, size, source=(node.name, i), data=self.data(node))

    def fresh(self, node: fx.Node, kinds: Iterable[str]) -> tuple[Axis, ...]:
        return tuple(self.plain(node, i, kind) for i, kind in enumerate(kinds))


@rule("placeholder")
def _input(axes: Axes, node: fx.Node) -> tuple[Axis, ...]:
    """The first axis counts batch items, the same in all inputs; the others are undecided.

    Only [B, N, C] has its channels last for sure; of [B, C, H, W], [B, H, W, C], [B, T, N, C] the
    operators that read them tell: a convolution, or what cuts two sides into equal patches.
    """
    rank = len(axes.view.shape(node))
    value = axes.view.val(node)
    floating = value is not None and value.is_floating_point()
    kinds = ["side" if floating and rank > 3 else "plain"] * rank
    if floating and rank == 3:
        kinds[-1] = "feature"
    first = replace(axes.plain(node, 0, "batch"), source="batch")
    return (first, *axes.fresh(node, kinds)[1:])


@rule("get_attr")
def _parameter(axes: Axes, node: fx.Node) -> tuple[Axis, ...]:
    return tuple(replace(axes.plain(node, i), data=False) for i in range(_rank(axes, node)))


def _pointwise(axes: Axes, node: fx.Node) -> tuple[Axis, ...]:
    """Broadcast the inputs; of the axes that meet, the one that says most about tokens stays."""
    shape = axes.view.shape(node)
    result = []
    for i, size in enumerate(shape):
        meeting = []
        for source in axes.view.inputs(node):
            j = i - len(shape) + len(axes[source])
            if j >= 0 and same(axes[source][j].size, size):
                meeting.append(axes[source][j])
        known = [a for a in meeting if a.kind != "unit"] or [a for a in meeting if a.source]
        result.append(_meet(known) if known else (meeting or [axes.plain(node, i)])[0])
    return tuple(result)


def _meet(meeting: list[Axis]) -> Axis:
    weight = {"repeat": 0, "plain": 1, "side": 1}

    def says(axis: Axis) -> tuple[Any, ...]:
        return axis.data, _grids(axis), weight.get(axis.kind, 2), not axis.repeats

    best = max(meeting, key=says)  # the first of equals
    rivals = [a for a in meeting if a.data == best.data and _grids(a) and a != best]
    if _grids(best) and any(_shape_of(a) != _shape_of(best) for a in rivals):
        return Axis("plain", best.size, source=("conflict", *(repr(a.source) for a in meeting)))
    return best


def _grids(axis: Axis) -> bool:
    return isinstance(layout_of(axis), Layout)


def _shape_of(axis: Axis) -> tuple[Any, ...]:
    found = layout_of(axis)
    return tuple(a.size for a in found.grid) if isinstance(found, Layout) else ()


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
        parts = [source[i] for i in ins if source[i].kind != "unit"]
        real = [j for j in outs if shape[j] != 1] or outs[:1]
        for j in outs:
            result[j] = Axis("unit", 1)
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


def _with_sides(groups: Any, source: tuple[Axis, ...]) -> Any:
    """Sides of a grid that have size one, which vanish in a reshape, join their neighbours."""
    joined = [(list(ins), outs) for ins, outs in groups]
    for k, (ins, outs) in enumerate(joined):
        if outs or not ins or not all(source[i].grid() for i in ins):
            continue
        for other in (k + 1, k - 1):
            beside = joined[other][0] if 0 <= other < len(joined) else []
            if joined[other : other + 1] and joined[other][1] and beside:
                if all(source[i].grid() for i in beside):
                    joined[other] = (sorted(beside + ins), joined[other][1])
                    joined[k] = ([], [])
                    break
    return joined


@rule("cat")
def _cat(axes: Axes, node: fx.Node) -> tuple[Axis, ...]:
    tensors = [n for n in axes.view.arg(node, "tensors") if isinstance(n, fx.Node)]
    rank = _rank(axes, node)
    dim = (axes.view.arg(node, "dim", 0) or 0) % rank
    result = []
    for i in range(rank):
        meeting = [axes[n][i] for n in tensors if len(axes[n]) == rank]
        if i != dim:
            result.append(_meet(meeting))
            continue
        runs = tuple(
            replace(axes.plain(n, i), kind="unit", size=1)
            if run.kind == "unit" and run.source is None
            else run
            for n, run in zip(tensors, meeting, strict=True)
            if run.size != 0
        )
        runs = tuple(part for run in runs for part in (run.parts if run.kind == "cat" else [run]))
        whole = runs[0] if len(runs) == 1 else None
        size = axes.view.shape(node)[i]
        data = any(run.data for run in runs)
        result.append(whole or Axis("cat", size, parts=runs, data=data))
    return tuple(result)


@rule("stack")
def _stack(axes: Axes, node: fx.Node) -> tuple[Axis, ...]:
    tensors = [n for n in axes.view.arg(node, "tensors") if isinstance(n, fx.Node)]
    dim = (axes.view.arg(node, "dim", 0) or 0) % _rank(axes, node)
    result = [_meet([axes[n][i] for n in tensors]) for i in range(_rank(axes, node) - 1)]
    result.insert(dim, axes.plain(node, dim))
    return tuple(result)


@rule("pad_sequence")
def _sequences(axes: Axes, node: fx.Node) -> tuple[Axis, ...] | None:
    """One sequence an item, all of them as long as the result or padded."""
    tensors = [n for n in axes.view.arg(node, "sequences") if isinstance(n, fx.Node)]
    if not axes.view.arg(node, "batch_first", False):
        return None
    inner = [_meet([axes[n][i] for n in tensors]) for i in range(_rank(axes, node) - 1)]
    return (axes.plain(node, 0, "batch"), *inner)


@rule("slice")
def _slice(axes: Axes, node: fx.Node) -> tuple[Axis, ...]:
    source = axes.view.inputs(node)[0]
    dim = (axes.view.arg(node, "dim", 0) or 0) % _rank(axes, node)
    bounds = (axes.view.arg(node, "start"), axes.view.arg(node, "end"))
    result = list(axes[source])
    if axes.view.arg(node, "step", 1) not in (1, None):
        result[dim] = axes.plain(node, dim)
        return tuple(result)
    result[dim] = _cut(axes, node, dim, axes[source][dim], *bounds)
    return tuple(result)


def _cut(axes: Axes, node: fx.Node, dim: int, axis: Axis, start: Any, end: Any) -> Axis:
    """The runs of a concatenation that lie between two positions."""
    size = axes.view.shape(node)[dim]
    if same(axis.size, size):
        return axis
    runs = _runs(axis)
    found = _between(runs, _position(axes.view, start, axis.size, 0), size)
    if found is None and axis.features and not axis.of_items:
        return axes.plain(node, dim, "feature")
    if found is None:
        return _piece_from(axis, _position(axes.view, start, axis.size, 0), size)
    kept = runs[found]
    return kept[0] if len(kept) == 1 else Axis("cat", size, parts=kept)


def _piece_from(axis: Axis, begin: Any, size: Any) -> Axis:
    """Some neighbouring positions of an axis that are no whole run."""
    return Axis("chosen", size, ("from", begin), (axis,), data=axis.data)


def _runs(axis: Axis) -> tuple[Axis, ...]:
    return axis.parts if axis.kind == "cat" else (axis,)


def _between(runs: tuple[Axis, ...], begin: Any, size: Any) -> slice | None:
    """The runs that make up `size` positions from `begin` on, or None."""
    total: Any = 0
    for i in range(len(runs)):
        if same(total, begin):
            rest: Any = 0
            for j in range(i, len(runs)):
                rest = rest + runs[j].size
                if same(rest, size):
                    return slice(i, j + 1)
        total = total + runs[i].size
    return None


@rule("slice_scatter")
def _scatter(axes: Axes, node: fx.Node) -> tuple[Axis, ...] | None:
    """What is written takes the place of the runs that were there."""
    whole, written = (axes[n] for n in axes.view.inputs(node)[:2])
    dim = (axes.view.arg(node, "dim", 0) or 0) % len(whole)
    if len(written) != len(whole) or axes.view.arg(node, "step", 1) != 1:
        return None
    result = [
        a if a == b or (a.features and b.features) or not b.data else b if not a.data else None
        for a, b in zip(whole, written, strict=True)
    ]
    axis, new = whole[dim], written[dim]
    result[dim] = None
    if not axis.features:
        runs = _runs(axis)
        start = _position(axes.view, axes.view.arg(node, "start"), axis.size, 0)
        found = _between(runs, start, new.size)
        if new == _piece_from(axis, start, new.size):  # what was there, changed
            result[dim] = axis
        elif found is None and len(runs) == 1 and not axis.data:  # made to be filled
            rest = replace(axis, size=axis.size - start - new.size, source=(node.name, dim, "rest"))
            runs = (replace(axis, size=start, source=(node.name, dim)), new, rest)
            result[dim] = Axis("cat", axis.size, parts=tuple(r for r in runs if r.size != 0))
        elif found is not None:
            runs = (*runs[: found.start], new, *runs[found.stop :])
            result[dim] = runs[0] if len(runs) == 1 else replace(axis, kind="cat", parts=runs)
    kinds = ("feature" if a.features else "plain" for a in whole)
    return tuple(
        axes.plain(node, i, kind) if a is None else a
        for i, (a, kind) in enumerate(zip(result, kinds, strict=True))
    )


def _position(view: View, value: Any, size: Any, default: Any) -> Any:
    if isinstance(value, fx.Node):
        symbolic = View.meta(value)
        value = symbolic.node.expr if isinstance(symbolic, torch.SymInt) else symbolic
    if value is None:
        return default
    return value + size if isinstance(value, int) and value < 0 else value


@rule("getitem")
def _getitem(axes: Axes, node: fx.Node) -> tuple[Axis, ...] | None:
    producer, key = node.args[0], node.args[1]
    if not isinstance(producer, fx.Node):
        return None
    if axes.view.val(producer) is not None:
        return _index(axes, node, producer, key)
    name = axes.view.op(producer)
    if name in ("scaled_dot_product_attention", "flex_attention") and key == 0:
        return _attention(axes, producer)
    if name in ("native_group_norm", "layer_norm", "native_batch_norm", "max_pool2d") and key == 0:
        return _RULES.get(name, _normalised)(axes, producer)
    if name in ("max", "min") and key == 0:
        return _reduced(axes, producer)
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
            result.append(Axis("unit", 1))
            continue
        axis = axes[source][position]
        if isinstance(k, slice) and k.step in (None, 1):
            result.append(_cut(axes, node, len(result), axis, k.start, k.stop))
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
    if axis.features or axis.kind == "unit":
        return rest
    return tuple(
        a
        if a.features or a.kind == "unit"
        else Axis("picked", a.size, (axis,), (a,), index, data=a.data, example=a.example)
        for a in rest
    )


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
    if len(used) != 1 or len(axes[used[0][1]]) != 1 or _rank(axes, node) != len(source):
        return None
    dim, positions = used[0]
    size, data = axes.view.shape(node)[dim], axes.data(positions)
    made = ("chosen by" if data else "moved by", positions.name)
    result = list(source)
    if not source[dim].features:
        result[dim] = Axis("chosen", size, made, (source[dim],), data=source[dim].data)
    else:
        result[dim] = axes.plain(node, dim, "feature")
    return tuple(result)


@rule("expand")
def _expand(axes: Axes, node: fx.Node) -> tuple[Axis, ...]:
    source = axes[axes.view.inputs(node)[0]]
    rank = _rank(axes, node)
    padded = (Axis("unit", 1),) * (rank - len(source)) + source
    fresh = [axes.plain(node, i, "repeat") for i in range(rank)]
    return tuple(a if same(a.size, f.size) else f for a, f in zip(padded, fresh, strict=True))


@rule("repeat_interleave")
def _repeated(axes: Axes, node: fx.Node) -> tuple[Axis, ...] | None:
    """As of heads that several queries' heads share."""
    result = list(axes[axes.view.inputs(node)[0]])
    repeats, dim = axes.view.arg(node, "repeats"), axes.view.arg(node, "dim")
    if not isinstance(repeats, int) or not isinstance(dim, int):
        return None
    if repeats == 1:
        return tuple(result)
    dim %= len(result)
    copies = _copies(axes, node, dim, repeats)
    unit = result[dim].kind == "unit"
    result[dim] = copies if unit else merge([result[dim], copies], axes.view.shape(node)[dim])
    return tuple(result)


def _copies(axes: Axes, node: fx.Node, i: int, times: int) -> Axis:
    return replace(axes.plain(node, i, "repeat"), size=times, example=times)


@rule("pad", "constant_pad_nd")
def _padded(axes: Axes, node: fx.Node) -> tuple[Axis, ...]:
    """A side of a grid that grew is a side of a larger grid."""
    return tuple(
        axis
        if same(axis.size, size)
        else axes.plain(node, i, "spatial" if axis.grid() else "plain")
        for i, (axis, size) in enumerate(
            zip(axes[axes.view.inputs(node)[0]], axes.view.shape(node), strict=True)
        )
    )


@rule("mean", "sum", "amax", "amin")
def _reduced(axes: Axes, node: fx.Node) -> tuple[Axis, ...] | None:
    """What is left when some axes are summed up."""
    source = list(axes[axes.view.inputs(node)[0]])
    dims = axes.view.arg(node, "dim")
    dims = [dims] if isinstance(dims, int) else dims
    if not dims:
        return None
    dims = {d % len(source) for d in dims}
    value = View.meta(node)
    value = value[0] if isinstance(value, tuple) else value
    if value.dim() == len(source):
        return tuple(Axis("unit", 1) if i in dims else a for i, a in enumerate(source))
    return tuple(a for i, a in enumerate(source) if i not in dims)


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
        elif axis.kind == "unit":
            result.append(axes.plain(node, i, "repeat"))
        elif isinstance(size, int) and isinstance(axis.size, int):
            result.append(merge([_copies(axes, node, i, size // axis.size), axis], size))
        else:
            return None
    return tuple(result)


@rule("view_as_complex")
def _complex(axes: Axes, node: fx.Node) -> tuple[Axis, ...]:
    return axes[axes.view.inputs(node)[0]][:-1]


@rule("view_as_real")
def _real(axes: Axes, node: fx.Node) -> tuple[Axis, ...]:
    source = axes[axes.view.inputs(node)[0]]
    return (*source, axes.plain(node, len(source), "feature"))


@rule("linear")
def _linear(axes: Axes, node: fx.Node) -> tuple[Axis, ...]:
    source = axes[axes.view.inputs(node)[0]]
    return (*source[:-1], axes.plain(node, len(source) - 1, "feature"))


@rule("matmul", "baddbmm", "addmm")
def _matmul(axes: Axes, node: fx.Node) -> tuple[Axis, ...] | None:
    operands = [axes[n] for n in axes.view.inputs(node)[-2:]]
    rank = _rank(axes, node)
    if len(operands) != 2 or min(map(len, operands)) < 2 or rank < 2:
        return None
    left, right = operands
    batch = _pointwise(axes, node)[: rank - 2]
    if len(left) == len(right) == rank:
        batch = tuple(a if a.kind != "unit" else b for a, b in zip(left, right, strict=True))[:-2]
    elif len(left) == rank:
        batch = left[:-2]
    weights = not axes.data(axes.view.inputs(node)[-1])
    return (*batch, left[-2], axes.plain(node, rank - 1, "feature") if weights else right[-1])


@rule("scaled_dot_product_attention")
def _attention(axes: Axes, node: fx.Node) -> tuple[Axis, ...]:
    query, value = (axes[axes.view.arg(node, name)] for name in ("query", "value"))
    return (*query[:-1], value[-1])


@rule("layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm", "softmax")
def _normalised(axes: Axes, node: fx.Node) -> tuple[Axis, ...]:
    return axes[axes.view.inputs(node)[0]]


@rule("log_softmax", "cumsum", "normalize", "native_group_norm", "linalg_vector_norm")
def _along(axes: Axes, node: fx.Node) -> tuple[Axis, ...] | None:
    source = axes[axes.view.inputs(node)[0]]
    return source if len(source) == _rank(axes, node) else None


@rule("conv1d", "conv2d", "conv3d", "convolution")
def _convolution(axes: Axes, node: fx.Node) -> tuple[Axis, ...]:
    """Spatial axes whose size a convolution keeps stay what they were; others begin anew."""
    source = axes[axes.view.inputs(node)[0]]
    shape = axes.view.shape(node)
    kept = [
        source[i]
        if len(source) == len(shape) and same(source[i].size, size) and source[i].spatial
        else axes.plain(node, i, "spatial")
        for i, size in enumerate(shape)
    ]
    batch = source[0] if len(source) == len(shape) else axes.plain(node, 0, "batch")
    if len(shape) > 3:
        batch = _frames(batch)
    return (batch, axes.plain(node, 1, "feature"), *kept[2:])


def _frames(batch: Axis) -> Axis:
    """Of the images that a convolution takes one by one: frames, where an input is a video.

    That is, one side of an input merged with its batch; it is an axis of the video's grid.
    """
    if batch.kind == "side":  # the batch itself has one item
        return replace(batch, kind="spatial")
    sides = [part for part in batch.parts if part.kind == "side"]
    if batch.kind != "merge" or len(sides) != 1:
        return batch
    parts = (replace(p, kind="spatial") if p is sides[0] else p for p in batch.parts)
    return replace(batch, parts=tuple(parts))


@rule(
    *("avg_pool2d", "max_pool2d", "adaptive_avg_pool2d", "pixel_shuffle", "pixel_unshuffle"),
    *("upsample_bicubic2d_aa", "upsample_bicubic2d", "upsample_bilinear2d_aa", "interpolate"),
    *("upsample_bilinear2d", "upsample_nearest2d", "avg_pool3d", "max_pool2d_with_indices"),
    *("avg_pool1d", "max_pool1d"),
)
def _resampled(axes: Axes, node: fx.Node) -> tuple[Axis, ...]:
    spatial = ["spatial"] * (_rank(axes, node) - 2)
    made = axes.fresh(node, ["batch", "feature", *spatial])
    batch = axes[axes.view.inputs(node)[0]][0]
    windows = any(part.kind == "piece" for part in (batch, *batch.parts))
    return (batch, *made[1:]) if same(batch.size, made[0].size) and not windows else made


@rule("im2col")
def _unfolded(axes: Axes, node: fx.Node) -> tuple[Axis, ...] | None:
    """F.unfold: [B, C, H, W] to [B, C * kernel, rows * columns of blocks]."""
    source = axes.view.inputs(node)[0]
    if _rank(axes, node) != 3 or len(axes[source]) != 4:
        return None
    value, sides = axes.view.val(source), []
    for i, name in enumerate(("rows", "columns")):
        kernel, dilation, padding, stride = (
            axes.view.arg(node, key)[i] for key in ("kernel_size", "dilation", "padding", "stride")
        )
        assert value is not None
        count = (value.shape[i + 2] + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        sides.append(Axis("spatial", expr(count), (node.name, name), example=hint(count)))
    blocks = merge(sides, axes.view.shape(node)[2])
    return (axes[source][0], axes.plain(node, 1, "feature"), blocks)


@rule("embedding")
def _embedding(axes: Axes, node: fx.Node) -> tuple[Axis, ...]:
    indices = axes[axes.view.inputs(node)[1]]
    return (*indices, axes.plain(node, len(indices), "feature"))


def _rank(axes: Axes, node: fx.Node) -> int:
    return len(axes.view.shape(node))
