"""Trains every variant of the node and puts the paper's tables beside ours.

`python -m t5fx.bench.ablation`: from the same softmax weights, the small classifier by both
protocols of the paper, and DINOv2-S by alignment. What a variant gave is on disk before the next
one begins; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from t5fx.errors import T5Error

from ..harness.console import step
from ..harness.results import Experiment, Results, Row, here
from ..harness.tables import save_tables
from . import show
from .alignment import Alignment
from .classifier import Classifier
from .rows import SMALL, Variant, variants

SUITE = "ablation"
PARTS = ("classifier", "dinov2")
DOCS = Path("docs")
#: Of each part, so few that all rows take two hours on one core of a CPU.
STEPS = 40

#: (variant, seed) -> what was measured and its value, or None where there is none.
Measure = Callable[[Variant, int], Iterator[tuple[str, float | None]]]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if options.small and options.out == DOCS:
        raise T5Error("--small: expected --out FOLDER, so that tiny runs stay out of the results")
    unknown = sorted(set(options.rows or ()) - {one.name for one in variants()})
    if unknown:
        names = ", ".join(repr(one.name) for one in variants())
        raise T5Error(f"--rows: expected some of {names}; got {', '.join(map(repr, unknown))}")
    console = Console()
    results = Results(options.out / "ablation.csv")
    if not options.render:
        chosen = variants(tuple(options.rows or (SMALL if options.small else ())))
        for part in options.parts:
            run(part, chosen, options, results, console)
    tables = show.tables(results.rows)
    for table in tables:
        table.print(console)
    save_tables(options.out / "ablation.md", *tables)
    show.draw(options.out / "ablation.png", results.rows)
    console.print(f"results, tables, picture: {options.out}/ablation.*", highlight=False)


def run(
    part: str,
    chosen: Sequence[Variant],
    options: argparse.Namespace,
    results: Results,
    console: Console,
) -> None:
    """Measure what is not in the results yet, variant by variant."""
    load = functools.cache(partial(_measure, part, options))  # what is there needs no model
    for variant in chosen:
        case = f"{part}: {variant.name}"
        run = partial(_rows, variant, load, options.seeds)
        experiment = Experiment(SUITE, case, run, mode=f"{_steps(part, options)} steps")
        if results.done(experiment, here()):
            console.print(f"{case}: there already", style="dim")
            continue
        with step(console, case):
            rows = list(experiment.run(experiment))
        results.replace(experiment, rows, here())


def _measure(part: str, options: argparse.Namespace) -> Measure:
    steps = _steps(part, options)
    if part == "classifier":
        return Classifier.load(steps, 100 if options.small else None)
    return Alignment.load(steps, 112) if options.small else Alignment.load(steps)


def _steps(part: str, options: argparse.Namespace) -> int:
    given = {"classifier": options.steps, "dinov2": options.align_steps}[part]
    if given is not None:
        return given
    return 2 if options.small else STEPS


def _rows(
    variant: Variant, load: Callable[[], Measure], seeds: int, experiment: Experiment
) -> Iterator[Row]:
    measure = load()
    for seed in range(seeds):
        for what, value in measure(variant, seed):
            more = {} if value is not None else {"status": "failed", "detail": "it diverged"}
            yield experiment.row(variant.name, f"{what}, seed {seed}", value, **more)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m t5fx.bench.ablation", description=__doc__)
    parser.add_argument("--out", type=Path, default=DOCS, help="the folder to write to")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="all by default")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="names of rows, all by default")
    tiny = f"two steps of {', '.join(SMALL)}, to try it out; needs --out"
    parser.add_argument("--small", action="store_true", help=tiny)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    default = f"{STEPS} by default"
    parser.add_argument("--steps", type=_positive, help=f"of the classifier, {default}")
    parser.add_argument("--align-steps", type=_positive, help=f"of DINOv2-S, {default}")
    parser.add_argument("--render", action="store_true", help="measure nothing, show what is there")
    return parser


def _positive(text: str) -> int:
    steps = int(text)
    if steps < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1 step, got {steps}")
    return steps


if __name__ == "__main__":
    main()
