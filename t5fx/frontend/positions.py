"""What the arguments of a call tell of the grid of its tokens: lists of positions, and its sides.

A grid that is given beside the call can contradict them: a transposed image has as many tokens.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake
from torch.utils.weak import WeakTensorKeyDictionary

from t5fx.graph.axes import regroup

#: So many images one after the other are told apart, to say what they are.
_IMAGES = 16


@dataclass(frozen=True)
class Positions:
    """An argument that lists the positions of a grid, row-major: [..., N, 2 to 4].

    leaf: its number among the leaves of the arguments; sides: of the grid, those of more than one
    position; columns: where the last axis has the position along each side.
    """

    leaf: int
    sides: tuple[int, ...]
    columns: tuple[int, ...]

    def kept(self, value: torch.Tensor) -> torch.Tensor:
        """Whether a tensor lists the same positions, as a tensor without axes."""
        ranges = [torch.arange(n, device=value.device) for n in self.sides]
        grids = torch.meshgrid(*ranges, indexing="ij")
        kept = torch.ones((), dtype=torch.bool, device=value.device)
        for column, wanted in zip(self.columns, grids, strict=True):
            found = value[..., column]
            kept = kept & (found - found[..., :1] == wanted.flatten()).all()
        return kept

    def again(self, value: torch.Tensor) -> tuple[int, ...] | None:
        """The sides in another call's list, along the same columns; None where it is no grid's.

        Reads the values. A side may be of one position there.
        """
        if not may_list(value):
            return None
        rows = _rows(value)
        if not bool(rows.isfinite().all()):
            return None
        sides = tuple(int(n) + 1 for n in (rows[-1] - rows[0])[list(self.columns)])
        if min(sides) < 1 or math.prod(sides) != len(rows):
            return None
        rest = [i for i in range(rows.shape[1]) if i not in self.columns]
        other = value.detach()[..., rest]
        kept = Positions(self.leaf, sides, self.columns).kept(value.detach())
        return sides if bool(kept) and bool((other == other[..., :1, :]).all()) else None


#: By tensor: the axis and (prefix, grid, suffix) along it, of outputs of compiled graphs.
_handed: Any = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class Handed(Positions):
    """A tensor along an axis of which the tokens lie as the graph that returned it has proved.

    axis, prefix, suffix: the rest of what that is; columns: none.
    """

    axis: int = 0
    prefix: int = 0
    suffix: int = 0

    @classmethod
    def of(cls, leaf: int, value: torch.Tensor) -> Handed | None:
        """What is known of a tensor, or None."""
        if value not in _handed:
            return None
        axis, (prefix, sides, suffix) = _handed[value]
        return cls(leaf, sides, (), axis, prefix, suffix)

    def again(self, value: torch.Tensor) -> tuple[int, ...] | None:
        """The grid of another tensor with as many tokens before and after it, or None."""
        known = Handed.of(self.leaf, value)
        if known is None or replace(known, sides=self.sides) != self:
            return None
        return known.sides if len(known.sides) == len(self.sides) else None


def hand_on(value: torch.Tensor, axis: int, layout: tuple[int, tuple[int, ...], int]) -> None:
    """Note of a tensor that its tokens along an axis have this (prefix, grid, suffix)."""
    _handed[value] = (axis, layout)


def lists_in(leaves: Sequence[Any]) -> dict[int, Positions | str]:
    """Of the leaves that list positions, by number: what they are. Reads their values.

    In a list at least two columns vary, in whole numbers. A string says why it is not a grid's.
    """
    found: dict[int, Positions | str] = {}
    for i, leaf in enumerate(leaves):
        if may_list(leaf) and (one := _listed(i, leaf) or _other(leaf)):
            found[i] = one
    return found


def _other(value: torch.Tensor) -> str:
    """What the rows of a tensor are that are not the positions of one grid; "" if no positions."""
    rows = _rows(value)
    if not bool((rows == rows.round()).all()) or int((rows != rows[0]).any(0).sum()) < 2:
        return ""
    begins = (rows == rows[0]).all(1).cumsum(0)  # of images that all have the same number
    for column in (*rows.T, begins):
        _, counts = torch.unique_consecutive(column, return_counts=True)
        runs = rows.split(counts.tolist())
        if 1 < len(runs) <= _IMAGES:
            grids = [_listed(0, run) for run in runs]
            if all(grids):
                shown = ", then ".join(_shown(grid.sides) for grid in grids if grid)
                return f"are those of {len(grids)} grids, {shown}; the node takes one"
    return "are not those of a grid, row by row"


def _rows(value: torch.Tensor) -> torch.Tensor:
    """Of a list of positions those of the first item of its batch, exactly."""
    rows = value.detach().flatten(0, -3)[0] if value.dim() > 2 else value.detach()
    return rows.double().cpu()


def positions_in(leaves: Sequence[Any]) -> tuple[Positions, ...]:
    """The lists of positions among the leaves of a call's arguments. Reads their values.

    In each at least two columns vary, by whole steps from their first value; all items of a batch
    are alike.
    """
    found = (_listed(i, leaf) for i, leaf in enumerate(leaves) if may_list(leaf))
    return tuple(one for one in found if one is not None)


def _listed(leaf: int, value: torch.Tensor) -> Positions | None:
    rows = _rows(value)
    steps = rows - rows[0]
    varying = [i for i in range(steps.shape[1]) if bool(steps[:, i].any())]
    if len(varying) < 2 or not bool((steps >= 0).all()):
        return None
    # The first row in which a column moves is later the further out its side is.
    varying.sort(key=lambda i: -int(steps[:, i].nonzero()[0]))
    sides = tuple(int(steps[:, i].max()) + 1 for i in varying)
    if math.prod(sides) != len(rows):
        return None
    found = Positions(leaf, sides, tuple(varying))
    return found if bool(found.kept(value.detach())) else None


def may_list(value: Any) -> bool:
    """Whether a leaf of the arguments has the shape of a list of positions, and values."""
    return (
        isinstance(value, torch.Tensor)
        and value.dim() >= 2
        and value.shape[-2] > 1
        and 2 <= value.shape[-1] <= 4
        and value.numel() > 0
        and not (value.is_meta or value.is_complex() or is_fake(value))
        and value.dtype != torch.bool
    )


def objection(leaves: Sequence[Any], grid: tuple[int, ...], *, constant: bool) -> str | None:
    """A sentence on why a grid that is given is not that of a call with these leaves, or None.

    constant: it was not computed from the arguments. Integers among these that are its sides in
    another order speak against such a one.
    """
    shown, listed = _shown(grid), positions_in(leaves)
    others = [one for one in listed if not is_coarser(grid, one.sides)]
    alike = [one for one in others if math.prod(one.sides) == math.prod(grid)]
    if others and (alike or len(others) == len(listed)):
        told = (
            f"the positions among the arguments are those of {_shown((alike or others)[0].sides)}"
        )
        return f"expected the grid of the call, got {shown}: {told}"
    if constant and (sides := _turned(leaves, tuple(n for n in grid if n > 1))):
        return (
            f"expected the grid of the call, got {shown}: the integers "
            f"{', '.join(map(str, sides))} among the arguments are its sides in another order; "
            f"give it as a callable of the arguments"
        )
    return None


def _turned(leaves: Sequence[Any], grid: tuple[int, ...]) -> tuple[int, ...] | None:
    """Neighbouring integers that are the sides of a grid in another order than its own.

    Of three sides a turn will do, such as (height, width, frames).
    """
    count, i = len(grid), 0
    if count < 2:
        return None
    turns = {grid} if count == 2 else {grid[j:] + grid[:j] for j in range(count)}
    while i + count <= len(leaves):
        window = tuple(leaves[i : i + count])
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in window)
        if whole and sorted(window) == sorted(grid):
            if window not in turns:
                return window
            i += count
        else:
            i += 1
    return None


def is_coarser(grid: Sequence[int], sides: Sequence[int]) -> bool:
    """Whether a grid is another one, or that with neighbouring axes taken together."""
    groups = regroup([n for n in sides if n > 1], [n for n in grid if n > 1])
    return groups is not None and all(len(outs) == 1 for _, outs in groups)


def _shown(sides: Sequence[int]) -> str:
    return " x ".join(map(str, sides))


class Unchanged:
    """Remembers tensors that were looked at, so that each is read once for every change of it."""

    def __init__(self) -> None:
        self._seen: dict[Any, list[tuple[weakref.ref[torch.Tensor], int]]] = {}

    def __call__(self, key: Any, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether they are those last noted under `key`, and unchanged since."""
        seen = self._seen.get(key, [])
        return len(seen) == len(tensors) and all(
            known() is tensor and version == tensor._version
            for (known, version), tensor in zip(seen, tensors, strict=True)
        )

    def note(self, key: Any, tensors: Sequence[torch.Tensor]) -> None:
        if not any(tensor.is_inference() for tensor in tensors):  # which count no changes
            self._seen[key] = [(weakref.ref(tensor), tensor._version) for tensor in tensors]


class Reading:
    """The sides that lists of positions tell, each list read once for every change of it.

    What was read is kept in one piece with what it was read of: threads may share it.
    """

    def __init__(self) -> None:
        self._seen: dict[Positions, tuple[Any, int, tuple[int, ...] | None]] = {}

    def __call__(self, positions: Positions, value: torch.Tensor) -> tuple[int, ...] | None:
        if value.is_inference():  # which counts no changes
            return positions.again(value)
        seen = self._seen.get(positions)
        if seen is not None and seen[0]() is value and seen[1] == value._version:
            return seen[2]
        version = value._version
        sides = positions.again(value)
        self._seen[positions] = (weakref.ref(value), version, sides)
        return sides
