"""What all plots of a report share: their look, their files, their axes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..harness.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INK = "#333333"

STYLE = {
    **{f"{what}.color": INK for what in ("text", "xtick", "ytick")},
    **{f"axes.{what}color": INK for what in ("label", "edge")},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True},
    **{"axes.grid": True, "grid.alpha": 0.3, "grid.color": "#808080", "font.size": 10},
    # A name with dollars is no formula.
    **{"legend.frameon": False, "text.parse_math": False},
}


@dataclass(frozen=True)
class Plot:
    """A picture: the name of its files, what it shows in a sentence, and itself."""

    name: str
    text: str
    figure: Figure

    def save(self, folder: Path) -> None:
        """Writes NAME.png, on white."""
        with style():
            self.figure.savefig(folder / f"{self.name}.png", dpi=200, metadata={"Software": None})


def style() -> AbstractContextManager[None]:
    """matplotlib's settings, while a plot is made and while it is written."""
    import matplotlib

    return matplotlib.rc_context(STYLE)


def new_figure(width: float, height: float) -> Figure:
    """Inches; its layout makes room for a legend outside of the axes."""
    # The class, not pyplot: it needs no display and leaves the caller's figures alone.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def medians(rows: Iterable[Row]) -> list[float]:
    """One for each row."""
    return [row.spread.median for row in rows]


def whiskers(rows: Sequence[Row]) -> list[list[float]]:
    """From the median down to the first quartile and up to the third."""
    spreads = [row.spread for row in rows]
    # Not below 0, which matplotlib refuses: a median may be rounded past a quartile.
    down = [max(0.0, spread.median - spread.low) for spread in spreads]
    return [down, [max(0.0, spread.high - spread.median) for spread in spreads]]


def tick(marker: str, size: float) -> dict[str, Any]:
    """A stroke alone, "_" or "|", where a value is shown beside others."""
    lines = {"marker": marker, "markersize": size, "markeredgewidth": 1.8, "linestyle": "none"}
    return lines | {"color": INK, "zorder": 4}


def tokens_axis(axis: Axes, rows: Sequence[Row], apart: float = 0.07) -> None:
    """Ticks at the rows' own numbers of tokens, left out where nearer than a part of the axis."""
    tokens = sorted({row.tokens for row in rows})
    least = (tokens[-1] / tokens[0]) ** apart
    ticks = tokens[-1:]
    for one in reversed(tokens):
        if ticks[0] / one > least:
            ticks.insert(0, one)
    axis.set_xlim(tokens[0] / 1.2, tokens[-1] * 1.2)  # of one number of tokens too
    axis.set_xticks(ticks, [f"{one}" for one in ticks])
    axis.minorticks_off()
    axis.set_xlabel("tokens")


def time_axis(axis: Axis, seconds: Sequence[float]) -> None:
    """Milliseconds, the more of them marked the fewer decades there are."""
    from matplotlib.ticker import LogLocator

    ratio = max(seconds) / min(seconds)
    marked = (1, 1.5, 2, 3, 4, 5, 6, 8) if ratio < 10 else (1, 2, 5) if ratio < 300 else (1,)
    axis.set_major_locator(LogLocator(subs=marked))
    axis.set_major_formatter("{x:g}")


def legend(axis: Axes, *first: str) -> None:
    """Above the axes, where it covers no data; some labels before the others."""
    handles, labels = axis.get_legend_handles_labels()
    order = [*first, *(label for label in labels if label not in first)]
    found = dict(zip(labels, handles, strict=True))
    shown = [label for label in order if label in found]
    axis.figure.legend([found[label] for label in shown], shown, loc="outside upper left", ncols=4)


def ratio_axis(axis: Axis, rows: Sequence[Row]) -> None:
    """Round ratios on a log axis: 0.5, 0.7, 1, 1.5 ..., or evenly where there is no such room."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    low, high = min(1, *medians(rows)), max(1, *medians(rows))
    wide = high / low > 3
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)) if wide else MaxNLocator(6))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}x")


def case_axis(axis: Axes, cases: Sequence[str], mode: str) -> None:
    """Names of cases down the axis; their mode is said elsewhere."""
    axis.set_yticks(range(len(cases)), [case.removesuffix(f", {mode}") for case in cases])
    axis.set_ylim(len(cases) - 0.4, -0.6)
    axis.tick_params("y", length=0)
    axis.grid(visible=False, axis="y")
