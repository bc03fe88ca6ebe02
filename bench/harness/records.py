"""What a lease found: one JSON object a line, on disk before the next thing begins.

Lines are of three kinds. "run": the columns that the rows after it share (`results.here`) and the
assembler they were measured with. "row": one `results.Row` of an item, without those columns.
"begin" and "end": that an item was taken up, and how it ended. A line that was cut off is skipped.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from t5fx.errors import T5Error

from .results import PACKAGES, Row

#: How items end; of the first two nothing is left to do.
ENDS = ("ok", "absent", "refused", "failed", "out of time")
#: Columns whose change makes all results old ones.
IDENTITY = ("device", "driver", *PACKAGES, "code")
#: Of a row's columns those that a whole run shares.
SHARED = ("device", "driver", "threads", *PACKAGES, "commit", "code", "harness", "seed", "date")
DEFAULTS = {f.name: f.default for f in fields(Row)}


@dataclass
class Outcome:
    """Of one item: its rows, how it ended ("" while it runs), and the seconds it took."""

    rows: list[Row] = field(default_factory=list)
    older: list[Row] = field(default_factory=list)
    end: str = ""
    seconds: float = 0.0

    @property
    def done(self) -> bool:
        return self.end in ENDS[:2]

    def shown(self) -> list[Row]:
        """Its rows, and of an earlier attempt what a later one that went wrong did not reach."""
        if self.done:
            return self.rows
        again = {row.key for row in self.rows}
        return [r for r in self.older if r.status == "ok" and r.key not in again] + self.rows


class Records:
    """The file of a lease, opened to append; safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns: dict[str, Any] = {}
        self.outcomes: dict[tuple[str, str], Outcome] = {}
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
        self._file = path.open("ab")
        if not whole:  # the last line was cut off
            self._file.write(b"\n")

    def start(self, columns: dict[str, Any], **more: Any) -> None:
        """Begin a run on a machine; what an earlier run found there with this code counts."""
        with self._lock:
            self.columns = columns
            self.outcomes = outcomes(self.path, columns)
            self._write({"kind": "run", "time": time.time(), "columns": columns, **more})

    def begin(self, step: str, item: str) -> None:
        with self._lock:
            self._take({"kind": "begin", "step": step, "item": item})

    def row(self, step: str, item: str, row: dict[str, Any]) -> None:
        """row: the columns of a `Row` that are not shared."""
        with self._lock:
            self._take({"kind": "row", "step": step, "item": item, "row": row})

    def end(self, step: str, item: str, end: str, seconds: float) -> None:
        said = {"end": end, "seconds": round(seconds, 2)}
        with self._lock:
            self._take({"kind": "end", "step": step, "item": item, **said})

    def outcome(self, step: str, item: str) -> Outcome:
        with self._lock:
            return self.outcomes.get((step, item), Outcome())

    def rows(self) -> list[tuple[str, Row]]:
        """(step, row) of all that counts."""
        with self._lock:
            return [(s, row) for (s, _), o in self.outcomes.items() for row in o.shown()]

    def close(self) -> None:
        self._file.close()

    def _take(self, line: dict[str, Any]) -> None:
        _apply(self.outcomes, line, self.columns)
        self._write(line)

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        self._file.flush()
        os.fdatasync(self._file.fileno())


def columns_of(row: Row) -> dict[str, Any]:
    """A row as it is written: without the shared columns and those left as they are."""
    own = {name: value for name, value in asdict(row).items() if name not in SHARED}
    needed = ("suite", "case", "contender", "measure")
    return {n: v for n, v in own.items() if n in needed or v != DEFAULTS.get(n)}


def outcomes(path: Path, columns: dict[str, Any] | None) -> dict[tuple[str, str], Outcome]:
    """By (step, item), of all runs with the same `IDENTITY`; of the last run's where none is given.

    Raises `T5Error` for a file that is not a lease's.
    """
    if not path.exists():
        return {}
    lines = list(_lines(path))
    heads = [line for line in lines if line["kind"] == "run"]
    if lines and not heads:
        raise T5Error(f"{path}: expected the lines of a lease, got none of the kind 'run'")
    if columns is None:
        columns = heads[-1]["columns"] if heads else {}
    found: dict[tuple[str, str], Outcome] = {}
    head: dict[str, Any] | None = None
    for line in lines:
        if line["kind"] == "run":
            same = all(line["columns"].get(name) == columns.get(name) for name in IDENTITY)
            head = line["columns"] if same else None
        elif head is not None:
            _apply(found, line, head)
    return found


def read(path: Path) -> list[Row]:
    """All rows of a lease's file, those of its last machine and code."""
    return [row for outcome in outcomes(path, None).values() for row in outcome.shown()]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # it was cut off
            continue
        if isinstance(line, dict) and line.get("kind") in ("run", "row", "begin", "end"):
            yield line


def _apply(
    found: dict[tuple[str, str], Outcome], line: dict[str, Any], columns: dict[str, Any]
) -> None:
    key = line["step"], line["item"]
    if line["kind"] == "begin":
        before = found.pop(key, Outcome())  # and so last in order
        found[key] = Outcome(older=before.shown())
        return
    outcome = found.setdefault(key, Outcome())
    if line["kind"] == "row":
        known = {n: v for n, v in (columns | line["row"]).items() if n in DEFAULTS}
        base = {"tokens": 0, "batch": 1, "dtype": "", "mode": ""}
        row = Row(**base | known)
        outcome.rows = [r for r in outcome.rows if r.key != row.key] + [row]
    else:
        outcome.end, outcome.seconds = line["end"], line["seconds"]
