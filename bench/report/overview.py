"""Agreement against speed, before and after training: `python -m t5fx.bench.report.overview`.

Draws the README's picture from what the demo, the recipe and the frontier wrote into `docs`; it
measures nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from t5fx.errors import T5Error

from .figure import COLOURS
from .plot_style import new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLES = {"class": "class token", "patches": "patch tokens"}


@dataclass(frozen=True)
class Point:
    """One model: how many times faster it is than softmax, and its mean cosine with the original
    before and after distillation (the same number twice where nothing was trained)."""

    name: str
    speed: float
    before: float
    after: float


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m t5fx.bench.report.overview", description=__doc__
    )
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where the tables are")
    parser.add_argument("--out", type=Path, default=Path("docs/overview.png"), help="the picture")
    options = parser.parse_args(arguments)
    draw(options.out, options.docs)
    print(f"picture: {options.out}")


def rows(path: Path, title: str) -> list[dict[str, str]]:
    """The rows of the table with this title in a Markdown file that a benchmark wrote.

    Raises `T5Error` where the file has no such table.
    """
    _, found, rest = path.read_text(encoding="utf-8").partition(f"**{title}")
    lines = [line for line in rest.partition("\n**")[0].splitlines() if line.startswith("|")]
    if not found or len(lines) < 3:
        raise T5Error(f"{path}: expected a table with the title {title!r}, found none")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def trained(docs: Path, what: str) -> list[Point]:
    """The model with every attention rewritten, at each size: its times are the demo's, its
    agreements the recipe's."""
    ways = {row["DINOv2-S"]: row for row in rows(docs / "recipe.md", "What each part")}
    return [
        Point(
            f"{row['px']} px",
            _first(row["softmax / TTT"]),
            *(_first(ways[way][f"{what}, {row['px']} px"]) for way in ("converted", "distilled")),
        )
        for row in rows(docs / "demo.md", "Time of one image in ms, compiled")
    ]


def searched(docs: Path, what: str) -> list[Point]:
    """The choices of `t5fx.search`, untrained."""
    return [
        Point("", _first(row["times faster"]), float(row[what]), float(row[what]))
        for row in rows(docs / "frontier.md", "What a search finds")
    ]


def draw(path: Path, docs: Path) -> None:
    """Two panels, class token and patches; an arrow from before to after for each size."""
    with style():
        figure = new_figure(10, 4.3)
        axes = figure.subplots(1, 2, sharey=True)
        for axis, (what, title) in zip(axes, TITLES.items(), strict=True):
            _panel(axis, trained(docs, what), searched(docs, what))
            axis.set_title(title, fontsize=11)
        axes[0].set_ylabel("mean cosine with the original")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=4)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata={"Software": None})


def _panel(axis: Axes, points: Sequence[Point], choices: Sequence[Point]) -> None:
    softmax = Point("softmax", 1.0, 1.0, 1.0)
    line = sorted([softmax, *choices], key=lambda point: point.speed)
    axis.plot(
        *([point.speed for point in line], [point.before for point in line], "s-"),
        **{"color": COLOURS[2], "markersize": 5, "label": "t5fx.search at 1036 px, untrained"},
    )
    axis.plot(1.0, 1.0, "D", color=COLOURS[0], markersize=8, label="softmax", zorder=5)
    speeds = [point.speed for point in points]
    for values, colour, label in (
        ([point.before for point in points], "white", "every attention, converted"),
        ([point.after for point in points], COLOURS[1], "every attention, distilled"),
    ):
        kind = {"markerfacecolor": colour, "markeredgecolor": COLOURS[1], "zorder": 4}
        axis.plot(speeds, values, "o", markersize=8, label=label, **kind)
    for point in points:
        axis.annotate(
            *("", (point.speed, point.after), (point.speed, point.before)),
            arrowprops={"arrowstyle": "-", "color": COLOURS[1], "linewidth": 1.5},
        )
        place = {"textcoords": "offset points", "xytext": (0, -17), "ha": "center"}
        axis.annotate(point.name, (point.speed, min(point.before, point.after)), **place)
    axis.axvline(1.0, color="grey", linestyle=":", linewidth=1, zorder=0)
    axis.set_xlabel("one image, times faster than softmax, compiled")
    axis.xaxis.set_major_formatter("{x:g}x")
    axis.margins(x=0.08, y=0.12)


def _first(cell: str) -> float:
    """`1.27x (1.17-1.37)` or `0.978 ± 0.002`: the number that it begins with."""
    return float(cell.split()[0].rstrip("x"))


if __name__ == "__main__":
    main()
