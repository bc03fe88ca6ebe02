"""What converting saves in diffusion transformers of real sizes: `python -m t5fx.bench.diffusion`.

Counts the FLOPs of a step on the meta device, softmax against TTT nodes, and writes
`docs/diffusion-flops.csv` and `.md`. Where there is a CUDA device it then times, in bfloat16, each
model compiled with softmax by every SDPA backend against the same compiled with backend="t5".
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from ..harness.console import step
from ..harness.files import read_rows, write_rows
from ..harness.results import Experiment, Results, Row, grouped, here
from ..harness.tables import Table
from ..suites.models import EAGER, Bench
from ..suites.zoo import Entry
from .counting import Count, count
from .sizes import Case, cases

DOCS = Path("docs")
TITLE = "FLOPs of diffusion transformers"
BATCHES = (1, 2)
#: The speed-ups of SD3.5 that the method's authors measured, by size (arXiv 2605.02772).
PAPER = {("SD3.5-Medium", "1024 px"): 1.32, ("SD3.5-Medium", "2048 px"): 1.47}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.tiny and options.out == DOCS:
        parser.error("--tiny measures nothing that belongs in docs/: give --out another folder")
    console = Console(highlight=False)
    chosen = [case for case in cases(options.tiny) if _is_chosen(case, options.models)]
    path = options.out / "diffusion-flops.csv"
    before = read_rows(path, Count) if path.exists() else []
    counts = {(one.model, one.size): one for one in before}
    for case in () if options.render else chosen:
        with step(console, f"counting {case.name}"):
            counts[case.model, case.size] = count(case)
        write_rows(path, counts.values(), Count)
    results = Results(options.out / "diffusion-times.csv")
    if (torch.cuda.is_available() or options.tiny) and not options.render:
        for case in chosen:
            for batch in BATCHES[: 1 if options.tiny else None]:
                with step(console, f"timing {case.name}, batch {batch}"):
                    measure(case, batch, results)
    tables = [flops_table(list(counts.values()))]
    if results.rows:
        tables.append(times_table(results.rows))
    for table in tables:
        table.print(console)
    texts = [f"# {TITLE}\n", *(table.markdown() for table in tables)]
    path.with_suffix(".md").write_text("\n".join(texts), encoding="utf-8")


def _is_chosen(case: Case, models: Sequence[str] | None) -> bool:
    return models is None or case.model in models


def measure(case: Case, batch: int, results: Results) -> None:
    """Time a model, unless the same code did on this machine; what fails is a row that says so."""
    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu else torch.float32
    entry = Entry(case.name, partial(case.build, batch, False), case.options)
    experiment = Experiment(
        "diffusion",
        f"{case.name}, batch {batch}",
        lambda experiment: Bench(entry, experiment, gpu, dtype).rows(),
        batch=batch,
        dtype=str(dtype).removeprefix("torch."),
    )
    if results.done(experiment, here()):
        return
    try:
        rows = list(experiment.run(experiment))
    except Exception as error:  # the others can still be timed
        rows = [experiment.raised("", error)]
    results.replace(experiment, rows, here())


def flops_table(counts: Sequence[Count]) -> Table:
    order = {(case.model, case.size): n for n, case in enumerate(cases())}
    models = list(dict.fromkeys(case.model for case in cases()))
    ranked = sorted(
        counts, key=lambda one: (models.index(one.model), order.get((one.model, one.size), 0))
    )
    return Table(
        title="A step of diffusion transformers, counted",
        columns=(
            *("model", "size", "tokens", "parameters", "new", "nodes"),
            *("TFLOP softmax", "TFLOP t5", "attention's share", "ratio", "bound", "paper"),
        ),
        rows=tuple(map(_counted, ranked)),
        note="Counted on the meta device, for one forward pass at batch 1: the products of "
        "matrices and the convolutions of the model as diffusers has it; a multiply-add is two "
        "FLOPs. The nodes are those of the default configuration, near attention included, without "
        "their convolutions and norms; of the attentions, those become nodes that then cost less. "
        "Attention's share is that of the products in softmax attention, cross-attention included. "
        "The ratio is FLOPs with softmax over FLOPs with nodes, the bound is that of nodes that "
        "cost nothing. The paper's column has the speed-up in time that the method's authors "
        "measured for SD3.5 (arXiv 2605.02772). A ratio of FLOPs is a speed-up only where the "
        "kernels of both kinds reach the same share of a GPU's peak.",
    )


def _counted(one: Count) -> tuple[str, ...]:
    paper = PAPER.get((one.model, one.size))
    return (
        one.model,
        one.size,
        f"{one.tokens:,}",
        f"{one.parameters / 1e9:.2f} B",
        f"{one.new / 1e6:.1f} M",
        f"{one.rewritten} of {one.sites}",
        f"{one.softmax / 1e12:.2f}",
        f"{one.t5 / 1e12:.2f}",
        f"{100 * one.share:.0f} %",
        f"{one.ratio:.2f}x",
        f"{one.bound:.2f}x",
        "" if paper is None else f"{paper:.2f}x",
    )


def times_table(rows: Sequence[Row]) -> Table:
    return Table(
        title="A step of diffusion transformers, compiled and timed",
        columns=("case", "softmax", "ms", "GiB", "t5", "ms", "GiB", "speed-up"),
        rows=tuple(line for case, own in grouped(rows) for line in _timed(case, own)),
        note=f"Medians, {rows[0].dtype}, on {rows[0].device}; peak memory beyond weights and "
        "inputs. Softmax by the fastest SDPA backend, t5 by the faster of its settings; both "
        "compiled.",
    )


def _timed(case: str, rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    memory = {r.contender: r.value or 0.0 for r in rows if r.measure == "peak memory"}
    latency = {r.contender: r.value for r in rows if r.measure == "latency" and r.value}
    best = []
    for kind in ("softmax", "t5"):
        own = {n: v for n, v in latency.items() if n.startswith(kind) and n != EAGER}
        if not own:
            why = next((row.detail for row in rows if row.status != "ok"), "not measured")
            yield (case, why, *[""] * 6)
            return
        best.append(min(own, key=lambda name: own[name]))
    cells = [
        (name.partition(", ")[2], f"{1e3 * latency[name]:.3g}", f"{memory[name] / 2**30:.2f}")
        for name in best
    ]
    yield (case, *cells[0], *cells[1], f"{latency[best[0]] / latency[best[1]]:.2f}x")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m t5fx.bench.diffusion", description=__doc__)
    parser.add_argument("--out", type=Path, default=DOCS, help="the folder to write to")
    names = sorted({case.model for case in cases()})
    parser.add_argument(
        "--models",
        nargs="+",
        choices=names,
        metavar="NAME",
        help=f"all by default: {', '.join(names)}",
    )
    tiny = "small models, timed on a CPU too, to try it out; needs --out"
    parser.add_argument("--tiny", action="store_true", help=tiny)
    parser.add_argument("--render", action="store_true", help="measure nothing, show what is there")
    return parser


if __name__ == "__main__":
    main()
