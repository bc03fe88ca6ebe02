"""Products of two tensors, the chains of nodes between them and a softmax, and what both mean."""

from __future__ import annotations

import string
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from t5fx.analysis.key_masks import LEAST, KeyMask, key_mask
from t5fx.analysis.masks import harmless, interval, refusal
from t5fx.graph.axes import permutation, regroup_node
from t5fx.graph.sizes import hint
from t5fx.graph.view import View
from t5fx.patterns.base import Binding, Refusal
from t5fx.patterns.operands import operand

PRODUCTS = ("matmul", "einsum", "baddbmm")
#: The largest number that keeps a sum of exponentials from zero, and changes none in use.
_TINY = 1e-8
#: What may sum exponentials, or divide them by their sum.
SUMS = ("sum", "linalg_vector_norm", "norm", "normalize")
_REACH = 24  # nodes between a product and a softmax that are looked through


@dataclass(frozen=True)
class Dims:
    """Positions of the query axis (rows) and the key axis (columns) in a tensor of scores."""

    rows: int
    columns: int


@dataclass(frozen=True)
class Product:
    """out[..., rows, columns] = sum over c of left[..., rows, c] right[..., c, columns]."""

    left: fx.Node
    right: fx.Node
    rows_in_left: int
    left_contracted: int
    right_contracted: int
    columns_in_right: int
    rows: int
    columns: int
    rank: int
    factor: float = 1.0

    def swapped(self) -> Product:
        """This product with the roles of its two tensors exchanged."""
        return Product(
            *(self.right, self.left, self.columns_in_right, self.right_contracted),
            *(self.left_contracted, self.rows_in_left, self.columns, self.rows),
            *(self.rank, self.factor),
        )


def product(view: View, node: fx.Node) -> Product:
    """Read a matmul, bmm, einsum or baddbmm. Raises `Refusal` for other contractions."""
    if view.op(node) == "einsum":
        return _einsum(view, node)
    left, right = view.inputs(node)[-2:] if view.op(node) == "baddbmm" else _factors(view, node)
    ranks = len(view.shape(left)), len(view.shape(right))
    rank = len(view.shape(node))
    if min(*ranks, rank) < 2:
        raise Refusal("not-attention", f"'{node.name}' is a product with a vector")
    factor = 1.0
    if view.op(node) == "baddbmm":
        if view.arg(node, "beta", 1) != 0:
            raise Refusal(*refusal(view, view.inputs(node)[0]))
        factor = float(view.arg(node, "alpha", 1))
    return Product(
        *(left, right, ranks[0] - 2, ranks[0] - 1, ranks[1] - 2, ranks[1] - 1),
        *(rank - 2, rank - 1, rank, factor),
    )


def _factors(view: View, node: fx.Node) -> tuple[fx.Node, fx.Node]:
    names = ("mat2", "other", "vec2")
    left = view.arg(node, "input")
    right = next((a for n in names if (a := view.arg(node, n)) is not None), None)
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        raise Refusal("not-attention", f"'{node.name}' could not be read as a product")
    return left, right


def _einsum(view: View, node: fx.Node) -> Product:
    equation = str(node.args[0]).replace(" ", "")
    tensors = view.inputs(node)
    inputs, _, out = equation.partition("->")
    terms = inputs.split(",")
    if len(tensors) != 2 or len(terms) != 2 or not out:
        raise Refusal("not-attention", f"einsum '{equation}' is no product of two tensors")
    # Letters for the axes that an ellipsis stands for, the last of them the same in every term.
    spare = [c for c in string.ascii_letters if c not in equation]
    ranks = [len(view.shape(n)) for n in (*tensors, node)]
    left, right, out = (
        term.replace("...", "".join(spare[: rank - len(term) + 3][::-1]))
        for term, rank in zip((*terms, out), ranks, strict=True)
    )
    summed = [c for c in left if c in right and c not in out]
    rows = [c for c in left if c not in right]
    columns = [c for c in right if c not in left]
    if [len(summed), len(rows), len(columns)] != [1, 1, 1] or {*rows, *columns} - {*out}:
        raise Refusal("not-attention", f"einsum '{equation}' is no batched matrix product")
    c, i, j = summed[0], rows[0], columns[0]
    batches = ["".join(x for x in term if x not in (c, i, j)) for term in (left, right, out)]
    if len(set(batches)) > 1:
        raise Refusal("not-attention", f"einsum '{equation}' exchanges batch and heads")
    return Product(
        *(tensors[0], tensors[1], left.index(i), left.index(c), right.index(c), right.index(j)),
        *(out.index(i), out.index(j), len(out)),
    )


def climb(view: View, node: fx.Node) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """Products above `node` with as many elements, each with the nodes between, topmost first."""
    numel = _numel(view, node)
    stack: list[tuple[fx.Node, list[fx.Node]]] = [(n, []) for n in view.inputs(node)[::-1]]
    seen = set()
    while stack:
        current, path = stack.pop()
        if current in seen or _numel(view, current) != numel:
            continue
        seen.add(current)
        if view.op(current) in PRODUCTS:
            yield current, path
        elif len(path) < _REACH and view.op(current) not in ("softmax", "placeholder"):
            stack += [(n, [current, *path]) for n in view.inputs(current)[::-1]]


def descend(view: View, node: fx.Node) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """Products below `node` that read it through nodes with as many elements."""
    numel = _numel(view, node)
    stack: list[tuple[fx.Node, list[fx.Node]]] = [(node, [])]
    seen = set()
    while stack:
        current, path = stack.pop()
        for user in current.users:
            if user in seen:
                continue
            seen.add(user)
            if view.op(user) in PRODUCTS:
                yield user, path
            elif view.val(user) is not None and _numel(view, user) == numel and len(path) < _REACH:
                stack.append((user, [*path, user]))


def _numel(view: View, node: fx.Node) -> int:
    total = 1
    value = view.val(node)
    for size in value.shape if value is not None else ():
        total *= hint(size)
    return total


@dataclass(frozen=True)
class Chain:
    """What happens between a product and a softmax: see `follow`."""

    nodes: tuple[fx.Node, ...]
    end: fx.Node
    dims: Dims
    factor: float = 1.0
    dropout: Any = 0.0
    temperatures: tuple[fx.Node, ...] = ()
    divided: bool = False
    masks: tuple[KeyMask, ...] = ()


def follow(
    view: View,
    start: fx.Node,
    end: fx.Node,
    dims: Dims,
    *,
    probabilities: bool = False,
    total: fx.Node | None = None,
    also: tuple[fx.Node, ...] = (),
) -> Chain:
    """Judge each node between `start` and `end`, tracking the query and key axes.

    Casts, layout, constant scales, learned temperatures, provably empty masks and whatever is the
    same for all keys of a query are harmless before the softmax, and masks of keys are noted; past
    it, so is a division by
    `total`, the sum over the keys. Raises `Refusal` for whatever else happens to the scores (or the
    probabilities), and where a tensor in between is read by anything but the attention itself,
    which the nodes `also` are a part of.
    """
    if probabilities:
        paths = [path for found, path in descend(view, start) if found is end]
    else:
        paths = [path for found, path in climb(view, end) if found is start]
    chain = Chain(tuple(paths[0]), start, dims)
    for node in chain.nodes:
        chain = replace(_step(view, node, chain, probabilities, total), end=node)
    inside = {start, *chain.nodes, end, *also}
    for node in (start, *chain.nodes):
        for user in node.users:
            if view.escapes(node, user, inside):
                what = "probabilities" if probabilities else "scores"
                raise Refusal("probabilities-used", f"'{user.name}' reads the {what} too")
    return chain


def _step(
    view: View, node: fx.Node, chain: Chain, probabilities: bool, total: fx.Node | None
) -> Chain:
    name = view.op(node)
    if name in ("to", "identity"):
        value = view.val(node)
        if value is None or not value.is_floating_point():
            what = "probabilities-used" if probabilities else "scores-changed"
            raise Refusal(
                what, f"'{node.name}' casts to {value.dtype if value is not None else '?'}"
            )
        return chain
    if name in ("reshape", "expand"):
        return replace(chain, dims=_regrouped(view, node, chain))
    order = permutation(view, node)
    if order is not None:
        dims = Dims(order.index(chain.dims.rows), order.index(chain.dims.columns))
        return replace(chain, dims=dims)
    if name == "dropout":
        return _dropped(view, node, chain, probabilities)
    if probabilities:
        if name == "nan_to_num":
            return chain  # softmax of finite scores is no NaN
        if total is not None and (
            node is total or divides(view, node, chain.end, total, chain.dims.columns)
        ):
            order = _order(view, total)
            if order != 1:
                raise Refusal(
                    "probabilities-used", f"'{node.name}' divides by the norm of order {order}"
                )
            return replace(chain, divided=True)
        raise Refusal("probabilities-used", f"'{node.name}' ({name}) changes the probabilities")
    if name == "log_softmax" and axis_of(view, node) == chain.dims.columns:
        return chain  # it subtracts a number from all scores of a query
    changed = Refusal("scores-changed", f"'{node.name}' ({name}) changes the scores")
    first, second = view.arg(node, "input"), view.arg(node, "other")
    if name in ("add", "sub", "mul", "div"):
        if first is second or node.kwargs.get("rounding_mode") or second is None:
            raise changed
        leads = first is chain.end
        if not leads and name in ("sub", "div"):
            raise changed
        other = second if leads else first
        if name in ("mul", "div"):
            return _scaled(view, node, chain, other)
        if not isinstance(other, fx.Node) or harmless(view, other):
            return chain  # the same number everywhere, which softmax does not see
        if _same_for_all_keys(view, node, other, chain.dims):
            return chain
        return _hiding(view, node, chain, other, "added" if name == "add" else "")
    if name == "slice_scatter":
        added = _added_to_part(view, view.inputs(node)[1], chain.end)
        raise Refusal(*refusal(view, added)) if added is not None else changed
    if name == "masked_fill" and first is chain.end:
        mask = view.arg(node, "mask")
        if interval(view, mask, {}) == (0.0, 0.0):
            return chain
        return _hiding(view, node, chain, mask, _filling(view, view.arg(node, "value"), "fill"))
    if name == "where" and chain.end in (first, second):
        condition = view.arg(node, "condition")
        keep = (1.0, 1.0) if first is chain.end else (0.0, 0.0)
        if first is not second and interval(view, condition, {}) == keep:
            return chain
        value, kind = (second, "bool") if first is chain.end else (first, "fill")
        return _hiding(view, node, chain, condition, _filling(view, value, kind))
    raise changed


def _filling(view: View, value: Any, kind: str) -> str:
    """The kind of a mask that puts a value in the place of scores; "" for a value that hides no
    key.
    """
    bounds = interval(view, value, {})
    number = view.scalar(value) if bounds is None else bounds[1]
    return kind if number is not None and number <= LEAST else ""


def _hiding(view: View, node: fx.Node, chain: Chain, mask: fx.Node, kind: str) -> Chain:
    """The chain with a mask of keys. Raises `Refusal` where that is not proved."""
    dims, kind = chain.dims, kind or ("added" if view.trusted else "")
    found = key_mask(view, mask, node, dims.rows, dims.columns, kind, node) if kind else None
    if found is None:
        raise Refusal(*refusal(view, mask))
    return replace(chain, masks=(*chain.masks, found))


def _added_to_part(view: View, node: fx.Node, scores: fx.Node) -> fx.Node | None:
    """What is added to a slice of the scores before it is written back, or None."""
    adds: list[fx.Node] = []
    for _ in range(_REACH):
        name = view.op(node)
        if node is scores:
            return adds[-1] if adds else None
        inputs = view.inputs(node)
        if name == "add" and len(inputs) == 2:
            # The scores are seen through layout; the bias is whatever is added last to them.
            first, second = inputs
            adds.append(second)
            node = first
        elif name in ("slice", "getitem", "reshape", "to", "identity", "slice_scatter") and inputs:
            node = inputs[name == "slice_scatter"]
        else:
            return None
    return None


def _same_for_all_keys(view: View, node: fx.Node, other: fx.Node, dims: Dims) -> bool:
    """Whether a tensor is broadcast along the key axis of a node, which has more than one key."""
    shape = view.shape(other)
    axis = dims.columns - len(view.shape(node)) + len(shape)
    return view.shape(node)[dims.columns] != 1 and (axis < 0 or shape[axis] == 1)


def _order(view: View, total: fx.Node) -> Any:
    """The order of a norm; a sum of what is not negative is the norm of order 1."""
    if view.op(total) == "sum":
        return 1
    return view.arg(total, "ord" if view.op(total) == "linalg_vector_norm" else "p", 2)


def divides(view: View, node: fx.Node, over: fx.Node, total: fx.Node, axis: int) -> bool:
    """Whether a node divides `over` by `total`, which has one number for all of `axis`."""
    if view.op(node) != "div" or view.arg(node, "input") is not over:
        return False
    other = view.arg(node, "other")
    return not node.kwargs.get("rounding_mode") and spread(view, other, node, axis) is total


def spread(view: View, other: Any, like: fx.Node, axis: int) -> fx.Node | None:
    """The reduction along `axis` whose result is broadcast to the shape of `like`, or None."""
    while isinstance(other, fx.Node) and (
        view.op(other) in ("to", "identity", "expand") or _keeps_from_zero(view, other)
    ):
        other = view.inputs(other)[0]
    wanted = list(view.shape(like))
    wanted[axis] = 1
    if not isinstance(other, fx.Node) or list(view.shape(other)) != wanted:
        return None
    while view.op(other) in ("to", "identity", "reshape") or _adds_axes(view, other):
        other = view.inputs(other)[0]
    return other


def _keeps_from_zero(view: View, node: fx.Node) -> bool:
    """x.clamp_min(eps) with a tiny eps, which only matters where nothing is left to divide."""
    if view.op(node) not in ("clamp", "clamp_min") or view.arg(node, "max") is not None:
        return False
    least = view.arg(node, "min")
    return isinstance(least, float | int) and 0 <= least <= _TINY


def _adds_axes(view: View, node: fx.Node) -> bool:
    """x[..., None] and the like."""
    if view.op(node) != "getitem":
        return False
    keys = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return all(key in (None, ..., slice(None)) for key in keys)


def axis_of(view: View, node: fx.Node) -> int | None:
    """The one axis that a reduction or a softmax runs over."""
    axis = view.arg(node, "dim")
    if isinstance(axis, list | tuple) and len(axis) == 1:
        axis = axis[0]
    return axis % len(view.shape(view.inputs(node)[0])) if isinstance(axis, int) else None


def _scaled(view: View, node: fx.Node, chain: Chain, other: Any) -> Chain:
    """A constant factor, or a learned temperature (one number a head, moved to q)."""
    number = view.scalar(other)
    if number is not None and (number or view.op(node) == "mul"):
        scale = number if view.op(node) == "mul" else 1.0 / number
        return replace(chain, factor=chain.factor * scale)
    if not isinstance(other, fx.Node):
        raise Refusal("scores-changed", f"'{node.name}' divides the scores by zero")
    rank = len(view.shape(node))
    shape = (1,) * (rank - len(view.shape(other))) + view.shape(other)
    per_head = len(shape) == rank and shape[chain.dims.rows] == shape[chain.dims.columns] == 1
    natural = rank == 4 and chain.dims == Dims(2, 3)
    if per_head and natural and not view.depends_on_input(other):
        return replace(chain, temperatures=(*chain.temperatures, node))
    raise Refusal(
        "scores-changed", f"'{node.name}' scales the scores by '{other}', which is not constant"
    )


def _dropped(view: View, node: fx.Node, chain: Chain, probabilities: bool) -> Chain:
    p = view.arg(node, "p", 0.0)
    if p == 0 or (node.op != "call_module" and not view.arg(node, "train", True)):
        return chain
    if not probabilities or chain.dropout:
        detail = (
            f"'{node.name}' is a dropout of the scores, before the softmax; a node has no scores"
        )
        raise Refusal("dropout-active", detail)
    return replace(chain, dropout=node if node.op == "call_module" else p)


def _regrouped(view: View, node: fx.Node, chain: Chain) -> Dims:
    dims = chain.dims
    groups = regroup_node(view, node)
    place = {ins[0]: outs[0] for ins, outs in groups or () if len(ins) == len(outs) == 1}
    if dims.rows in place and dims.columns in place:
        return Dims(place[dims.rows], place[dims.columns])
    below = chain.nodes[chain.nodes.index(node) + 1 :]
    for add in (n for n in below if view.op(n) == "add" and len(view.inputs(n)) == 2):
        other = view.inputs(add)[view.inputs(add)[0] in chain.nodes]
        if other not in chain.nodes and not harmless(view, other):
            raise Refusal(*refusal(view, other))
    raise Refusal("scores-changed", f"'{node.name}' mixes the token axes of the scores")


def bound(
    view: View,
    scores: fx.Node,
    softmax: fx.Node,
    output: fx.Node,
    axis: int | None,
    *,
    total: fx.Node | None = None,
    last: fx.Node | None = None,
) -> Binding:
    """Read two products around a softmax over `axis`.

    total: the sum that what `softmax` yields is to be divided by, at the node `last` below
    `output` or else between the two.
    """
    also = (last,) if last is not None else ()
    first, upper = _oriented(view, scores, softmax, axis, also)
    dims = upper.dims
    lower = follow(view, softmax, output, dims, probabilities=True, total=total, also=also)
    if total is not None and lower.divided == (last is not None):
        raise Refusal("probabilities-used", f"'{softmax.name}' is not divided by its sum")
    second = product(view, output)
    if second.left is not lower.end:
        second = second.swapped()
    if second.left_contracted != lower.dims.columns or second.rows_in_left != lower.dims.rows:
        raise Refusal("not-attention", f"'{output.name}' does not sum the values over the keys")
    q, q_factor = operand(view, first.left, first.rows_in_left, first.left_contracted)
    k, k_factor = operand(view, first.right, first.columns_in_right, first.right_contracted)
    v, _ = operand(
        view, second.right, second.right_contracted, second.columns_in_right, scales=False
    )
    if len({len(x.batch) for x in (q, k, v)}) > 1:  # heads visible on some tensors only
        q, q_factor = operand(
            *(view, first.left, first.rows_in_left, first.left_contracted), climb=False
        )
        k, k_factor = operand(
            *(view, first.right, first.columns_in_right, first.right_contracted), climb=False
        )
        v, _ = operand(
            *(view, second.right, second.right_contracted, second.columns_in_right),
            scales=False,
            climb=False,
        )
    kinds = ["b"] * second.rank
    kinds[second.rows], kinds[second.columns] = "t", "c"
    factor = first.factor * upper.factor * q_factor * k_factor
    nodes = (scores, *upper.nodes, softmax, *lower.nodes, output, *also)
    if total is not None and last is not None:
        if not divides(view, last, output, total, second.columns):
            detail = f"'{last.name}' divides by something else than the sum of the exponentials"
            raise Refusal("probabilities-used", detail)
        output = last
    return Binding(
        *(q, k, v, factor, output, tuple(kinds), nodes),
        dropout=lower.dropout,
        temperatures=upper.temperatures,
        masks=upper.masks,
    )


def _oriented(
    view: View, scores: fx.Node, softmax: fx.Node, axis: int | None, also: tuple[fx.Node, ...]
) -> tuple[Product, Chain]:
    """The product as q k^T, whichever way round it is written, and what happens to it."""
    first = product(view, scores)
    refusal = Refusal(
        "not-attention", f"the softmax '{softmax.name}' runs over axis {axis}, not the keys"
    )
    for candidate in (first.swapped(), first):
        try:
            dims = Dims(candidate.rows, candidate.columns)
            upper = follow(view, scores, softmax, dims, also=also)
        except Refusal as found:
            refusal = found
        else:
            if axis == upper.dims.columns:
                return candidate, upper
    raise refusal
