"""The demo's one picture: heat maps of every model, and time against tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from torch import Tensor

from t5fx.analysis.measure import Spread

from ..harness.features import PrincipalColours, agreement, similarity
from ..harness.timing import Timing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

# Okabe and Ito's palette, told apart by every eye: the first model, then the others.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")

# Inches: the side of one map, and the width of the times.
MAP, TIMES = 2.0, 7.0


@dataclass(frozen=True)
class Example:
    """One photograph and what every model made of it.

    Attributes:
        image: [3, H, W] in 0..1.
        place: the reference patch of the similarity map, (row, column) as fractions.
        tokens: for each model's name its tokens [1 + N, C]; the first is the original.
    """

    image: Tensor
    place: tuple[float, float]
    tokens: Mapping[str, Tensor]


def draw(
    path: Path,
    title: str,
    examples: Sequence[Example],
    timings: Sequence[Timing],
    break_even: float | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Draws the examples, a row each, beside the times, and writes a PNG.

    Args:
        path: the file to write.
        title: above everything.
        examples: all with the same models.
        timings: all with the same models, in the order of size.
        break_even: tokens above which the attention alone gets cheaper, if there is one number.
        notes: paragraphs below the times.
    """
    # The class, not pyplot: it needs no display and leaves the caller's figures alone.
    from matplotlib.figure import Figure

    names = list(examples[0].tokens)
    columns = 1 + 2 * len(names)
    sizes = (MAP * columns, TIMES)
    figure = Figure(figsize=(sum(sizes), MAP * len(examples) + 1.7), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.05)
    figure.suptitle(title, fontsize=17, fontweight="bold")
    maps, right = figure.subfigures(1, 2, width_ratios=sizes, wspace=0.03)
    _draw_maps(maps, examples, names)
    times, text = right.subfigures(2, 1, height_ratios=(3, 1))
    _draw_times(times.subplots(), timings, break_even)
    paragraphs = "\n\n".join(fill(note, 78) for note in notes)
    text.text(0.04, 0.95, paragraphs, va="top", fontsize=10.5, color="#333333")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def draw_accuracies(
    path: Path,
    title: str,
    accuracies: Sequence[tuple[str, float]],
    timings: Sequence[Timing],
    break_even: float | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Draws accuracies (0..1, by name, the first the reference) beside the times as `draw` does."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 * TIMES, 7.5), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)
    figure.suptitle(title, fontsize=17, fontweight="bold")
    top, bottom = figure.subfigures(2, 1, height_ratios=(4, 1))
    left, right = top.subplots(1, 2)
    names = [name for name, _ in accuracies]
    percent = [100 * value for _, value in accuracies]
    colours = [COLOURS[0], *[COLOURS[1]] * (len(names) - 1)]
    bars = left.barh(names, percent, color=colours)
    left.bar_label(bars, [f"{value:.1f} %" for value in percent], padding=4, fontsize=12)
    left.axvline(percent[0], color=COLOURS[0], linestyle=":", linewidth=1.5, zorder=0)
    left.invert_yaxis()
    left.set(xlim=(0, 112), xlabel="% of test images")
    left.tick_params("y", labelsize=12)
    left.spines[["top", "right"]].set_visible(False)
    left.set_title("accuracy", fontsize=12)
    _draw_times(right, timings, break_even)
    paragraphs = "\n\n".join(fill(note, 165) for note in notes)
    bottom.text(0.02, 0.95, paragraphs, va="top", fontsize=10.5, color="#333333")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _draw_maps(figure: SubFigure, examples: Sequence[Example], names: Sequence[str]) -> None:
    """A row an example: the photograph, every model's colours, every model's similarities."""
    axes = figure.subplots(len(examples), 1 + 2 * len(names), squeeze=False)
    titles = ["photograph"]
    titles += [f"patch features (PCA)\n{name}" for name in names]
    titles += [f"similarity to the +\n{name}" for name in names]
    for axis, text in zip(axes[0], titles, strict=True):
        axis.set_title(text, fontsize=12)
    for row, example in zip(axes, examples, strict=True):
        for axis in row:
            axis.set(xticks=[], yticks=[])
        _show_photo(row[0], example)
        original = example.tokens[names[0]]
        colours = PrincipalColours.fit(original[1:])
        for index, name in enumerate(names):
            tokens = example.tokens[name]
            row[1 + index].imshow(colours(tokens[1:]).numpy(), interpolation="nearest")
            if index:
                cosine = agreement(original[None], tokens[None]).patches
                row[1 + index].set_xlabel(f"cosine with original {cosine:.2f}", fontsize=10)
            shown = row[1 + len(names) + index].imshow(
                similarity(tokens[1:], example.place).numpy(), cmap="magma", vmin=0, vmax=1
            )
    bar = figure.colorbar(
        shown, ax=axes[:, 1 + len(names) :], location="bottom", aspect=40, pad=0.02
    )
    bar.set_label("cosine of each patch with the one at +", fontsize=10)


def _show_photo(axis: Axes, example: Example) -> None:
    axis.imshow(example.image.permute(1, 2, 0).numpy())
    height, width = example.image.shape[-2:]
    y, x = example.place[0] * height, example.place[1] * width
    axis.plot(x, y, "+", color="black", markersize=13, markeredgewidth=4)
    axis.plot(x, y, "+", color="white", markersize=11, markeredgewidth=2)


def _draw_times(axis: Axes, timings: Sequence[Timing], break_even: float | None) -> None:
    """Milliseconds against tokens on two log axes, each speed-up over the first model written."""
    from matplotlib.ticker import LogLocator

    tokens = [timing.num_tokens for timing in timings]
    first, *_ = timings[0].names
    for index, name in enumerate(timings[0].names):
        colour = COLOURS[index % len(COLOURS)]
        spreads = [Spread.of([1e3 * second for second in t.seconds[index]]) for t in timings]
        middle = [spread.median for spread in spreads]
        whiskers = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
        label = f"{name} (numbers: {first} / {name})" if index else name
        style = {"marker": "o", "capsize": 4, "linewidth": 2, "color": colour, "label": label}
        axis.errorbar(tokens, middle, yerr=whiskers, **style)
        if index:
            _write_speedups(axis, timings, index, colour)
    axis.set(xscale="log", yscale="log", ylabel="ms, median and quartiles")
    axis.set_xticks(tokens, [f"{t.num_tokens}\n{t.size} px" for t in timings])
    axis.set_xlabel("tokens, image side")
    axis.minorticks_off()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.margins(x=0.14, y=0.15)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if break_even is not None:
        axis.axvline(break_even, color="grey", linestyle=":", linewidth=1.5, zorder=0)
        text = f" {break_even:g} tokens: the attention\n alone breaks even in FLOPs"
        place = (break_even, 0.99)
        axis.annotate(text, place, xycoords=("data", "axes fraction"), color="dimgrey", va="top")
    axis.set_title("time of one image, compiled", fontsize=12)
    axis.legend(loc="lower right", frameon=False, fontsize=11)


def _write_speedups(axis: Axes, timings: Sequence[Timing], index: int, colour: str) -> None:
    """The median speed-up of model `index`, below the lowest whisker at each number of tokens."""
    for timing in timings:
        lowest = min(Spread.of(one).low for one in timing.seconds)
        axis.annotate(
            f"{timing.speedup(index).median:.2f}x",
            (timing.num_tokens, 1e3 * lowest),
            xytext=(14, -8 - 16 * index),
            textcoords="offset points",
            ha="center",
            fontsize=13,
            fontweight="bold",
            color=colour,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
