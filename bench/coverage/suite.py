"""How much of timm, transformers and diffusers is read right: `python -m t5fx.bench.coverage`.

Runs small models with random weights. For each it counts the attentions that the eager model
executes (`executed`), asks `t5fx.explain` for the ones it finds, and compares both with each other
and with what the model's source says (the lists in `timm` and its neighbours). Where
something is rewritten, the linearized model is run once, too. Rows are merged into
docs/coverage.csv, from which docs/coverage.md is written.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import multiprocessing
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.utils._pytree as pytree
from rich.console import Console
from rich.progress import track

import t5fx
from t5fx.frontend.capture import first_line
from t5fx.reports import REASONS
from t5fx.versions import version_of

from ..harness.files import read_rows, write_rows
from ..harness.results import Experiment, Row
from ..harness.tables import Table
from .cases import Call, Case, outcome_of, parse, show
from .executed import count

LIBRARIES = ("timm", "transformers", "diffusers")
DOCS = Path("docs")
#: Seconds that a model may take.
LIMIT = 120.0
ALL = t5fx.LinearizeConfig(min_tokens=0)


@dataclass
class Finding:
    """What one model gave.

    attentions, look_alikes: executed (`executed.Executed`); found: sites that `explain` reports.
    outcome, expected: sites by kind, as in `cases.Case`. result: "match", "miss", or "error" where
    the model itself could not be built or run. cause: why it is no match. linearized: "yes" where
    the rewritten model ran. seconds: of `explain`. versions: of torch and the library.
    """

    library: str
    model: str
    attentions: int | None = None
    look_alikes: int | None = None
    found: int | None = None
    outcome: str = ""
    expected: str = ""
    result: str = "error"
    cause: str = ""
    linearized: str = ""
    seconds: float | None = None
    versions: str = ""


def cases(library: str) -> tuple[Case, ...]:
    """The models of one library, in the order of their names."""
    found = importlib.import_module(f"{__package__}.{library}").CASES
    return tuple(sorted(found, key=lambda case: case.name.lower()))


def examine(case: Case, fast: bool = False, batch: int | None = None) -> Finding:
    """Run one model; with `fast`, without its linearized form. Raises nothing.

    batch: items of the call, 1 or 2; None: as many as the case has.
    """
    row = Finding(case.library, case.name, expected=show(parse(case.expected)))
    row.versions = ", ".join(
        f"{name} {(version_of(name) or '').partition('+')[0]}" for name in ("torch", case.library)
    )
    torch.manual_seed(0)
    try:
        model, args, kwargs = prepare(case, batch)
        executed, outputs = count(model, args, kwargs)
    except Exception as error:
        row.cause = f"the model itself: {type(error).__name__}: {first_line(error)}"
        return row
    row.attentions, row.look_alikes = executed.attentions, executed.look_alikes
    start = perf_counter()
    try:
        report = t5fx.explain(model, args, kwargs, config=ALL)
    except Exception as error:
        row.result, row.cause = "miss", case.cause or _error("explain", error)
        return row
    row.seconds = round(perf_counter() - start, 1)
    outcome = outcome_of(report)
    row.found, row.outcome = len(report.sites), show(outcome)
    wrong = _compare(row)
    if report.rewritten and not fast:
        try:
            _try_linearized(model, args, kwargs, outputs)
            row.linearized = "yes"
        except Exception as error:
            row.linearized = "no"
            wrong = f"{wrong}; {_error('linearize', error)}".lstrip("; ")
    row.result = "miss" if wrong else "match"
    if wrong:
        row.cause = case.cause or wrong
    return row


def prepare(case: Case, batch: int | None = None) -> Call:
    """The model in eval mode and its call. Parameters that start at zero get other values.

    A bias table that is all zero is one that adds nothing.
    """
    model, args, kwargs = case.call(batch)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.any():
                parameter.normal_(std=0.02)
    return model.eval(), args, kwargs


def _error(what: str, error: Exception) -> str:
    return f"{what}: {type(error).__name__}: {first_line(error)}"


def _compare(row: Finding) -> str:
    """What differs between a row's outcome and what was expected or executed, or ""."""
    wrong = []
    executed, look_alikes = row.attentions or 0, row.look_alikes or 0
    if not executed <= (row.found or 0) <= executed + look_alikes:
        wrong.append(f"found {row.found} sites of {executed} executed")
    missing = parse(row.expected) - parse(row.outcome)
    extra = parse(row.outcome) - parse(row.expected)
    if missing or extra:
        wrong.append(f"expected {show(missing) or 'none'}, got {show(extra) or 'none'}")
    return "; ".join(wrong)


def _try_linearized(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
) -> None:
    """One forward of the linearized model: finite, and of the shapes of the original's outputs."""
    lin = t5fx.linearize(model, args, kwargs, config=ALL)
    with torch.no_grad():
        results = lin(*args, **kwargs)
    before, got = (
        [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
        for tree in (outputs, results)
    )
    wanted, shapes = ([tuple(t.shape) for t in tensors] for tensors in (before, got))
    if shapes != wanted:
        raise t5fx.T5Error(f"expected shapes {wanted}, got {shapes}")
    if any(b.isfinite().all() and not a.isfinite().all() for a, b in zip(got, before, strict=True)):
        raise t5fx.T5Error("expected finite outputs, got others")


def run(
    chosen: Sequence[Case], fast: bool, limit: float, batch: int | None = None
) -> Iterator[Finding]:
    """Rows of the cases, each within `limit` seconds, in a process that is replaced if it fails."""
    worker = None
    for case in chosen:
        if worker is None or not worker.process.is_alive():
            worker = Worker()
        row = worker.examine(case, fast, limit, batch)
        if row is None:
            worker.stop()
            worker = None
            row = Finding(
                case.library, case.name, expected=show(parse(case.expected)), result="miss"
            )
            row.cause = case.cause or f"no answer in {limit:.0f} s, or the process died"
        yield row
    if worker is not None:
        worker.stop()


class Worker:
    """A process of its own for models that hang, crash or leave something behind."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def examine(self, case: Case, fast: bool, limit: float, batch: int | None) -> Finding | None:
        """The row, or None where there is none in `limit` seconds, imports included."""
        try:
            self.pipe.send((case.library, case.name, fast, batch))
            return self.pipe.recv() if self.pipe.poll(limit) else None
        except (EOFError, OSError):
            return None

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def _serve(pipe: Any) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    while True:
        library, name, fast, batch = pipe.recv()
        case = next(case for case in cases(library) if case.name == name)
        pipe.send(examine(case, fast, batch))


def read(path: Path) -> list[Finding]:
    """The findings of a CSV file; none where there is no file."""
    return read_rows(path, Finding) if path.exists() else []


def merge(old: Iterable[Finding], new: Iterable[Finding]) -> list[Finding]:
    """New rows in place of old ones of the same models, by library and name."""
    rows = {(row.library, row.model): row for row in [*old, *new]}
    return sorted(rows.values(), key=lambda r: (LIBRARIES.index(r.library), r.model.lower()))


def write(path: Path, rows: Iterable[Finding]) -> None:
    write_rows(path, rows, Finding)


def render(rows: Sequence[Finding]) -> str:
    """The Markdown page of the rows: totals, then a table a library."""
    parts = ["# Coverage\n", _totals(rows).markdown()]
    for library in LIBRARIES:
        chosen = [row for row in rows if row.library == library]
        if chosen:
            parts.append(_table(library, chosen).markdown())
    return "\n".join(parts)


def totals(rows: Sequence[Finding]) -> dict[str, int]:
    """What there is of each kind, by its name in the table of totals."""
    rewritten = [sum(n for k, n in parse(r.outcome).items() if k not in REASONS) for r in rows]
    return {
        "models": len(rows),
        "attentions": sum(row.attentions or 0 for row in rows),
        "sites found": sum(row.found or 0 for row in rows),
        "sites rewritten": sum(rewritten),
        "models rewritten": sum(map(bool, rewritten)),
        "of them linearized and run": sum(row.linearized == "yes" for row in rows),
        "matches": sum(row.result == "match" for row in rows),
    }


def _totals(rows: Sequence[Finding]) -> Table:
    lines = []
    for library in (*LIBRARIES, "all"):
        counts = totals([row for row in rows if library in (row.library, "all")])
        share = f"{100 * counts['matches'] / max(1, counts['models']):.0f} %"
        lines.append((library, *map(str, counts.values()), share))
    names = {part for row in rows for part in row.versions.split(", ") if part}
    return Table(
        title="Models read exactly right",
        columns=("library", *totals(()), "share"),
        rows=tuple(lines),
        note="Written by `python -m t5fx.bench.coverage`. Small models with random weights. "
        "Attentions: fused calls, and softmaxes between two products of computed tensors, counted "
        "while the eager model runs, without the matcher. A match: as many sites found as the "
        "model's source has, and each rewritten with the right token layout or skipped for the "
        f"right reason. {', '.join(sorted(names))}.",
    )


def _table(library: str, rows: Sequence[Finding]) -> Table:
    return Table(
        title=library,
        columns=(
            *("model", "attentions", "found", "rewritten", "prefix + grid + suffix", "skipped"),
            *("result", "s"),
        ),
        rows=tuple(map(_line, rows)),
        note="Attentions `a (+b)`: b more softmaxes only look like one. Rows that are no match "
        "name the cause and, where the sites differ, what was expected. s: seconds of `explain`.",
    )


def _line(row: Finding) -> tuple[str, ...]:
    outcome = parse(row.outcome)
    layouts = {kind: n for kind, n in outcome.items() if kind not in REASONS}
    skipped = {kind: n for kind, n in outcome.items() if kind in REASONS}
    alike = f" (+{row.look_alikes})" if row.look_alikes else ""
    result = row.result
    if row.result != "match":
        result = f"**{row.result}**: {row.cause}".replace("|", "/")
        if row.result == "miss" and row.outcome != row.expected:
            result += f" (expected {row.expected or 'none'})"
    return (
        row.model,
        "?" if row.attentions is None else f"{row.attentions}{alike}",
        "?" if row.found is None else f"{row.found}",
        f"{sum(layouts.values())}",
        ", ".join(f"{n} x {kind.replace('+', ' + ')}" for kind, n in layouts.items()),
        ", ".join(f"{n} x {kind}" for kind, n in skipped.items()),
        result,
        "" if row.seconds is None else f"{row.seconds:.1f}",
    )


def update(
    libraries: Sequence[str], chosen: Sequence[Case], out: Path, fast: bool, limit: float
) -> Iterator[Finding]:
    """Runs models of the libraries and merges each row into the files in `out` before it goes on.

    Rows of models that the libraries' lists no longer have are dropped at the end.
    """
    rows = read(out / "coverage.csv")
    for row in run(chosen, fast, limit):
        rows = merge(rows, [row])
        _save(out, rows)
        yield row
    known = {(case.library, case.name) for library in libraries for case in cases(library)}
    rows = [r for r in rows if r.library not in libraries or (r.library, r.model) in known]
    _save(out, rows)


def experiments(small: bool = False) -> list[Experiment]:
    """The suite "coverage", a case for each library; two models of each and no files if small."""
    return [Experiment("coverage", name, partial(_measure, name, small)) for name in LIBRARIES]


def _measure(library: str, small: bool, experiment: Experiment) -> Iterator[Row]:
    if importlib.util.find_spec(library) is None:
        reason = f"needs {library}: pip install {library}"
        yield experiment.row("t5fx", "models", status="absent", detail=reason)
        return
    if small:
        rows = run(cases(library)[:2], fast=False, limit=LIMIT)
    else:
        rows = update([library], cases(library), experiment.folder or DOCS, fast=False, limit=LIMIT)
    counts = totals(list(rows))
    for measure, number in counts.items():
        yield experiment.row("t5fx", measure, number, unit="count")
    share = counts["matches"] / counts["models"]
    yield experiment.row("t5fx", "exactly right", share, unit="share", better="higher")


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    console = Console()
    libraries = [options.only] if options.only else LIBRARIES
    chosen = [c for library in libraries for c in cases(library) if fnmatch(c.name, options.match)]
    found = update(libraries, chosen, options.out, options.fast, options.limit)
    for row in track(found, "models", total=len(chosen), console=console):
        text = f"{row.model}: {row.result} {row.outcome} {row.cause}"
        console.print(text, highlight=False, markup=False)
    _totals(read(options.out / "coverage.csv")).print(console)


def _save(folder: Path, rows: Sequence[Finding]) -> None:
    write(folder / "coverage.csv", rows)
    (folder / "coverage.md").write_text(render(rows), encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m t5fx.bench.coverage", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--only", choices=LIBRARIES, help="the models of one library")
    parser.add_argument("--match", default="*", help="models by name, an fnmatch pattern")
    parser.add_argument("--fast", action="store_true", help="do not run linearized models")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds a model may take")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of the results")
    return parser
