"""Measures what is not measured of the code as it is, and writes the table and its page."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from functools import partial
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any

from t5fx.digest import code_digest

from . import checks
from .family import families
from .table import Row, merge, read, render, write

DOCS = Path("docs")


def measure(name: str, known: Row | None = None, columns: Sequence[str] = ()) -> Iterator[Row]:
    """The row of one family after each check. Raises nothing.

    known: the row as far as it was measured, whose cells are kept; columns: checks to be made,
    instead of all.
    """
    family = checks.Family(name)
    row = known or Row(name, type(family.setup.pipe).__name__, type(family.original).__name__)
    packages = ("torch", "diffusers")
    row.versions = ", ".join(f"{p} {metadata.version(p).partition('+')[0]}" for p in packages)
    row.digest = digest()
    if not row.sites:
        _try(row, "converted", lambda: checks.explained(family))
        if row.rewritten == "0":
            row.converted = "-"
        elif not row.converted:
            _try(row, "converted", lambda: {"converted": family.converted and ""})
        yield row
    for column, check in checks.CHECKS.items() if not is_refused(row) else ():
        if not getattr(row, column) and column in (columns or checks.CHECKS):
            start = perf_counter()
            _try(row, column, partial(check, family))
            row.seconds = f"{float(row.seconds or 0) + perf_counter() - start:.0f}"
            yield row


def digest() -> str:
    """Tells the code that is measured from other code."""
    return code_digest()[:12]


def is_refused(row: Row) -> bool:
    """Whether nothing is converted, so that there is nothing to check."""
    return row.converted == "-" or (row.converted.startswith("no: ") and not row.guidance)


def _try(row: Row, column: str, check: Callable[[], Any]) -> None:
    try:
        found = check()
    except Exception as error:
        found = f"no: {checks.message(error)}"
    for name, value in (found if isinstance(found, dict) else {column: found}).items():
        setattr(row, name, str(value))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m t5fx.bench.pipelines", description=__doc__)
    parser.add_argument("--rows", nargs="+", default=["*"], help="families, by patterns")
    parser.add_argument("--again", action="store_true", help="also what is up to date")
    some = {"choices": checks.CHECKS, "default": (), "metavar": "NAME"}
    names = ", ".join(checks.CHECKS)
    parser.add_argument("--checks", nargs="+", **some, help=f"some of {names}; all by default")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of pipelines.csv and .md")
    options = parser.parse_args(arguments)
    for pattern in options.rows:
        if not any(fnmatch(name, pattern) for name in families()):
            known = ", ".join(map(repr, families()))
            parser.error(f"--rows: expected patterns of {known}; got {pattern!r}")
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    path = options.out / "pipelines.csv"
    for name in families():
        if not any(fnmatch(name, pattern) for pattern in options.rows):
            continue
        kept = {row.family: row for row in read(path) if row.digest == digest()}
        known = None if options.again else kept.get(name)
        for row in measure(name, known, options.checks):
            write(path, merge(read(path), [row]))
            print(row, flush=True)
    (options.out / "pipelines.md").write_text(render(read(path)), encoding="utf-8")


if __name__ == "__main__":
    main()
