"""`t5fx bench`: run suites, render what they found, compare two runs."""

from __future__ import annotations

import argparse
import gc
import importlib
import itertools
import time
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from t5fx.errors import T5Error

from .harness.results import Experiment, Results, Row, here, read

#: Each suite's module under `t5fx.bench`; it has `experiments(small=False) -> list[Experiment]`.
SUITES = {
    "models": "suites.models",
    "kernels": "suites.kernels",
    "pass": "suites.pass_cost",
    "peers": "suites.peers",
    "quality": "suites.quality",
    "coverage": "coverage.suite",
}

ABOUT = """suites:
  models    timm, transformers and diffusers models: softmax with each SDPA backend against t5
  kernels   the node: Triton on a GPU against its roofline, C++ on a CPU against its products
  pass      what matching and rewriting cost, against nodes and against a cold compile
  peers     what one might take instead of the node, at one attention
  quality   the two demos: agreement and accuracy before, aligned, fine-tuned
  coverage  the attentions of 249 models, read right or not (ten minutes a core and more)

Results are merged into one CSV file; a case that the same code measured on the same machine is not
run again, so that an interrupted run is taken up where it stopped.
"""


def start(options: argparse.Namespace) -> int:
    """Do what `add_arguments` has parsed: 0, or 1 where a case was refused or a ratio got worse.

    2 where results cannot be rendered or compared. Raises `T5Error` for a file that is no results.
    """
    console = Console()
    if options.suite == "report":
        from .report import report

        paths = list(itertools.chain.from_iterable(map(_tables, options.results or [options.out])))
        return report.run(paths, options.out, console, options.readme)
    if options.suite == "compare":
        from .harness import compare

        rerun = partial(_measured_again, options.after, console) if options.rerun else None
        return compare.run(options.before, options.after, console, rerun)
    return run(options, console)


def run(options: argparse.Namespace, console: Console) -> int:
    """Run suites case by case; what a case gave is on disk before the next one begins."""
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.small and not options.out:
        options.parser.error(
            "--small: expected --out FILE, so that tiny runs stay out of the results"
        )
    results = Results(options.out or default_results())
    columns = here()
    bad = 0
    start = time.perf_counter()
    suites = list(SUITES) if options.suite == "all" else [options.suite]
    for suite in suites:
        for experiment in _experiments(suite, options.small):
            if options.only and not any(part in experiment.case for part in options.only):
                continue
            if options.out:
                experiment = replace(experiment, folder=options.out.with_suffix(""))
            if not options.again and results.done(experiment, columns):
                console.print(f"{suite}: {experiment.case}: there already", style="dim")
                continue
            bad += not _one(experiment, results, columns, console)
    seconds = time.perf_counter() - start
    console.print(f"{results.path}: {len(results.rows)} rows; {seconds:.0f} s", highlight=False)
    return 1 if bad else 0


def _experiments(suite: str, small: bool = False) -> list[Experiment]:
    module = importlib.import_module(f"{__package__}.{SUITES[suite]}")
    found: list[Experiment] = module.experiments(small=small)
    return found


def _one(experiment: Experiment, results: Results, columns: dict, console: Console) -> bool:
    """Run one case and keep its rows; whether it was neither refused nor failed."""
    rows = _measured(experiment, columns, console)
    results.replace(experiment, rows, columns)
    return all(row.status in ("ok", "absent") for row in rows)


def _measured(experiment: Experiment, columns: dict, console: Console) -> list[Row]:
    """The rows of one case, or the one that says why it has none."""
    start = time.perf_counter()
    torch.manual_seed(columns["seed"])
    try:
        with console.status(f"{experiment.suite}: {experiment.case}"):
            rows = list(experiment.run(experiment))
    except Exception as error:
        status = "refused" if isinstance(error, T5Error) else "failed"
        detail = f"{type(error).__name__}: {error}".partition("\n")[0]
        if isinstance(error, ModuleNotFoundError):
            status, detail = "absent", f"needs {error.name}: pip install 't5fx[bench]'"
        rows = [experiment.row("", "", status=status, detail=detail)]
        console.print(f"{status}: {detail}", style="red", markup=False, highlight=False)
        if status == "failed":
            traceback.print_exc()
    torch._dynamo.reset()
    gc.collect()  # models, before the next one is built
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    seconds = time.perf_counter() - start
    absent = sum(row.status == "absent" for row in rows)
    said = f"{experiment.suite}: {experiment.case}: {len(rows)} rows, {absent} absent"
    console.print(f"{said}; {seconds:.0f} s", highlight=False)
    return rows


def _measured_again(after: Path, console: Console, suite: str, case: str) -> list[Row]:
    """The rows of a case of the results `after`, measured now.

    Raises `T5Error` where those are not of this machine and code, or the suite has no such case.
    """
    known = next(r for r in read(after) if (r.suite, r.case) == (suite, case))
    torch.set_num_threads(known.threads)
    columns = here()
    for name in ("device", "torch", "code"):
        if getattr(known, name) != columns[name]:
            raise T5Error(
                f"--rerun: expected the {name} {getattr(known, name)} that {after} was measured "
                f"with, got {columns[name]}: run it there"
            )
    found = [one for one in _experiments(suite) if one.case == case] if suite in SUITES else []
    if not found:
        raise T5Error(f"--rerun: expected the case {case} in the suite {suite}, found none")
    return _measured(found[0], columns, console)


def _tables(path: Path) -> list[Path]:
    """The files of results in a folder, or the one that was named."""
    if not path.is_dir():
        return [path]
    return sorted([*path.glob("*.csv"), *path.glob("*.jsonl")])


def default_results() -> Path:
    """Of this kind of machine: docs/bench/cpu.csv, or one named after the GPU."""
    name = "cpu"
    if torch.cuda.is_available():
        name = "-".join(torch.cuda.get_device_name().lower().split())
    return Path("docs/bench") / f"{name}.csv"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suites, `report` and `compare`, as subcommands of `t5fx bench`."""
    parser.epilog = ABOUT
    commands = parser.add_subparsers(dest="suite", required=True, metavar="SUITE")
    for name in (*SUITES, "all"):
        suite = commands.add_parser(name, help="every suite" if name == "all" else "a suite")
        suite.set_defaults(parser=suite)
        suite.add_argument("--out", type=Path, help=f"results (default: {default_results()})")
        suite.add_argument("--only", nargs="+", metavar="PART", help="cases with this in the name")
        suite.add_argument("--again", action="store_true", help="also what is there already")
        suite.add_argument("--small", action="store_true", help="seconds-sized, to try it out")
        suite.add_argument("--threads", type=int, help="of the CPU (default: torch's)")
    report = commands.add_parser("report", help="a page of tables and plots of results")
    where = Path("docs/bench")
    report.add_argument(
        "results",
        type=Path,
        nargs="*",
        help="files of results, or folders of them (default: --out)",
    )
    report.add_argument("--out", type=Path, default=where, help=f"folder (default: {where})")
    report.add_argument("--readme", type=Path, help="also fill in its tables")
    compare = commands.add_parser("compare", help="what got faster or slower from A to B")
    compare.add_argument("before", type=Path, metavar="A")
    compare.add_argument("after", type=Path, metavar="B")
    compare.add_argument(
        "--rerun",
        action="store_true",
        help="measure again what seems worse within its spread: B is of this machine and code",
    )
