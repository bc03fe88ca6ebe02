"""Tables that are the same on a terminal and in a Markdown file."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from t5fx.analysis.clock import device_name
from t5fx.analysis.measure import Spread
from t5fx.tables import table

from .features import agreement
from .timing import Timing
from .units import digits


@dataclass(frozen=True)
class Table:
    """Rows of text under a title; `note` says what the numbers are."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def print(self, console: Console) -> None:
        console.print(table(self.title, self.columns, self.rows))
        if self.note:
            console.print(self.note, style="dim", highlight=False)

    def markdown(self) -> str:
        lines = [f"**{self.title}**", "", _line(self.columns)]
        lines.append(_line(["---", *["---:"] * (len(self.columns) - 1)]))
        lines += [_line(row) for row in self.rows]
        if self.note:
            lines += ["", self.note]
        return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def save_tables(path: Path, *tables: Table) -> None:
    """Writes tables one below the other, as Markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(table.markdown() for table in tables), encoding="utf-8")


def mean_and_spread(values: Sequence[float], digits: int) -> str:
    """The mean and, of several values, their standard deviation: "0.978 ± 0.002"."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def agreement_table(
    features: Mapping[int, Mapping[str, Tensor]], num_photos: int, how: str
) -> Table:
    """Cosine similarity with the first model, one row for each other one.

    Args:
        features: for each image size every model's tokens [B, 1 + N, C].
        num_photos: B; how: what training took, in words.
    """
    sizes = sorted(features)
    names = list(features[sizes[0]])
    found = {
        (name, size): agreement(features[size][names[0]], features[size][name])
        for name in names[1:]
        for size in sizes
    }
    return Table(
        title="Agreement with the original",
        columns=("model", *(f"{what}, {s} px" for s in sizes for what in ("class", "patches"))),
        rows=tuple(
            (name, *(f"{value:.3f}" for size in sizes for value in found[name, size]))
            for name in names[1:]
        ),
        note=f"Mean cosine similarity of class and patch tokens over {num_photos} held-out "
        "photographs; 1 is the original. Converted: every weight is kept, the new parameters are "
        f"fresh, nothing is trained. Distilled: {how} without labels on random crops of other "
        f"photographs at {sizes[0]} px, saved and loaded again.",
    )


def time_table(timings: Sequence[Timing], threads: int) -> Table:
    """Times of all models, one row an image size; speed-ups are over the first."""
    names = timings[0].names
    rounds = " / ".join(str(len(timing.seconds[0])) for timing in timings)
    error = max(timing.error for timing in timings)
    first_calls = [seconds for timing in timings for seconds in timing.first_calls]
    return Table(
        title="Time of one image in ms, compiled",
        columns=("px", "tokens", *names, *(f"{names[0]} / {name}" for name in names[1:])),
        rows=tuple(
            (
                f"{timing.size}",
                f"{timing.num_tokens}",
                *(_spread(Spread.of([1e3 * s for s in one])) for one in timing.seconds),
                *(_spread(timing.speedup(i), "x") for i in range(1, len(names))),
            )
            for timing in timings
        ),
        note=f"Median (first to third quartile) of {rounds} interleaved rounds; {names[0]} "
        f"compiled with Inductor, {' and '.join(names[1:])} with backend='t5', no_grad, float32, "
        f"batch 1, on {machine(threads)}. Compiled outputs differ from eager ones by a relative "
        f"{error:.0e} at most; a first call, which compiles, took {min(first_calls):.0f} to "
        f"{max(first_calls):.0f} s.",
    )


def _spread(values: Spread, unit: str = "") -> str:
    """`1.52x (1.50-1.55)`, three significant digits."""
    median, low, high = (digits(v) for v in (values.median, values.low, values.high))
    return f"{median}{unit} ({low}-{high})"


def machine(threads: int) -> str:
    """The processor, the cores used and torch's version, in one line."""
    name, version = device_name(torch.device("cpu")), torch.__version__.partition("+")[0]
    return f"{name}, {threads} cores used, torch {version}"
