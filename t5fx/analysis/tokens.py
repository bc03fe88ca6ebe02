"""What one axis of a tensor means: where its tokens come from, and whether they are a grid."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import fx

from t5fx.graph.axes import regroup
from t5fx.graph.sizes import exactly, quotient, same

Kind = Literal[
    "spatial",
    "side",
    "merge",
    "cat",
    "piece",
    "picked",
    "chosen",
    "feature",
    "batch",
    "repeat",
    "unit",
    "plain",
]


@dataclass(frozen=True)
class Axis:
    """Meaning of one axis of a tensor.

    kind: "spatial", "side" (of an input that may be an image), "merge" (row-major, of `parts`),
    "cat" (of `parts`), "piece" (number `index` of the split of `parts[0]` into `sizes`), "picked"
    (`parts[0]`, in a tensor that holds only what position `index` of another axis, `source`, held),
    "chosen" (some of `parts[0]`, or all in another order),
    "feature", "batch", "repeat" (of one position), "unit" (size one), "plain".
    source: what made it; two axes are the same tokens iff they compare equal. data: it depends on
    the inputs of the model, not on parameters alone. at: (node, axis) that has this size.
    """

    kind: Kind
    size: Any
    source: Any = None
    parts: tuple[Axis, ...] = ()
    index: int = 0
    sizes: tuple[Any, ...] = ()
    data: bool = field(default=True, compare=False)
    at: tuple[fx.Node, int] | None = field(default=None, compare=False)
    example: int = field(default=0, compare=False)

    def grid(self) -> tuple[Axis, ...] | None:
        """The spatial axes that this one is made of, outermost first, or None."""
        if self.kind == "spatial":
            return (self,)
        if self.kind == "picked":
            return self.parts[0].grid()
        if self.cut:
            return (self,)
        if self.kind == "piece":
            return (self,) if self.parts[0].kind in ("spatial", "piece") and self.spatial else None
        if self.kind == "merge":
            inner = [part.grid() for part in self.parts]
            if inner[0] is None and self.parts[0].kind == "side" and None not in inner[1:]:
                # Frames of a video whose other two sides are cut into patches.
                beside = [axis for axes in inner[1:] for axis in axes or ()]
                if len(beside) == 2 and all(axis.cut for axis in beside):
                    inner[0] = (self.parts[0],)
            return None if None in inner else tuple(a for axes in inner for a in axes or ())
        return None

    @property
    def count(self) -> int:
        """Its size in the captured example."""
        return self.size if isinstance(self.size, int) else self.example

    @property
    def cut(self) -> bool:
        """Whether it counts the patches along a side of an input."""
        return self.kind == "piece" and self.index == 0 and self.parts[0].kind == "side"

    @property
    def spatial(self) -> bool:
        whole = self.parts[0].spatial if self.kind in ("piece", "picked") else False
        return self.kind == "spatial" or whole

    @property
    def repeats(self) -> bool:
        """Whether any part of it repeats one position."""
        return self.kind == "repeat" or any(part.repeats for part in self.parts)

    @property
    def features(self) -> bool:
        """Whether any part of it counts channels."""
        return self.kind == "feature" or any(part.features for part in self.parts)

    @property
    def of_items(self) -> bool:
        """Whether it counts the heads of several items of a batch."""
        parts = self.parts if self.kind == "merge" else ()
        return any(p.features for p in parts) and any(p.kind == "batch" for p in parts)

    @property
    def sliced(self) -> bool:
        """Whether it counts some of the heads of several items of a batch."""
        return self.kind == "chosen" and self.parts[0].of_items


@dataclass(frozen=True)
class Layout:
    """prefix, grid and suffix as axes (of the given sizes), in token order."""

    prefix: tuple[Axis, ...]
    grid: tuple[Axis, ...]
    suffix: tuple[Axis, ...]


def layout_of(axis: Axis) -> Layout | str:
    """The layout of a token axis, or a sentence that says what is missing."""
    while axis.kind == "picked":
        axis = axis.parts[0]
    runs = axis.parts if axis.kind == "cat" else (axis,)
    grids = [i for i, run in enumerate(runs) if run.grid()]
    if not grids:
        return "no run of the tokens could be traced to the spatial axes of an image or convolution"
    if len(grids) > 1:
        return f"{len(grids)} runs of the tokens are grids; the node takes one"
    dims = runs[grids[0]].grid() or ()
    patches = [a.parts[0].count // max(a.count, 1) for a in dims if a.cut]
    if patches and all(patches.count(size) < 2 for size in patches):
        return "only one side of an input is cut into patches; an image has two of one size"
    if len(dims) > 3:
        return f"the tokens have {len(dims)} spatial axes; the node takes one to three"
    return Layout(runs[: grids[0]], dims, runs[grids[0] + 1 :])


def _outer(parts: tuple[Axis, ...], sizes: tuple[Any, ...]) -> Any:
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


def merge(parts: list[Axis], size: Any) -> Axis:
    """Row-major merge of neighbouring axes; the pieces of one split make it whole again."""
    parts = _heal(parts)
    if len(parts) == 1:
        return parts[0]
    if size is None:
        size = 1
        for part in parts:
            size = size * part.size
    data, example = any(p.data for p in parts), math.prod(p.count for p in parts)
    return Axis("merge", size, parts=tuple(parts), data=data, example=example)


def _flat(parts: Iterable[Axis]) -> tuple[Axis, ...]:
    """The same with merges of merges opened."""
    return tuple(a for p in parts for a in (_flat(p.parts) if p.kind == "merge" else (p,)))


def _heal(parts: list[Axis]) -> list[Axis]:
    healed: list[Axis] = []
    for part in parts:
        healed.append(part)
        n = len(part.sizes)
        last = healed[-n:] if part.kind == "piece" and len(healed) >= n else []
        if last and all(
            p.kind == "piece" and p.parts == part.parts and p.sizes == part.sizes and p.index == i
            for i, p in enumerate(last)
        ):
            healed[-n:] = [part.parts[0]]
    return healed


def split(whole: Axis, sizes: list[tuple[Any, int]]) -> list[Axis]:
    """Pieces of one axis, outermost first; a merge comes apart into what it was made of."""
    exprs = tuple(size for size, _ in sizes)
    if whole.kind == "merge":
        for parts in dict.fromkeys((whole.parts, _flat(whole.parts))):
            hints = tuple(p.count for p in parts), tuple(h for _, h in sizes)
            groups = regroup(tuple(p.size for p in parts), exprs, hints)
            if groups is None or len(groups) < 2:
                continue
            pieces: list[Axis] = []
            for ins, outs in groups:
                inner = merge([parts[i] for i in ins], None) if ins else Axis("unit", 1)
                chosen = [sizes[j] for j in outs]
                pieces += [inner] if len(outs) == 1 else split(inner, chosen)
            return pieces
        last, inner = whole.parts[-1], exprs[-1]
        outer = _outer(whole.parts, exprs)
        if outer is not None:  # [B, H * D] seen as [B * H, D]
            pair = split(last, [(outer, last.count // inner), (inner, inner)])
            rest = merge([*whole.parts[:-1], pair[0]], None)
            front = [rest] if len(sizes) == 2 else split(rest, sizes[:-1])
            return [*front, pair[1]]
    return [
        Axis("piece", size, whole.source, (whole,), i, exprs, whole.data, example=example)
        for i, (size, example) in enumerate(sizes)
    ]
