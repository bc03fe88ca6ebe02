"""What every suite writes: one tidy table, a row a measurement, beside it what it was taken on."""

from __future__ import annotations

import datetime
import functools
import math
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import t5fx
from t5fx.analysis.clock import device_name
from t5fx.analysis.measure import Spread
from t5fx.digest import code_digest, digest_of
from t5fx.errors import T5Error
from t5fx.versions import version_of

from .files import read_rows, write_rows

#: Packages whose versions the figures depend on, a column each.
PACKAGES = ("torch", "triton", "timm", "transformers", "diffusers")

_BENCH = Path(__file__).parent.parent

#: The rooms of bench/ that the suites' figures come from, and what of them measures nothing.
_MEASURING = ("harness", "suites", "coverage", "demos")
_SHOWING = {"compare", "console", "tables", "units"}

#: The folders of a checkout whose changes change figures.
_CODE = ("t5fx", "patterns", "kernels", "bench")

STATUS = ("ok", "absent", "refused", "failed")


@dataclass(frozen=True)
class Row:
    """One measurement.

    suite, case: what was run; tokens (of the longest attention), batch, dtype, mode ("inference" or
        "training"): of the case.
    contender: who was measured; measure: what, in `unit`; better: "higher", "lower" or "" where
        neither is.
    value, low, high: median, first and third quartile of `rounds` rounds; a count or a share has
        its value alone.
    status: "ok"; "absent", the package or the device is not here; "refused", the check of its
        outputs failed, so that nothing is reported; "failed", it raised. detail says more.
    device, driver, threads: the machine; then versions, the commit, digests of t5fx's code and of
        the harness, the seed and the day.
    """

    suite: str
    case: str
    tokens: int
    batch: int
    dtype: str
    mode: str
    contender: str
    measure: str
    unit: str = ""
    better: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    rounds: int = 1
    status: str = "ok"
    detail: str = ""
    device: str = ""
    driver: str = ""
    threads: int = 0
    torch: str = ""
    triton: str = ""
    timm: str = ""
    transformers: str = ""
    diffusers: str = ""
    commit: str = ""
    code: str = ""
    harness: str = ""
    seed: int = 0
    date: str = ""

    def __post_init__(self) -> None:
        if self.status not in STATUS:
            raise T5Error(f"status: expected one of {', '.join(STATUS)}; got {self.status!r}")
        if self.status == "ok" and (self.value is None or not math.isfinite(self.value)):
            raise T5Error(
                f"{self.case}, {self.contender}, {self.measure}: expected a finite value, got "
                f"{self.value!r}"
            )

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What two runs have in common where they measured the same."""
        return self.suite, self.case, self.contender, self.measure

    @property
    def spread(self) -> Spread:
        """Quartiles and median; without quartiles, the value three times."""
        assert self.value is not None
        low = self.value if self.low is None else self.low
        return Spread(low, self.value, self.value if self.high is None else self.high)


@dataclass(frozen=True)
class Experiment:
    """One case of a suite, run on its own and written at once, so that a run can be taken up again.

    run: returns the rows; it makes them with `row`. Raises T5Error where a check fails.
    folder: for what a case writes beside its rows; None where that is a part of the manual.
    """

    suite: str
    case: str
    run: Callable[[Experiment], Iterable[Row]] = field(compare=False)
    tokens: int = 0
    batch: int = 1
    dtype: str = "float32"
    mode: str = "inference"
    folder: Path | None = None

    def row(
        self, contender: str, measure: str, value: float | Spread | None = None, **more: Any
    ) -> Row:
        """A row of this case. A `Spread` fills value, low and high."""
        if isinstance(value, Spread):
            more |= {"value": value.median, "low": value.low, "high": value.high}
        else:
            more["value"] = value
        own = {name: getattr(self, name) for name in ("suite", "case", *_OF_CASE)}
        return Row(**own, contender=contender, measure=measure, **more)

    def raised(self, contender: str, error: Exception) -> Row:
        """The row of one of several contenders, in place of its latency; the others have theirs."""
        detail = str(error).partition("\n")[0]
        status = "refused" if isinstance(error, T5Error) else "failed"
        if "No available kernel" in detail:  # softmax's backends are not on every device
            status = "absent"
        return self.row(contender, "latency", status=status, detail=detail)


_OF_CASE = ("tokens", "batch", "dtype", "mode")


@functools.cache
def here(seed: int = 0) -> dict[str, Any]:
    """The columns that all rows of one run share."""
    versions = {name: (version_of(name) or "").partition("+")[0] for name in PACKAGES}
    gpu = torch.cuda.is_available()
    return {
        "device": device_name(torch.device("cuda" if gpu else "cpu")),
        "driver": _printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if gpu
        else "",
        "threads": torch.get_num_threads(),
        **versions,
        "commit": _commit(),
        "code": code_digest(),
        "harness": _harness(),
        "seed": seed,
        "date": datetime.date.today().isoformat(),
    }


def _harness() -> str:
    """A digest of what measures, without what only shows."""
    rooms = (_BENCH / name for name in _MEASURING)
    files = [path for room in rooms for path in sorted(room.glob("*.py"))]
    return digest_of(path for path in files if path.stem not in _SHOWING)


def _commit() -> str:
    """Of the checkout that the code is in, "-dirty" where code was changed; else the version."""
    git = ("git", "-C", str(_BENCH.parent))
    commit = _printed(*git, "describe", "--always")
    changed = _printed(*git, "status", "--porcelain", "--", *_CODE)
    return f"{commit}{'-dirty' if changed else ''}" if commit else t5fx.__version__


def _printed(*command: str) -> str:
    """The first line that a command prints, or nothing where it fails."""
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return text.partition("\n")[0].strip()


class Results:
    """A CSV file of rows. Each change replaces the file at once or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = read(path) if path.exists() else []

    def done(self, experiment: Experiment, run: dict[str, Any]) -> bool:
        """Whether this harness measured this code on this machine, and all went well."""
        rows = [r for r in self.rows if (r.suite, r.case) == (experiment.suite, experiment.case)]
        same = ("device", "driver", "threads", *PACKAGES, "code", "harness")
        fits = all(getattr(row, name) == run[name] for row in rows for name in same)
        fits = fits and all(row.mode == experiment.mode for row in rows)
        return bool(rows) and fits and all(row.status in ("ok", "absent") for row in rows)

    def replace(self, experiment: Experiment, rows: Sequence[Row], run: dict[str, Any]) -> None:
        """Puts the rows of a case, each with the columns of the run, in place of earlier ones."""
        key = (experiment.suite, experiment.case)
        kept = [row for row in self.rows if (row.suite, row.case) != key]
        self.rows = kept + [replace(row, **run) for row in rows]
        write(self.path, self.rows)


def read(path: Path) -> list[Row]:
    """The rows of a table that `t5fx bench` wrote, or of the lines (".jsonl") of a lease.

    Raises `T5Error` for a file that is neither.
    """
    if path.suffix == ".jsonl":
        from . import records

        return records.read(path)
    return read_rows(path, Row)


def write(path: Path, rows: Iterable[Row]) -> None:
    """As `files.write_rows`."""
    write_rows(path, rows, Row)


def grouped(rows: Iterable[Row], column: str = "case") -> list[tuple[str, list[Row]]]:
    """(value of a column, its rows), in the order of first appearance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(getattr(row, column), []).append(row)
    return list(groups.items())
