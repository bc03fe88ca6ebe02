"""Tables of results for people: `t5fx bench report results.csv --out docs/bench`.

Writes `report.md`, a page of the manual, and the plots as PNG. Every number and name in them is
read from the rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from t5fx.errors import T5Error

from ..harness.results import PACKAGES, Row, grouped, read
from ..harness.tables import Table
from .pivots import QUARTILES, models_table, not_measured, pivots, remarks, speed_table
from .plot_style import Plot
from .plots import plots
from .promise import Promise

TITLE = "Benchmarks of t5fx"

#: The order of suites; others follow.
SUITES = ("models", "peers", "kernels", "pass", "quality", "coverage")

#: The columns that say what rows of a device were taken on and of.
FACTS = {"driver": "driver", "threads": "threads", **{name: name for name in PACKAGES}}
FACTS |= {
    "commit": "commit",
    "code": "digest of the code",
    "harness": "of the harness",
    "date": "date",
    "seed": "seed",
}


@dataclass(frozen=True)
class Chapter:
    """What one suite says on one device.

    details: numbers for who looks further; remarks: on what was measured; missing: what was not.
    """

    suite: str
    slug: str
    tables: tuple[Table, ...]
    details: tuple[Table, ...]
    remarks: Table | None
    missing: Table | None
    plots: tuple[Plot, ...]
    promise: Promise | None


@dataclass(frozen=True)
class Device:
    """A device, the facts that its rows share, and its suites."""

    name: str
    slug: str
    facts: tuple[tuple[str, str], ...]
    chapters: tuple[Chapter, ...]


def run(paths: Sequence[Path], out: Path, console: Console, readme: Path | None = None) -> int:
    """Writes the report of all the files into the folder `out`. Returns the exit code.

    readme: also fill in the places that it has for results.

    Where several files measured a case on the same device, the later one counts. 2: a file
    cannot be read, there are no rows, or matplotlib is missing.
    """
    try:
        rows, replaced = merged([read(path) for path in paths])
        if not rows:
            names = ", ".join(map(str, paths)) or "no file"
            raise T5Error(f"expected rows of results, got none in {names}")
        devices = [_device(name, own) for name, own in grouped(rows, "device")]
    except T5Error as error:
        console.print(f"report: {error}", style="bold red", markup=False, highlight=False)
        return 2
    intro = [f"From {len(rows)} rows in {', '.join(path.name for path in paths)}."]
    if replaced:
        intro.append(f"{replaced} rows of earlier files are left out: a later file has them again.")
    out.mkdir(parents=True, exist_ok=True)
    shown = [plot for device in devices for chapter in device.chapters for plot in chapter.plots]
    for plot in shown:
        plot.save(out)
    (out / "report.md").write_text(markdown(intro, devices), encoding="utf-8")
    if readme is not None:
        beside = [path.with_suffix("") for path in reversed(paths)]
        fill_all(readme, rows, [*beside, readme.parent / "docs"])
    console.print(f"{out}: report.md and {len(shown)} plots", markup=False, highlight=False)
    return 0


def merged(files: Sequence[Sequence[Row]]) -> tuple[list[Row], int]:
    """The rows of all files, and how many were left out.

    A case counts as the last day measured it, on that day in the last file, whole: what a later
    run refused has no earlier numbers.
    """
    cases: dict[tuple[str, str, str], list[Row]] = {}
    for rows in files:
        own: dict[tuple[str, str, str], list[Row]] = {}
        for row in rows:
            own.setdefault((row.device, row.suite, row.case), []).append(row)
        for key, found in own.items():
            if key not in cases or found[0].date >= cases[key][0].date:
                cases[key] = found
    rows = [row for found in cases.values() for row in found]
    return rows, sum(map(len, files)) - len(rows)


def _device(name: str, rows: Sequence[Row]) -> Device:
    name = name or "unknown device"
    slug = _slug(name)
    suites = dict(grouped(rows, "suite"))
    order = [suite for suite in SUITES if suite in suites]
    order += [suite for suite in suites if suite not in SUITES]
    chapters = tuple(_chapter(suite, f"{slug}-{_slug(suite)}", suites[suite]) for suite in order)
    return Device(name, slug, _facts(rows), chapters)


def _facts(rows: Sequence[Row]) -> tuple[tuple[str, str], ...]:
    """What the rows were taken on; several values where they were not taken at once."""
    facts = []
    for column, name in FACTS.items():
        values = {str(getattr(row, column)) for row in rows} - {""}
        if values:
            facts.append((name, ", ".join(sorted(values))))
    return tuple(facts)


def _chapter(suite: str, slug: str, rows: Sequence[Row]) -> Chapter:
    tables, promise = pivots(rows, suite), None
    main: list[Table] = []
    if suite == "models":
        main, promise = _models_tables(rows), Promise.of(rows)
    return Chapter(
        suite=suite,
        slug=slug,
        tables=tuple(main or tables),
        details=tuple(tables if main else ()),
        remarks=None if main else remarks(rows, suite),
        missing=not_measured(rows, suite),
        plots=tuple(plots(rows, slug)),
        promise=promise,
    )


def _models_tables(rows: Sequence[Row]) -> list[Table]:
    return [models_table(own, f"models, {mode}") for mode, own in grouped(rows, "mode")]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def markdown(intro: Iterable[str], devices: Iterable[Device]) -> str:
    """report.md: all devices and suites, the plots beside it."""
    parts = [f"# {TITLE}", *map(_plain, intro)]
    for device in devices:
        parts.append(f"## {_plain(device.name)}")
        parts.append("; ".join(f"{name} {_plain(value)}" for name, value in device.facts))
        for chapter in device.chapters:
            parts.append(f"### {_plain(chapter.suite)}")
            if chapter.promise is not None:
                parts.append(_plain(str(chapter.promise)))
            parts += [_markdown(table) for table in chapter.tables]
            parts += [f"![{_plain(plot.text)}]({plot.name}.png)" for plot in chapter.plots]
            parts += [_markdown(table) for table in chapter.details]
            for words in filter(None, (chapter.remarks, chapter.missing)):
                # Words begin at the left, as numbers do not.
                left = _markdown(words).replace("---:", "---", len(words.columns) - 1)
                parts.append(left)
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _markdown(table: Table) -> str:
    cells = tuple(tuple(_plain(cell) for cell in row) for row in table.rows)
    columns = tuple(map(_plain, table.columns))
    return replace(table, title=_plain(table.title), columns=columns, rows=cells).markdown()


def _plain(text: str) -> str:
    """Text of others in Markdown: in one line, no HTML, no end of a cell."""
    text = " ".join(text.split())
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", r"\|")


#: Below the README's table of the models.
BRIEFLY = (
    f"{QUARTILES} Softmax is the fastest backend of the model compiled with Inductor; t5 is the "
    'same model compiled with `backend="t5"` and `policy="measure"`, which keeps softmax where '
    "softmax is faster. At most: how many times faster the model would be if attention cost "
    "nothing."
)


def summary(rows: Sequence[Row]) -> str:
    """A block of Markdown for a README: each device's models in brief.

    Raises `T5Error` where there are no rows of the suite `models`.
    """
    models = [row for row in rows if row.suite == "models"]
    if not models:
        raise T5Error(f"expected rows of the suite models, got {len(rows)} of other suites")
    tables = [
        _markdown(speed_table(own, f"Speed{_where(device, own)}")).strip()
        for device, own in grouped(models, "device")
    ]
    return "\n\n".join([*tables, _plain(f"{BRIEFLY} {_when(models)}")]) + "\n"


def _where(device: str, rows: Sequence[Row]) -> str:
    """What a title says of the machine; of a CPU also how many of its cores worked."""
    facts = [f", on {device or 'unknown device'}"]
    kinds = {(row.threads if not row.driver else 0, row.torch, row.dtype) for row in rows}
    for threads, torch, dtype in sorted(kinds)[:1] if len(kinds) == 1 else []:
        facts += [f"{threads} threads"] if threads else []
        facts += [f"torch {torch}", dtype]
    return ", ".join(facts)


def _when(rows: Sequence[Row]) -> str:
    days, commits = ({getattr(row, name) for row in rows} for name in ("date", "commit"))
    return f"Measured on {', '.join(sorted(days))}, at commit {', '.join(sorted(commits))}."


def fill_all(readme: Path, rows: Sequence[Row], folders: Sequence[Path]) -> None:
    """Puts what was measured into the README: nothing of it is typed.

    rows: of all suites; folders: where the recipe and the coverage suite may have written their
    tables; the first that has one counts.

    Raises `T5Error` where the README has no place for it, or a table is not there.
    """
    fill(readme, "speed", summary(rows))
    fill(readme, "quality", _table_of("recipe.md", folders))
    coverage = _table_of("coverage.md", folders).removeprefix("# Coverage")
    fill(readme, "coverage", coverage.partition("**timm**")[0])  # the totals alone


def _table_of(name: str, folders: Sequence[Path]) -> str:
    for path in (folder / name for folder in folders):
        if path.exists():
            return path.read_text(encoding="utf-8")
    raise T5Error(f"expected {name} in {' or '.join(map(str, folders))}, found no such file")


def fill(readme: Path, name: str, text: str) -> None:
    """Puts text between `<!-- name -->` and `<!-- /name -->` in place of what is there.

    Raises `T5Error` where the two are not there, once each and in this order.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    old = readme.read_text(encoding="utf-8")
    if old.count(begin) != 1 or old.count(end) != 1 or old.index(begin) > old.index(end):
        raise T5Error(f"{readme}: expected {begin} and later {end}, once each")
    head, tail = old.partition(begin)[0], old.partition(end)[2]
    readme.write_text(f"{head}{begin}\n{text.strip()}\n{end}{tail}", encoding="utf-8")
