"""How the axes of a tensor map through layout operators (reshape, permute)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

from torch import fx

from t5fx.graph.sizes import Size, exactly, hint, same
from t5fx.graph.view import View

#: Corresponding axes of two shapes: (input axes, output axes) of each group.
Groups: TypeAlias = list[tuple[list[int], list[int]]]


def permutation(view: View, node: fx.Node) -> list[int] | None:
    """For transpose-like nodes, the input axis that each output axis comes from; else None."""
    name = view.op(node)
    source = view.inputs(node)
    if not source:
        return None
    rank = len(view.shape(source[0]))
    order = list(range(rank))
    if name in ("transpose", "t", "mT", "adjoint", "mH"):
        pair = (view.arg(node, "dim0"), view.arg(node, "dim1"))
        first, second = pair if None not in pair else (-2, -1)
        if name != "transpose" and rank < 2:
            return order
        order[first], order[second] = order[second], order[first]
        return order
    if name == "permute":
        dims = node.kwargs.get("dims", node.args[1:])
        if len(dims) == 1 and isinstance(dims[0], list | tuple):
            dims = dims[0]
        return [d % rank for d in dims]
    if name == "movedim":
        src, dst = (list(_many(a)) for a in (node.args[1], node.args[2]))
        src, dst = [d % rank for d in src], [d % rank for d in dst]
        rest = iter([d for d in order if d not in src])
        return [src[dst.index(d)] if d in dst else next(rest) for d in order]
    return None


def regroup(
    before: Sequence[Size],
    after: Sequence[Size],
    hints: tuple[Sequence[int], Sequence[int]] | None = None,
) -> Groups | None:
    """Split two shapes of one row-major reshape into corresponding groups of axes.

    Returns [(input axes, output axes), ...], or None where the correspondence cannot be proved.
    Axes of size one stand alone where they have no partner. `hints` = (before, after) as example
    sizes steers the search between symbolic sizes; equality itself is always proved. That an axis n
    is split into n // d and d proves that d divides n: with a remainder anywhere the two shapes
    would not have as many elements.
    """
    groups: Groups = []
    i = j = 0
    n, m = len(before), len(after)
    hints = hints or (before, after)
    while i < n or j < m:
        if i < n and before[i] == 1 and (j >= m or after[j] != 1):
            groups.append(([i], []))
            i += 1
            continue
        if j < m and after[j] == 1 and (i >= n or before[i] != 1):
            groups.append(([], [j]))
            j += 1
            continue
        if i >= n or j >= m:
            return None
        ins, outs = [i], [j]
        left, right, left_hint, right_hint = before[i], after[j], hints[0][i], hints[1][j]
        i, j = i + 1, j + 1
        while not (same(left, right) or (left_hint == right_hint and exactly(left, right))):
            # On equal example sizes of unequal expressions either side may have to grow.
            if left_hint < right_hint or (left_hint == right_hint and i < n and j >= m):
                if i >= n:
                    return None
                left, left_hint = left * before[i], left_hint * hints[0][i]
                ins.append(i)
                i += 1
            else:
                if j >= m:
                    return None
                right, right_hint = right * after[j], right_hint * hints[1][j]
                outs.append(j)
                j += 1
        groups.append((ins, outs))
    return groups


def regroup_node(view: View, node: fx.Node) -> Groups | None:
    """`regroup` of a reshape-like node with one tensor input."""
    source = view.inputs(node)[0]
    before, after = view.val(source), view.val(node)
    if before is None or after is None:
        return None
    hints = [hint(s) for s in before.shape], [hint(s) for s in after.shape]
    return regroup(view.shape(source), view.shape(node), hints)


def _many(value: int | Iterable[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)
