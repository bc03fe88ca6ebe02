"""What changed from one table of results to another: `t5fx bench compare before.csv after.csv`.

Only what is a ratio of two measurements of the same run can get worse here ("x", "share"): seconds
and bytes are those of a machine and its mood, and are told where they moved. A loss whose quartiles
overlap counts when a rerun confirms it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console, RenderableType

from t5fx.errors import T5Error
from t5fx.tables import table

from .results import Row, read
from .units import NOTHING, quantity, scale

#: Units of ratios, and the part of the old median by which one may get worse.
RATIOS = ("x", "share")
TOLERANCE = 0.05

#: What can have become of a row, the worst first, each with its style on a terminal.
VERDICTS = {
    "lost": "bold red",  # was measured; now missing, refused or failed
    "worse": "bold red",  # a ratio, by more than the tolerance, beyond the spread or confirmed
    "uncertain": "yellow",  # a ratio, by more than the tolerance but within the spread
    "unconfirmed": "yellow",  # the same, and a rerun did not confirm it
    "moved": "",  # in another unit, beyond the spread
    "absent": "dim",  # was measured; now its package or device is not there
    "better": "green",
    "new": "dim",
    "unchanged": "",
    "unmeasured": "",  # neither before nor after
}
REGRESSIONS = ("lost", "worse")

#: Measures a case of a suite again: its rows, by the names of the suite and the case.
Rerun = Callable[[str, str], Iterable[Row]]

# Columns of a row that say on what and of what code it was taken.
_CIRCUMSTANCES = ("device", "threads", "torch", "code")


@dataclass(frozen=True)
class Change:
    """What became of one row.

    before, after: the rows with the same key, None where there is none; where the whole of a case
        was refused, failed or is absent, `after` is the row that says so.
    verdict: one of VERDICTS.
    gain: the change of the median as a part of the old one, above 0 where that is better or
        neither direction is; 0 where one of the two was not measured.
    """

    before: Row | None
    after: Row | None
    verdict: str
    gain: float = 0.0

    @property
    def row(self) -> Row:
        """The row that says what was measured."""
        row = self.before or self.after
        assert row is not None
        return row


def compare(before: Sequence[Row], after: Sequence[Row]) -> list[Change]:
    """What became of each row, the worst first. Suites that were not run again are left out.

    Raises `T5Error` where the two have nothing in common, or a table measures something twice.
    """
    old, new = _by_key(before, "before"), _by_key(after, "after")
    suites = {row.suite for row in after}
    changes = [
        _change(row, new.get(row.key) or _told_of_the_case(row, after))
        for row in before
        if row.suite in suites
    ]
    told = {change.after for change in changes}  # of whole cases too
    changes += [Change(None, r, "new") for r in after if r.key not in old and r not in told]
    if not {row.key[:2] for row in before} & {row.key[:2] for row in after} or all(
        change.verdict in ("new", "absent", "unmeasured") for change in changes
    ):
        raise T5Error(
            "expected results with a case in common that was measured in both, got none: before "
            f"{_summed_up(before)}; after {_summed_up(after)}"
        )
    return _ranked(changes)


def confirmed(changes: Sequence[Change], rerun: Rerun) -> list[Change]:
    """The changes once more, with the "uncertain" ones decided by a rerun of their cases.

    A loss by more than the tolerance that the rerun shows too is "worse", with the rerun's row as
    `after`; one that it does not show is "unconfirmed". What the rerun refuses, or does not measure
    at all, is "lost".
    """
    cases = dict.fromkeys(c.row.key[:2] for c in changes if c.verdict == "uncertain")
    again = {case: list(rerun(*case)) for case in cases}

    def decided(change: Change) -> Change:
        if change.verdict != "uncertain" or change.before is None:
            return change
        rows = again[change.row.key[:2]]
        same = {row.key: row for row in rows}.get(change.row.key)
        found = _change(change.before, same or _told_of_the_case(change.before, rows))
        if found.verdict in ("worse", "uncertain"):
            return replace(found, verdict="worse")
        if found.verdict in ("unchanged", "better"):
            return replace(change, verdict="unconfirmed")
        return found

    return _ranked(map(decided, changes))


def _ranked(changes: Iterable[Change]) -> list[Change]:
    """The worst first."""
    ranks = {verdict: rank for rank, verdict in enumerate(VERDICTS)}
    return sorted(changes, key=lambda change: (ranks[change.verdict], change.gain))


def _by_key(rows: Sequence[Row], which: str) -> dict[tuple[str, ...], Row]:
    found = {row.key: row for row in rows}
    if len(found) < len(rows):
        ((key, times),) = Counter(row.key for row in rows).most_common(1)
        raise T5Error(
            f"the table {which}: expected one row for each suite, case, contender and measure, got "
            f"{times} of {', '.join(key)}"
        )
    return found


def _told_of_the_case(row: Row, after: Sequence[Row]) -> Row | None:
    """The row that says why there is no row like this one, if any does."""
    told = [r for r in after if r.key[:2] == row.key[:2] and r.status != "ok"]
    mine = [r for r in told if r.contender == row.contender]
    whole = [r for r in told if not r.contender]
    return next(iter(mine + whole), None)


def _change(before: Row, after: Row | None) -> Change:
    if before.status != "ok":
        recovered = after is not None and after.status == "ok"
        return Change(before, after, "new" if recovered else "unmeasured")
    if after is None or after.status in ("refused", "failed"):
        return Change(before, after, "lost")
    if after.status == "absent":
        return Change(before, after, "absent")
    gain = _gain(before, after)
    beyond = not _overlap(before, after)
    if before.unit not in RATIOS or not before.better:
        return Change(before, after, "moved" if beyond else "unchanged", gain)
    if gain < -TOLERANCE - 1e-9:
        return Change(before, after, "worse" if beyond else "uncertain", gain)
    better = beyond and gain > TOLERANCE + 1e-9
    return Change(before, after, "better" if better else "unchanged", gain)


def _gain(before: Row, after: Row) -> float:
    old, new = before.spread.median, after.spread.median
    sign = -1 if before.better == "lower" else 1
    if old == new:
        return 0.0
    return sign * ((new - old) / abs(old) if old else math.copysign(math.inf, new))


def _overlap(before: Row, after: Row) -> bool:
    a, b = before.spread, after.spread
    return max(a.low, b.low) <= min(a.high, b.high)


def _summed_up(rows: Sequence[Row]) -> str:
    cases = len({row.key[:2] for row in rows})
    return f"{cases} cases of {', '.join(sorted({row.suite for row in rows})) or 'no suite'}"


def run(before: Path, after: Path, console: Console, rerun: Rerun | None = None) -> int:
    """Prints what changed between two files. Returns the exit code.

    0: nothing got worse. 1: something did, or is no longer measured. 2: they cannot be compared.

    rerun: measures a case again, on the machine and the code of `after`; see `confirmed`. Without
    it, a loss within the spread fails nothing.
    """
    try:
        old, new = read(before), read(after)
        changes = compare(old, new)
        if rerun is not None:
            changes = confirmed(changes, rerun)
    except T5Error as error:
        console.print(f"compare: {error}", style="bold red", markup=False, highlight=False)
        return 2
    for line in circumstances(old, new):
        console.print(line, style="yellow", markup=False, highlight=False)
    told = [change for change in changes if change.verdict not in ("unchanged", "unmeasured")]
    if told:
        console.print(_table(told))
    console.print(summary(changes), markup=False, highlight=False)
    return int(any(change.verdict in REGRESSIONS for change in changes))


def circumstances(before: Sequence[Row], after: Sequence[Row]) -> list[str]:
    """A line for each suite that is in one table only, and for each thing that is not the same."""
    lines = []
    old, new = ({row.suite for row in rows} for rows in (before, after))
    if old - new:
        lines.append(f"not compared, as it was not run again: {', '.join(sorted(old - new))}")
    if new - old:
        lines.append(f"not compared, as it was not run before: {', '.join(sorted(new - old))}")
    both = old & new
    for name in _CIRCUMSTANCES:
        one, other = (
            ", ".join(sorted({str(getattr(r, name)) or "unknown" for r in rows if r.suite in both}))
            for rows in (before, after)
        )
        if one != other:
            lines.append(f"another {name}: {one} -> {other}")
    return lines


def summary(changes: Iterable[Change]) -> str:
    """How many rows became what, in one line."""
    counts = Counter(change.verdict for change in changes)
    parts = [
        f"{counts[verdict]} {name}"
        for verdict, name in (
            ("better", "better"),
            ("worse", "worse"),
            ("uncertain", "perhaps worse, within the spread (--rerun decides)"),
            ("unconfirmed", "perhaps worse, not confirmed by a rerun"),
            ("unchanged", f"unchanged (within {100 * TOLERANCE:.0f} % or the spread)"),
            ("new", "new"),
            ("lost", "missing, refused or failed"),
            ("absent", "absent now"),
            ("moved", "moved in units that are no ratio"),
            ("unmeasured", "measured in neither"),
        )
        if counts[verdict] or verdict in ("better", "worse", "unchanged", "new", "lost")
    ]
    return "; ".join(parts)


def _table(changes: Sequence[Change]) -> RenderableType:
    rows, styles = [], []
    for change, measures in _merged(changes):
        row = change.row
        shown = ", ".join(measures) if len(measures) < 4 else f"{len(measures)} measures"
        what = (change.verdict, row.suite, row.case, row.contender, shown)
        rows.append((*what, *_before_and_after(change)))
        styles.append(VERDICTS[change.verdict])
    numbers = ("before", "after", "change")
    columns = ("", "suite", "case", "contender", "measure", *numbers)
    return table("", columns, rows, numbers=numbers, styles=styles)


def _merged(changes: Sequence[Change]) -> list[tuple[Change, list[str]]]:
    """Changes with the measures they stand for: what was not measured has one line a contender."""
    lines: dict[tuple[object, ...], tuple[Change, list[str]]] = {}
    for change in changes:
        row, after = change.row, change.after
        whole = change.verdict in ("lost", "absent") or (
            change.verdict == "new" and after is not None and after.status != "ok"
        )
        key = (change.verdict, *row.key[:3], after.detail if after else "") if whole else row.key
        lines.setdefault(key, (change, []))[1].append(row.measure)
    return list(lines.values())


def _before_and_after(change: Change) -> tuple[str, str, str]:
    before, after = change.before, change.after
    values = [r.spread.median for r in (before, after) if r is not None and r.status == "ok"]
    unit = scale(change.row.unit, values)
    told = []
    for row, missing in ((before, NOTHING), (after, "missing")):
        if row is None:
            told.append(missing)
        elif row.status != "ok":
            told.append(": ".join(filter(None, (row.status, row.detail))))
        elif change.verdict in ("lost", "absent"):
            told.append("ok")  # of several measures
        else:
            told.append(quantity(row, unit))
    both = before is not None and after is not None and before.status == after.status == "ok"
    if not both:
        return told[0], told[1], ""
    sign = -1 if change.row.better == "lower" else 1  # the value's own direction
    return told[0], told[1], f"{100 * sign * change.gain:+.1f} %"
