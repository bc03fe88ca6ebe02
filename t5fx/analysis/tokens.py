"""Where the tokens of an axis come from, and whether they are a grid; how axes merge and split."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from t5fx.analysis.axis import Axis, Merge, Picked, Piece, Unit, patches, runs_of
from t5fx.graph.axes import regroup
from t5fx.graph.sizes import Size, exactly, quotient, same


@dataclass(frozen=True)
class Layout:
    """prefix, grid and suffix as axes (of the given sizes), in token order; numbers are sizes."""

    prefix: tuple[Axis, ...]
    grid: tuple[Axis | int, ...]
    suffix: tuple[Axis, ...]

    @property
    def counts(self) -> tuple[int, tuple[int, ...], int]:
        """(prefix, grid, suffix) in the captured example."""
        before, after = (sum(a.count for a in axes) for axes in (self.prefix, self.suffix))
        return before, tuple(a if isinstance(a, int) else a.count for a in self.grid), after


def layout_of(axis: Axis) -> Layout | str:
    """The layout of a token axis, or a sentence that says what is missing."""
    while isinstance(axis, Picked):
        axis = axis.whole
    runs = runs_of(axis)
    grids = [i for i, run in enumerate(runs) if run.grid]
    if not grids:
        return "no run of the tokens could be traced to the spatial axes of an image or convolution"
    if len(grids) > 1:
        return f"{len(grids)} runs of the tokens are grids; the node takes one"
    dims = runs[grids[0]].grid
    sides = [axis.whole.count // max(axis.count, 1) for axis in patches(dims)]
    if sides and all(sides.count(size) < 2 for size in sides):
        return "only one side of an input is cut into patches; an image has two of one size"
    if len(dims) > 3:
        return f"the tokens have {len(dims)} spatial axes; the node takes one to three"
    return Layout(runs[: grids[0]], dims, runs[grids[0] + 1 :])


def _outer(parts: tuple[Axis, ...], sizes: tuple[Size, ...]) -> Size | None:
    """Into how many the last part comes apart where the last of `sizes` are its innermost ones."""
    last, inner = parts[-1], sizes[-1]
    if not isinstance(inner, int) or last.count <= inner or last.count % inner:
        return None
    if isinstance(last.size, int):
        return last.size // inner
    outer = quotient(sizes[0], [p.size for p in parts[:-1]]) if len(sizes) == 2 else None
    fits = outer is not None and (
        same(last.size, outer * inner) or exactly(last.size, outer * inner)
    )
    return outer if fits else None


def merge(parts: Sequence[Axis], size: Size | None) -> Axis:
    """Row-major merge of neighbouring axes; the pieces of one split make it whole again."""
    parts = _heal(parts)
    if len(parts) == 1:
        return parts[0]
    if size is None:
        size = 1
        for part in parts:
            size = size * part.size
    data, example = any(p.data for p in parts), math.prod(p.count for p in parts)
    return Merge(size, tuple(parts), data=data, example=example)


def flat(parts: Iterable[Axis]) -> tuple[Axis, ...]:
    """The axes with each merge replaced by its parts, down to axes that are no merges."""
    return tuple(a for p in parts for a in (flat(p.parts) if isinstance(p, Merge) else (p,)))


def _heal(parts: Sequence[Axis]) -> list[Axis]:
    healed: list[Axis] = []
    for part in parts:
        healed.append(part)
        if not isinstance(part, Piece):
            continue
        n = len(part.sizes)
        if len(healed) >= n and all(
            isinstance(p, Piece) and (p.whole, p.sizes, p.index) == (part.whole, part.sizes, i)
            for i, p in enumerate(healed[-n:])
        ):
            healed[-n:] = [part.whole]
    return healed


def split(whole: Axis, sizes: list[tuple[Size, int]]) -> list[Axis]:
    """Pieces of one axis, outermost first; a merge comes apart into what it was made of."""
    exprs = tuple(size for size, _ in sizes)
    if isinstance(whole, Merge):
        for parts in dict.fromkeys((whole.parts, flat(whole.parts))):
            hints = tuple(p.count for p in parts), tuple(h for _, h in sizes)
            groups = regroup(tuple(p.size for p in parts), exprs, hints)
            if groups is None or len(groups) < 2:
                continue
            pieces: list[Axis] = []
            for ins, outs in groups:
                inner = merge([parts[i] for i in ins], None) if ins else Unit()
                chosen = [sizes[j] for j in outs]
                pieces += [inner] if len(outs) == 1 else split(inner, chosen)
            return pieces
        outer = _outer(whole.parts, exprs)
        if outer is not None:  # [B, H * D] seen as [B * H, D]
            last = whole.parts[-1]
            pair = split(last, [(outer, last.count // sizes[-1][1]), sizes[-1]])
            rest = merge([*whole.parts[:-1], pair[0]], None)
            front = [rest] if len(sizes) == 2 else split(rest, sizes[:-1])
            return [*front, pair[1]]
    return [
        Piece(size, whole, i, exprs, data=whole.data, example=example)
        for i, (size, example) in enumerate(sizes)
    ]
