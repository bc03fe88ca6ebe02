"""Agreement against speed of a DINOv2-S at high resolution: `python -m t5fx.bench.demos.frontier`.

`t5fx.search` compares what each attention may become, on photographs that are not held out. The
choices on its frontier, untrained, are then measured whole: agreement on the held-out photographs,
and the time of one image, compiled, against the softmax model compiled with Inductor.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

import t5fx
from t5fx.analysis.measure import Spread

from ..harness.console import step
from ..harness.features import Agreement, agreement, tokens
from ..harness.tables import Table, machine, save_tables
from ..harness.timing import time_models
from . import demo, dinov2, photos

SIZE = 1036
#: Photographs that the search compares on, of those that are not held out.
SEARCHED = ("coffee", "flower")
CANDIDATES = (
    {"neighborhood": 5, "coarse": 8},
    {"neighborhood": 5, "coarse": 12},
    {"neighborhood": 7, "coarse": 16},
)


@dataclass(frozen=True)
class Measured:
    """A choice: what its sites became, how near it is, and how many times faster."""

    what: str
    agreement: Agreement
    speed: Spread


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    console = Console()
    model = dinov2.load_dinov2_small()
    images = photos.centre_crops(tuple(photos.HELD_OUT), options.size)
    held_out = dinov2.preprocess(images)
    with step(console, f"searching at {options.size} px"):
        found = t5fx.search(
            model,
            (held_out[:1],),
            data=list(photos.centre_crops(SEARCHED, options.size).split(1)),
            inputs=dinov2.preprocess,
            candidates=CANDIDATES,
            compare=demo.class_and_patches,
            cost=options.cost,
            points=options.points,
            loss=2.0,
        )
    print(found)
    measured = measure(model, found, held_out, console)
    table = frontier_table(measured, options.size)
    table.print(console)
    save_tables(options.table, table)
    draw(options.out, measured, options.size)
    console.print(f"table: {options.table}\npicture: {options.out}", highlight=False)


def measure(
    model: torch.nn.Module, found: t5fx.SearchResult, images: torch.Tensor, console: Console
) -> list[Measured]:
    """Every choice with a site rewritten, from the cheapest, on images [B, 3, H, W]."""
    with step(console, "tokens of the original"):
        original = tokens(model, images)
    converted, agreements = {}, {}
    for point in found.points:
        if point.rewritten:
            what = described(point.config, len(model.get_submodule("blocks")))
            with step(console, f"converted: {what}"):
                lin = t5fx.linearize(model, (images[:1],), config=point.config).eval()
                agreements[what] = agreement(original, tokens(lin, images))
                converted[what] = lin
    with step(console, "compiling and timing") as say:
        models = [("softmax", model), *converted.items()]
        timing = time_models(models, images[:1], say=say)
    return [
        Measured(what, agreements[what], timing.speedup(index))
        for index, what in enumerate(converted, start=1)
    ]


def described(config: t5fx.LinearizeConfig, sites: int) -> str:
    """`8 of 5 x 5, 8 x 8 cells; 4 softmax`."""
    kinds = Counter((f["neighborhood"], f["coarse"]) for f in config.overrides.values())
    text = [
        f"{count} of {side} x {side}, {cells} x {cells} cells"
        for (side, cells), count in sorted(kinds.items())
    ]
    left = sites - kinds.total()
    return "; ".join([*text, f"{left} softmax"] if left else text)


def frontier_table(measured: Sequence[Measured], size: int) -> Table:
    """A row a choice."""
    return Table(
        title=f"What a search finds at {size} px",
        columns=("the 12 attentions", "class", "patches", "times faster"),
        rows=tuple(
            (
                one.what,
                f"{one.agreement.class_token:.3f}",
                f"{one.agreement.patches:.3f}",
                f"{one.speed.median:.2f} ({one.speed.low:.2f}-{one.speed.high:.2f})",
            )
            for one in measured
        ),
        note=f"Mean cosine with the original's tokens of {len(photos.HELD_OUT)} held-out "
        f"photographs, untrained; the sites were compared on {len(SEARCHED)} others. Times faster: "
        "one image, end to end, compiled with backend='t5' against the original compiled with "
        "Inductor, median and quartiles of interleaved rounds, float32, on "
        f"{machine(torch.get_num_threads())}.",
    )


def draw(path: Path, measured: Sequence[Measured], size: int) -> None:
    """Agreement of class tokens and patches against speed, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    speeds = [1.0, *(one.speed.median for one in measured)]
    for what, colour, values in (
        ("class token", "#0072B2", [1.0, *(one.agreement.class_token for one in measured)]),
        ("patches", "#D55E00", [1.0, *(one.agreement.patches for one in measured)]),
    ):
        points = sorted(zip(speeds, values, strict=True))
        axes.plot(*zip(*points, strict=True), "o-", color=colour, label=what)
    axes.annotate("softmax", (1.0, 1.0), textcoords="offset points", xytext=(6, 6))
    axes.margins(y=0.1)
    axes.set(
        xlabel="one image, times faster than softmax",
        ylabel="mean cosine with the original",
        title=f"DINOv2-S at {size} px, untrained: which attentions become what",
    )
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m t5fx.bench.demos.frontier", description=__doc__
    )
    docs = Path("docs")
    parser.add_argument("--out", type=Path, default=docs / "frontier.png", help="the picture (PNG)")
    parser.add_argument("--table", type=Path, default=docs / "frontier.md", help="the table")
    parser.add_argument("--size", type=int, default=SIZE, help="image side in pixels")
    parser.add_argument("--points", type=int, default=6, help="choices to build and measure")
    parser.add_argument("--cost", choices=("flops", "measure"), default="measure")
    return parser


if __name__ == "__main__":
    main()
