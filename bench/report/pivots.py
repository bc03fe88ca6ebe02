"""The tables of a report: rows of results pivoted, nothing in them that the rows do not say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..harness.results import Row, grouped
from ..harness.tables import Table
from ..harness.units import MILLISECONDS, NOTHING, Scale, digits, number, quantity, scale

EVERY, MEASURED = "t5, every site", "t5, measured"
BOUND = "attention removed"

QUARTILES = "Medians, first to third quartile in brackets."
#: Below the main table of the models.
NOTE = (
    f"{QUARTILES} Tokens: of the longest attention. Speed-ups are over the fastest backend of the "
    "compiled softmax, round by round; the bound is what would be reached if attention cost "
    "nothing. Sites rewritten, share of the bound and peak memory (over that of the best softmax) "
    f'are those of "{MEASURED}".'
)


class Cells:
    """The rows of one case, looked up by contender and measure."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)
        self._found = {(row.contender, row.measure): row for row in self.rows}

    def get(self, contender: str, measure: str) -> Row | None:
        """The row, if it is "ok"."""
        row = self._found.get((contender, measure))
        return row if row is not None and row.status == "ok" else None

    def best_softmax(self) -> Row | None:
        """The latency of the fastest backend of the compiled softmax."""
        rows = [row for row in self.rows if row.measure == "latency" and row.status == "ok"]
        compiled = [
            r for r in rows if r.contender.startswith("softmax") and "eager" not in r.contender
        ]
        return min(compiled, key=lambda row: row.spread.median, default=None)

    def cell(
        self, contender: str, measure: str, of: Scale | None = None, *, unit: bool = True
    ) -> str:
        """The value; or the status of a contender that has none; or a dash."""
        row = self.get(contender, measure)
        if row is not None:
            return quantity(row, of) if unit else number(row, of)
        told = [r.status for r in self.rows if r.contender == contender and r.status != "ok"]
        whole = [r.status for r in self.rows if not r.contender and r.status != "ok"]
        return next(iter(told + whole), NOTHING)

    def ratio(self, contender: str, other: str | None, measure: str) -> str:
        """One contender's value over another's."""
        one, two = self.get(contender, measure), self.get(other or "", measure)
        if one is None or two is None or not two.value:
            return NOTHING
        return f"{digits(one.spread.median / two.spread.median)}x"


def models_table(rows: Sequence[Row], title: str) -> Table:
    """The main table of the suite `models`: rows of one device and one mode."""
    lines = []
    for case, own in grouped(rows):
        cells, tokens = Cells(own), max(row.tokens for row in own)
        softmax = cells.best_softmax()
        memory = cells.ratio(MEASURED, softmax and softmax.contender, "peak memory")
        lines.append(
            (
                case.removesuffix(f", {own[0].mode}"),
                f"{tokens}" if tokens else NOTHING,
                number(softmax, MILLISECONDS) if softmax else NOTHING,
                softmax.contender.removeprefix("softmax, ") if softmax else NOTHING,
                cells.cell(EVERY, "latency", MILLISECONDS, unit=False),
                cells.cell(EVERY, "speed-up"),
                cells.cell(MEASURED, "speed-up"),
                _sites(cells),
                cells.cell(BOUND, "speed-up"),
                cells.cell(MEASURED, "share of bound"),
                memory,
            )
        )
    return without_empty_columns(
        Table(
            title,
            (
                *(
                    "case",
                    "tokens",
                    "best softmax, ms",
                    "backend",
                    f"{EVERY}, ms",
                    f"{EVERY}: speed-up",
                ),
                *(f"{MEASURED}: speed-up", "sites rewritten", "bound", "share of bound", "memory"),
            ),
            tuple(sorted(lines, key=lambda line: int(line[1]) if line[1].isdigit() else 0)),
            NOTE,
        )
    )


def speed_table(rows: Sequence[Row], title: str) -> Table:
    """The suite `models` in brief, a row a case: rows of one device."""
    lines = []
    for case, own in grouped(rows):
        cells, softmax = Cells(own), Cells(own).best_softmax()
        lines.append(
            (
                case,
                f"{max(row.tokens for row in own)}",
                number(softmax, MILLISECONDS) if softmax else NOTHING,
                cells.cell(MEASURED, "latency", MILLISECONDS, unit=False),
                cells.cell(MEASURED, "speed-up"),
                cells.cell(BOUND, "speed-up"),
            )
        )
    columns = ("case", "tokens", "softmax, ms", "t5, ms", "times faster", "at most")
    return Table(title, columns, tuple(sorted(lines, key=lambda line: int(line[1]))))


def _sites(cells: Cells) -> str:
    rewritten, sites = (cells.get(MEASURED, what) for what in ("sites rewritten", "sites"))
    if rewritten is None:
        return NOTHING
    return number(rewritten) + (f" of {number(sites)}" if sites else "")


def without_empty_columns(table: Table) -> Table:
    """Leaves out columns after the first in which every cell is a dash."""
    columns = list(zip(*table.rows, strict=True))
    kept = [i for i, cells in enumerate(columns) if not i or any(c != NOTHING for c in cells)]
    return replace(
        table,
        columns=tuple(table.columns[i] for i in kept),
        rows=tuple(tuple(row[i] for i in kept) for row in table.rows),
    )


def pivots(rows: Sequence[Row], title: str) -> list[Table]:
    """Any suite: a table of cases and contenders for each measure that several contenders have.

    The measures that each case has of one contender alone, as a library's counts, are the columns
    of one table.
    """
    measured = [row for row in rows if row.status == "ok"]
    measures = list(dict.fromkeys(row.measure for row in measured))
    rivals = [m for m in measures if _most_contenders(r for r in measured if r.measure == m) > 1]
    alone = [measure for measure in measures if measure not in rivals]
    tables = [_rivals(rows, measure, title) for measure in rivals]
    return tables + ([_alone(rows, alone, title)] if alone else [])


def _most_contenders(rows: Iterable[Row]) -> int:
    return max(len({row.contender for row in own}) for _, own in grouped(rows))


def _rivals(rows: Sequence[Row], measure: str, title: str) -> Table:
    own = [row for row in rows if row.measure == measure]
    contenders = list(dict.fromkeys(row.contender for row in own if row.status == "ok"))
    lines = []
    for case, mine in grouped(rows):
        ok = [row for row in mine if row.measure == measure and row.status == "ok"]
        of = scale(ok[0].unit, [row.spread.median for row in ok]) if ok else None
        cells = Cells(mine)
        line = [cells.cell(contender, measure, of) for contender in contenders]
        if any(cell != NOTHING for cell in line):
            lines.append((case, *line))
    better = next((f"; {row.better} is better" for row in own if row.better), "")
    note = QUARTILES if any(row.low is not None for row in own) else ""
    return Table(f"{title}: {measure}{better}", ("case", *contenders), tuple(lines), note)


def _alone(rows: Sequence[Row], measures: Sequence[str], title: str) -> Table:
    lines = []
    for case, own in grouped(row for row in rows if row.measure in measures):
        by_contender: dict[str, list[Row]] = {}
        for row in own:
            by_contender.setdefault(row.contender, []).append(row)
        for contender, mine in by_contender.items():
            cells = Cells(mine)
            values = (cells.cell(contender, measure) for measure in measures)
            lines.append((case, contender, *values))
    return without_empty_columns(Table(title, ("case", "contender", *measures), tuple(lines)))


def not_measured(rows: Sequence[Row], title: str) -> Table | None:
    """What has no value, and why."""
    told = [(row, (row.status, row.detail or "no reason given")) for row in rows]
    lines = _said([one for one in told if one[0].status != "ok"], rows)
    columns = ("case", "contender", "measure", "status", "why")
    return Table(f"{title}: not measured, and why", columns, lines) if lines else None


def remarks(rows: Sequence[Row], title: str) -> Table | None:
    """What is said of rows that were measured."""
    lines = _said([(r, (r.detail,)) for r in rows if r.status == "ok" and r.detail], rows)
    columns = ("case", "contender", "measure", "remark")
    return Table(f"{title}: remarks", columns, lines) if lines else None


def _said(
    told: Iterable[tuple[Row, tuple[str, ...]]], rows: Sequence[Row]
) -> tuple[tuple[str, ...], ...]:
    """One line for all the measures and cases of a contender of which the same is said."""
    measures: dict[tuple[str, ...], list[str]] = {}
    for row, said in told:
        measures.setdefault((row.case, row.contender or "all", *said), []).append(row.measure)
    cases: dict[tuple[str, ...], list[str]] = {}
    for (case, contender, *said), of in measures.items():
        what = ", ".join(filter(None, of)) or "all"
        cases.setdefault((contender, what, *said), []).append(case)
    count = len({row.case for row in rows})
    return tuple(
        (f"all {count} cases" if len(own) == count > 1 else "; ".join(own), *line)
        for line, own in cases.items()
    )
