"""What each part of a recipe adds, and at which sizes: `python -m t5fx.bench.demos.recipe`.

The demo's DINOv2-S is converted and trained in several ways, each with three seeds of the crops
that it sees, and compared with the original on the held-out photographs at three sizes.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console
from torch import nn

import t5fx

from ..harness.console import step
from ..harness.features import agreement, tokens
from ..harness.tables import Table, machine, mean_and_spread, save_tables
from . import demo, dinov2, photos

SIZES = (224, 518, 1036)

#: By way and size: agreements of class tokens and of patches, one pair a seed.
Found = dict[str, dict[int, list[tuple[float, float]]]]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    console = Console()
    model = dinov2.load_dinov2_small()
    images = {s: photos.centre_crops(tuple(photos.HELD_OUT), s) for s in options.sizes}
    with step(console, "tokens of the original"):
        wanted = {s: tokens(model, dinov2.preprocess(crops)) for s, crops in images.items()}
    converted = demo.convert(model, demo.pair(), console)

    found: Found = {}
    seconds: dict[str, list[float]] = {}

    def look(name: str, lin: nn.Module, took: float) -> None:
        with step(console, f"{name}, {took:.0f} s: looking"):
            for size, crops in images.items():
                got = agreement(wanted[size], tokens(lin, dinov2.preprocess(crops)))
                found.setdefault(name, {}).setdefault(size, []).append(tuple(got))
        seconds.setdefault(name, []).append(took)
        console.print(f"{name}: {[(s, found[name][s][-1]) for s in images]}", highlight=False)

    look("converted", converted, 0.0)
    for seed in range(options.seeds):
        ways(converted, options.steps, seed, look)
    table = recipe_table(found, seconds, options.steps)
    table.print(console)
    save_tables(options.table, table)
    draw(options.out, found)
    console.print(f"table: {options.table}\npicture: {options.out}", highlight=False)


def ways(
    converted: nn.Module, steps: int, seed: int, look: Callable[[str, nn.Module, float], None]
) -> None:
    """Each way from a copy of the converted model; `look(name, model, seconds)` after each."""

    def crops() -> photos.RandomCrops:
        return photos.RandomCrops(photos.OTHERS, demo.TRAIN_SIZE, demo.BATCH, seed)

    align = t5fx.Align(crops(), inputs=dinov2.preprocess, steps=steps)
    hooks: dict[str, t5fx.Align | t5fx.Distill] = {
        "aligned": align,
        "distilled": demo.distillation(crops(), steps),
    }
    for name, hook in hooks.items():
        lin = copy.deepcopy(converted)
        start = perf_counter()
        hook(lin)
        look(name, lin, perf_counter() - start)


def recipe_table(found: Found, seconds: Mapping[str, Sequence[float]], steps: int) -> Table:
    """A row a way: mean and, of several seeds, the standard deviation."""
    sizes = list(next(iter(found.values())))

    seeds = max(len(values) for ways in found.values() for values in ways.values())
    return Table(
        title="What each part of a recipe adds",
        columns=(
            "DINOv2-S",
            *(f"{what}, {size} px" for size in sizes for what in ("class", "patches")),
            "seconds",
        ),
        rows=tuple(
            (
                name,
                *(
                    mean_and_spread(part, 3)
                    for size in sizes
                    for part in zip(*by_size[size], strict=True)
                ),
                f"{statistics.mean(seconds[name]):.0f}",
            )
            for name, by_size in found.items()
        ),
        note=f"Mean cosine with the original's tokens of {len(photos.HELD_OUT)} held-out "
        f"photographs. Trained without labels in {steps} steps of {demo.BATCH} crops of other "
        f"photographs at {demo.TRAIN_SIZE} px: aligned, the new parameters, site by site; "
        "distilled, all parameters, end to end. Mean and standard deviation of "
        f"{seeds} seeds of the crops. Seconds on {machine(torch.get_num_threads())}.",
    )


def draw(path: Path, found: Found) -> None:
    """Both agreements at each size, a line a way, the seeds as dots; as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    sizes = list(next(iter(found.values())))
    places = range(len(sizes))
    for index, (axis, what) in enumerate(
        zip(figure.subplots(1, 2, sharey=True), ("class token", "patches"), strict=True)
    ):
        for way, by_size in found.items():
            values = [[pair[index] for pair in by_size[size]] for size in sizes]
            (line,) = axis.plot(places, [statistics.mean(v) for v in values], label=way)
            for place, some in zip(places, values, strict=True):
                axis.plot([place] * len(some), some, ".", color=line.get_color())
        axis.set_xticks(places, [f"{size} px" for size in sizes])
        axis.set_title(what)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("mean cosine with the original")
    figure.axes[0].legend(frameon=False, loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m t5fx.bench.demos.recipe", description=__doc__)
    docs = Path("docs")
    parser.add_argument("--out", type=Path, default=docs / "recipe.png", help="the picture (PNG)")
    parser.add_argument("--table", type=Path, default=docs / "recipe.md", help="the table")
    parser.add_argument("--steps", type=int, default=100, help="of each training")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--sizes", type=demo.sizes, default=SIZES, help="to look at, in pixels")
    return parser


if __name__ == "__main__":
    main()
