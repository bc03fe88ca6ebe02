"""The grid of packed tokens, which are an input [B, N, C]: what a table of their positions tells.

Rotary embeddings multiply queries and keys, row by row, with a table that has a row for each token.
Where that was made without the call's data, as a row-major merge of two or three axes, these are
the sides of the grid. Where it was made of a list of positions, the call's values tell: each row
has to be the position on one grid, exactly.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from t5fx.analysis.axis import Axis, Batch, Cat, Merge, Picked, Row, Unit, runs_of
from t5fx.analysis.tokens import Layout, flat
from t5fx.frontend.positions import Positions
from t5fx.graph.sizes import Size, same

#: What Dynamo calls an argument of a model.
_DYNAMO = re.compile(r"^l_(?:kwargs_)?(\w+)_$")


@dataclass(frozen=True)
class Listed(Layout):
    """The layout that a list of positions tells: grid is its sides, as numbers.

    rows: of the list; run: the tokens that these are, which have as many in every such call.
    """

    rows: Row
    run: Axis

    @property
    def positions(self) -> Positions:
        """What the list says in the captured call."""
        assert isinstance(self.rows.positions, Positions)
        return self.rows.positions


def lists_positions(axis: Axis) -> bool:
    """Whether an axis is (partly) the rows of a list of positions."""
    return any(isinstance(row, Row) for row in _rows(axis))


def with_tables(axis: Axis, meeting: Sequence[Axis], *, product: bool) -> Axis:
    """An axis with the tables that it met in an operator, run by run.

    product: the operator multiplies its inputs.
    """
    runs, known = list(runs_of(axis)), runs_of(axis)
    for other in meeting:
        if other is axis:
            continue
        if other == axis:
            found = [run.tables for run in runs_of(other)]
        elif product and _is_table(other):
            rows = _rows(other)
            if not _aligned(runs, rows):
                continue
            found = [(row,) if _tells(row) else () for row in rows]
        else:
            continue
        for i, tables in enumerate(found):
            new = tuple(t for t in dict.fromkeys(tables) if t not in runs[i].tables)
            runs[i] = replace(runs[i], tables=runs[i].tables + new) if new else runs[i]
    if all(map(operator.is_, runs, known)):
        return axis
    return replace(axis, parts=tuple(runs)) if isinstance(axis, Cat) else runs[0]


def packed_layout(query: Axis, key: Axis) -> Layout | str:
    """The layout that tables tell which the queries and the keys met; else why there is none.

    query, key: their tokens, which are the same.
    """
    pairs = list(zip(_unpicked(query), _unpicked(key), strict=True))
    if any(run.grid for run, _ in pairs):
        return ""
    told = [[t for t in q.tables if t in k.tables] for q, k in pairs]
    grids: dict[tuple[int, tuple[Size, ...]], Axis] = {}
    for i, tables in enumerate(told):
        for table in tables:
            if isinstance(table, Row) and isinstance(table.positions, str):
                name = _DYNAMO.sub(r"\1", str(table.made[0]))
                return f"their positions, in the argument '{name}', {table.positions}"
            grids.setdefault((i, _sizes(table)), table)
    if not grids:
        return ""
    if len(grids) > 1:
        shown = " and ".join(" x ".join(map(str, sides)) for _, sides in grids)
        return f"tables of their positions tell of {len(grids)} grids, {shown}; the node takes one"
    ((i, _), table), runs = next(iter(grids.items())), tuple(q for q, _ in pairs)
    before, after = runs[:i], runs[i + 1 :]
    if not isinstance(table, Row):
        return Layout(before, _sides(table), after)
    return Listed(before, _sizes(table), after, table, runs[i])


def _unpicked(axis: Axis) -> tuple[Axis, ...]:
    while isinstance(axis, Picked):
        axis = axis.whole
    return runs_of(axis)


def _rows(axis: Axis) -> tuple[Axis, ...]:
    """The runs of a table's axis, also where columns or the one item of a batch were picked."""
    return tuple(
        inner
        for run in _unpicked(axis)
        for inner in (_rows(run) if isinstance(run, Picked) else (run,))
    )


def _is_table(axis: Axis) -> bool:
    return any(map(_tells, _rows(axis)))


def _tells(row: Axis) -> bool:
    return isinstance(row, Row) or bool(_sides(row))


def _sizes(table: Axis) -> tuple[Size, ...]:
    """Of the grid that a table tells."""
    if isinstance(table, Row):
        assert isinstance(table.positions, Positions)
        return table.positions.sides
    return tuple(side.size for side in _sides(table))


def _sides(row: Axis) -> tuple[Axis, ...]:
    """The sides of the grid of an axis that was made without data; empty where it is none."""
    if not isinstance(row, Merge) or row.data or row.grid:
        return ()
    parts = tuple(part for part in flat(row.parts) if not isinstance(part, Unit))
    told = not any(part.repeats or part.features or isinstance(part, Batch) for part in parts)
    return parts if told and 2 <= len(parts) <= 3 else ()


def _aligned(runs: Sequence[Axis], rows: Sequence[Axis]) -> bool:
    """Whether each run of tokens has as many as the run of a table at its place.

    The product itself proves that all of them are as many, and those of a list of positions are
    counted in each call: one run is left that need not be proved to be as long.
    """
    pairs = list(zip(runs, rows, strict=False))
    if len(runs) != len(rows) or any(run.count != row.count for run, row in pairs):
        return False
    known = [isinstance(row, Row) or same(run.size, row.size) for run, row in pairs]
    return known.count(False) <= 1
