"""The pictures of a report: speed-ups, seconds of compilation, time against tokens."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from t5fx.errors import T5Error

from ..harness.results import Row, grouped
from .figure import COLOURS
from .pivots import BOUND, EVERY, MEASURED, Cells
from .plot_style import (
    INK,
    Plot,
    case_axis,
    legend,
    medians,
    new_figure,
    ratio_axis,
    style,
    tick,
    time_axis,
    tokens_axis,
    whiskers,
)

#: More contenders than the demo has: its palette, then Okabe and Ito's others; shapes tell too.
PALETTE = (*COLOURS, "#56B4E9", "#7F7F7F", "#8C6D31")
MARKERS = "osD^vP*X"
LINES = ("-", "--", ":")
SHOWN = {MEASURED: COLOURS[1], EVERY: COLOURS[2]}
_BOUND = f"bound: {BOUND}"


def plots(rows: Sequence[Row], name: str) -> list[Plot]:
    """Every picture that rows of one suite and one device have data for.

    Raises `T5Error` where matplotlib is not installed.
    """
    try:
        looks = style()
    except ModuleNotFoundError as error:
        raise T5Error("expected matplotlib for the plots: pip install t5fx[demo]") from error
    ok = [row for row in rows if row.status == "ok"]
    found: list[Plot | None] = []
    with looks:
        if rows[0].suite == "peers":
            found.append(_times(ok, name))
        elif rows[0].suite == "models":
            for mode in dict.fromkeys(row.mode for row in ok):
                own = [row for row in ok if row.mode == mode]
                for draw in (_speedups_by_tokens, _speedups_by_case, _compilation):
                    found.append(draw(own, f"{name}-{mode}", mode))
    return [plot for plot in found if plot]


def _speedups_by_tokens(rows: Sequence[Row], name: str, mode: str) -> Plot | None:
    own = [row for row in _speedups(rows) if row.tokens > 0]
    if not own:
        return None
    figure = new_figure(7.5, 4.2)
    axis = figure.subplots()
    # Moved aside a little, so that whiskers at the same number of tokens do not hide each other.
    for aside, (contender, colour) in zip((0.985, 1.015), SHOWN.items(), strict=True):
        shown = [row for row in own if row.contender == contender]
        look = {"fmt": "o", "markersize": 4, "capsize": 3, "color": colour}
        tokens = [row.tokens * aside for row in shown]
        axis.errorbar(tokens, medians(shown), yerr=whiskers(shown), label=contender, **look)
    bounds = [row for row in own if row.contender == BOUND]
    axis.plot([row.tokens for row in bounds], medians(bounds), **tick("_", 13), label=_BOUND)
    axis.axhline(1, color=COLOURS[0], linestyle=":", linewidth=1.5, zorder=1, label="best softmax")
    axis.set(xscale="log", yscale="log", ylabel="speed-up over the best softmax")
    tokens_axis(axis, own)
    ratio_axis(axis.yaxis, own)
    legend(axis, *SHOWN, _BOUND)
    text = f"Speed-up over the best compiled softmax against tokens, {mode}; medians and quartiles."
    return Plot(f"{name}-speed-up-tokens", text, figure)


def _speedups_by_case(rows: Sequence[Row], name: str, mode: str) -> Plot | None:
    """Bars from 1, to the right where faster; on a log axis 2x and 0.5x are equally long."""
    own = _speedups(rows)
    if not own:
        return None
    cases = _by_tokens(own)
    figure = new_figure(7.5, 1.3 + 0.42 * len(cases))
    axis = figure.subplots()
    axis.set(xscale="log", xlabel="speed-up over the best softmax")
    for aside, (contender, colour) in zip((-0.19, 0.19), SHOWN.items(), strict=True):
        places, shown = _found(cases, lambda cells, who=contender: cells.get(who, "speed-up"))
        axis.barh(
            [place + aside for place in places],
            [median - 1 for median in medians(shown)],
            xerr=whiskers(shown),
            error_kw={"ecolor": INK, "elinewidth": 0.8, "capsize": 1.5},
            **{"left": 1, "height": 0.36, "color": colour, "label": contender},
        )
    places, bounds = _found(cases, lambda cells: cells.get(BOUND, "speed-up"))
    axis.plot(medians(bounds), places, **tick("|", 15), label=_BOUND)
    axis.axvline(1, color=COLOURS[0], linewidth=1.5, zorder=3, label="best softmax")
    ratio_axis(axis.xaxis, own)
    case_axis(axis, [case for case, _ in cases], mode)
    legend(axis, *SHOWN, _BOUND)
    text = f"Speed-up over the best compiled softmax by case, {mode}; medians and quartiles."
    return Plot(f"{name}-speed-up-cases", text, figure)


def _compilation(rows: Sequence[Row], name: str, mode: str) -> Plot | None:
    """Seconds of a compilation with nothing cached, and of one that finds a cache on disk."""
    own = [row for row in rows if row.measure in ("cold compile", "warm compile")]
    cases = _by_tokens(own)
    softmax = sorted({row.contender for row in own if row.contender.startswith("softmax")})
    colours = {**dict(zip(softmax, PALETTE[:1] + PALETTE[3:], strict=False)), **SHOWN}
    contenders = {who: c for who, c in colours.items() if any(r.contender == who for r in own)}
    if not contenders:
        return None
    height = 0.8 / len(contenders)
    figure = new_figure(7.5, 1.3 + 0.2 * (1 + len(contenders)) * len(cases))
    axis = figure.subplots()
    warm: list[tuple[float, float]] = []
    for index, (who, colour) in enumerate(contenders.items()):
        aside = (index - (len(contenders) - 1) / 2) * height
        places, cold = _found(cases, lambda cells, who=who: cells.get(who, "cold compile"))
        bars = [place + aside for place in places]
        axis.barh(bars, medians(cold), height=0.92 * height, color=colour, label=who)
        places, again = _found(cases, lambda cells, who=who: cells.get(who, "warm compile"))
        warm += zip(medians(again), [place + aside for place in places], strict=True)
    if warm:
        axis.plot(*zip(*warm, strict=True), **tick("|", 9), label="with a warm cache")
    axis.set(xlabel="seconds of compilation")
    case_axis(axis, [case for case, _ in cases], mode)
    legend(axis, *contenders)
    text = f"Seconds of compilation by case, {mode}: bars cold, ticks with a warm cache on disk."
    return Plot(f"{name}-compile", text, figure)


def _times(rows: Sequence[Row], name: str) -> Plot | None:
    """Milliseconds against tokens, a panel for the cases that differ in tokens alone."""
    own = [row for row in rows if row.measure == "latency" and row.tokens > 0]
    panels: dict[str, list[Row]] = {}
    for row in own:
        panels.setdefault(re.sub(rf"\b{row.tokens}\b", "N", row.case), []).append(row)
    if not panels:
        return None
    contenders = list(dict.fromkeys(row.contender for row in own))
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = new_figure(8.5, 0.4 + 0.25 * math.ceil(len(contenders) / 2) + 3.1 * lines)
    axes = figure.subplots(lines, columns, sharey=True, squeeze=False)
    handles = {}
    for axis, (title, mine) in zip(axes.flat, panels.items(), strict=False):
        for index, contender in enumerate(contenders):
            shown = sorted((r for r in mine if r.contender == contender), key=lambda r: r.tokens)
            if not shown:
                continue
            again, kind = divmod(index, len(PALETTE))
            handles[contender] = axis.errorbar(
                [row.tokens for row in shown],
                [1e3 * median for median in medians(shown)],
                yerr=[[1e3 * length for length in side] for side in whiskers(shown)],
                **{"color": PALETTE[kind], "marker": MARKERS[kind], "linestyle": LINES[again % 3]},
                **{"markersize": 5, "capsize": 2.5, "linewidth": 1.5},
            )
        axis.set(xscale="log", yscale="log")
        time_axis(axis.yaxis, medians(own))
        tokens_axis(axis, mine, apart=0.17)
        axis.set_title(title, fontsize=10)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("ms")
    figure.legend(handles.values(), handles, loc="outside upper left", ncols=2)
    return Plot(f"{name}-time-tokens", "Time against tokens; medians and quartiles.", figure)


def _speedups(rows: Sequence[Row]) -> list[Row]:
    """The speed-ups that are shown, if there is one beside bounds."""
    own = [row for row in rows if row.measure == "speed-up" and row.contender in (*SHOWN, BOUND)]
    return own if any(row.contender in SHOWN for row in own) else []


def _by_tokens(rows: Sequence[Row]) -> list[tuple[str, Cells]]:
    cases = [(case, Cells(own)) for case, own in grouped(rows)]
    return sorted(cases, key=lambda item: item[1].rows[0].tokens)


def _found(
    cases: Sequence[tuple[str, Cells]], look: Callable[[Cells], Row | None]
) -> tuple[list[int], list[Row]]:
    """Where there is a row, and the row."""
    found = [(index, row) for index, (_, cells) in enumerate(cases) if (row := look(cells))]
    return [index for index, _ in found], [row for _, row in found]
