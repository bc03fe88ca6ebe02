"""What one axis of a tensor means: a small class for each kind of axis, and their union `Axis`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from torch import fx

from t5fx.frontend.positions import Positions
from t5fx.graph.sizes import Size

#: What made an axis: most often the name of a node and the number of its axis.
Made: TypeAlias = tuple[object, ...]


@dataclass(frozen=True)
class _Axis:
    """What all kinds of axes have; two axes are the same tokens iff they compare equal.

    data: it depends on the inputs of the model, not on parameters alone. at: (node, axis) that has
    this size. example: its size in the captured example, where that is not a number itself.
    tables: those that its positions were multiplied with row by row: see `t5fx.analysis.packed`.
    """

    size: Size
    data: bool = field(default=True, compare=False, kw_only=True)
    at: tuple[fx.Node, int] | None = field(default=None, compare=False, kw_only=True)
    example: int = field(default=0, compare=False, kw_only=True)
    tables: tuple[Axis, ...] = field(default=(), compare=False, repr=False, kw_only=True)

    @property
    def inside(self) -> tuple[Axis, ...]:
        """The axes that it is made of."""
        return ()

    @property
    def grid(self) -> tuple[Axis, ...]:
        """The spatial axes that it is made of, outermost first; empty where not all of it is."""
        return ()

    @property
    def count(self) -> int:
        """Its size in the captured example."""
        return self.size if isinstance(self.size, int) else self.example

    @property
    def spatial(self) -> bool:
        """Whether it is a spatial axis, or a part of one."""
        return False

    @property
    def repeats(self) -> bool:
        """Whether any part of it repeats one position."""
        return any(part.repeats for part in self.inside)

    @property
    def features(self) -> bool:
        """Whether any part of it counts channels."""
        return any(part.features for part in self.inside)

    @property
    def of_items(self) -> bool:
        """Whether it counts the heads of several items of a batch."""
        return False

    @property
    def sliced(self) -> bool:
        """Whether it counts some of the heads of several items of a batch."""
        return False


@dataclass(frozen=True)
class Leaf(_Axis):
    """An axis that is not made of others."""

    made: Made


@dataclass(frozen=True)
class Spatial(Leaf):
    """One axis of an image, or of what a convolution made of one."""

    @property
    def grid(self) -> tuple[Axis, ...]:
        return (self,)

    @property
    def spatial(self) -> bool:
        return True


@dataclass(frozen=True)
class Side(Leaf):
    """One axis of an input that may be an image."""


@dataclass(frozen=True)
class Feature(Leaf):
    """Channels."""

    @property
    def features(self) -> bool:
        return True


@dataclass(frozen=True)
class Batch(Leaf):
    """Items of a batch."""


@dataclass(frozen=True)
class Repeat(Leaf):
    """One position, repeated."""

    @property
    def repeats(self) -> bool:
        return True


@dataclass(frozen=True)
class Plain(Leaf):
    """An axis of which nothing is known but what made it."""


@dataclass(frozen=True)
class Row(Leaf):
    """The rows of an input that lists positions: of a grid, or what they are instead, in words."""

    positions: Positions | str = field(default="", compare=False)


@dataclass(frozen=True)
class Unit(_Axis):
    """An axis of size one that is no side of a grid."""

    size: Size = 1
    made: Made = ()


@dataclass(frozen=True)
class Merge(_Axis):
    """Two axes or more, row-major."""

    parts: tuple[Axis, ...]

    @property
    def inside(self) -> tuple[Axis, ...]:
        return self.parts

    @property
    def grid(self) -> tuple[Axis, ...]:
        inner = [part.grid for part in self.parts]
        if not inner[0] and isinstance(self.parts[0], Side) and all(inner[1:]):
            # Frames of a video whose other two sides are cut into patches.
            beside = [axis for axes in inner[1:] for axis in axes]
            if len(beside) == len(patches(beside)) == 2:
                inner[0] = (self.parts[0],)
        return tuple(axis for axes in inner for axis in axes) if all(inner) else ()

    @property
    def of_items(self) -> bool:
        return self.features and any(isinstance(part, Batch) for part in self.parts)


@dataclass(frozen=True)
class Cat(_Axis):
    """Runs of tokens, one after the other."""

    parts: tuple[Axis, ...]

    @property
    def inside(self) -> tuple[Axis, ...]:
        return self.parts


@dataclass(frozen=True)
class Piece(_Axis):
    """Number `index` of the axes of these `sizes` that a whole was split into."""

    whole: Axis
    index: int
    sizes: tuple[Size, ...]

    @property
    def inside(self) -> tuple[Axis, ...]:
        return (self.whole,)

    @property
    def grid(self) -> tuple[Axis, ...]:
        spatial = isinstance(self.whole, Spatial | Piece) and self.spatial
        return (self,) if self.cut or spatial else ()

    @property
    def cut(self) -> bool:
        """Whether it counts the patches along a side of an input."""
        return self.index == 0 and isinstance(self.whole, Side)

    @property
    def spatial(self) -> bool:
        return self.whole.spatial


@dataclass(frozen=True)
class Picked(_Axis):
    """An axis, in a tensor that holds only what position `index` of another one held."""

    whole: Axis
    other: Axis
    index: int

    @property
    def inside(self) -> tuple[Axis, ...]:
        return (self.whole,)

    @property
    def grid(self) -> tuple[Axis, ...]:
        return self.whole.grid

    @property
    def spatial(self) -> bool:
        return self.whole.spatial


@dataclass(frozen=True)
class Chosen(_Axis):
    """Some positions of an axis, or all of them in another order.

    how: "from" and the first of neighbouring positions; "chosen by" (positions that depend on the
    input) or "moved by" (others) and the name of a node.
    """

    whole: Axis
    how: Made

    @property
    def inside(self) -> tuple[Axis, ...]:
        return (self.whole,)

    @property
    def sliced(self) -> bool:
        return self.whole.of_items


#: Meaning of one axis of a tensor.
Axis: TypeAlias = Leaf | Unit | Merge | Cat | Piece | Picked | Chosen


def made_by(axis: Axis) -> Made:
    """What made an axis; empty where it was put together of others."""
    match axis:
        case Leaf() | Unit():
            return axis.made
        case Piece():
            return made_by(axis.whole)
        case Picked():
            return ("picked", axis.other, axis.index)
        case Chosen():
            return axis.how
        case Merge() | Cat():
            return ()


def runs_of(axis: Axis) -> tuple[Axis, ...]:
    """The runs of a concatenation; any other axis is one run."""
    return axis.parts if isinstance(axis, Cat) else (axis,)


def joined(size: Size, runs: Sequence[Axis]) -> Axis:
    """Runs one after the other, as one axis of this size."""
    data = any(run.data for run in runs)
    return runs[0] if len(runs) == 1 else Cat(size, tuple(runs), data=data)


def put_back(axis: Axis, index: object, items: set[Axis]) -> Axis:
    """An axis of what becomes item `index`, as it was before item `index` was picked.

    The axis that counts the items is added to `items`.
    """
    while isinstance(axis, Picked) and axis.index == index:
        if axis.data:
            items.add(axis.other)
        axis = axis.whole
    if isinstance(axis, Cat):
        runs = tuple(put_back(run, index, items) for run in axis.parts)
        return replace(axis, parts=runs)
    if isinstance(axis, Chosen):
        return replace(axis, whole=put_back(axis.whole, index, items))
    return axis


def patches(axes: Iterable[Axis]) -> list[Piece]:
    """The axes among these that count the patches along a side of an input."""
    return [axis for axis in axes if isinstance(axis, Piece) and axis.cut]
