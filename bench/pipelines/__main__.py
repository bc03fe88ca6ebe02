"""Measures the families whose rows are not of the code as it is, and writes table and page."""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from functools import partial
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any

from t5fx.digest import code_digest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from . import checks, images, packed, videos  # noqa: F401
from .family import FAMILIES
from .table import Row, merge, read, render, write

DOCS = Path("docs")


def measure(name: str) -> Iterator[Row]:
    """The row of one family after each check, its digest only at last. Raises nothing."""
    start = perf_counter()
    family = checks.Family(name)
    row = Row(name, type(family.setup.pipe).__name__, type(family.original).__name__)
    packages = ("torch", "diffusers")
    row.versions = ", ".join(f"{p} {metadata.version(p).partition('+')[0]}" for p in packages)
    _try(row, "converted", lambda: checks.explained(family))
    if not row.converted:
        if row.rewritten == "0":
            row.converted = "-"
        else:
            _try(row, "converted", lambda: {"converted": family.converted and ""})
    if not row.converted:
        for column, check in checks.CHECKS.items():
            _try(row, column, partial(check, family))
            yield row
    row.seconds = f"{perf_counter() - start:.0f}"
    row.digest = code_digest()[:12]
    yield row


def _try(row: Row, column: str, check: Callable[[], Any]) -> None:
    try:
        found = check()
    except Exception as error:
        found = f"no: {checks.message(error)}"
    for name, value in (found if isinstance(found, dict) else {column: found}).items():
        setattr(row, name, str(value))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m t5fx.bench.pipelines", description=__doc__)
    parser.add_argument("--rows", default="*", help="families, as patterns with commas between")
    parser.add_argument("--again", action="store_true", help="also those that are up to date")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of pipelines.csv and .md")
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    rows = read(options.out / "pipelines.csv")
    known = {row.family for row in rows if row.digest == code_digest()[:12]}
    for name in FAMILIES:
        wanted = any(fnmatch(name, pattern) for pattern in options.rows.split(","))
        if wanted and (options.again or name not in known):
            for row in measure(name):
                rows = merge(rows, [row])
                write(options.out / "pipelines.csv", rows)
            print(row, flush=True)
    (options.out / "pipelines.md").write_text(render(merge(rows, [])), encoding="utf-8")


if __name__ == "__main__":
    main()
