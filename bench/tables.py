"""Tables that are the same on a terminal and in a Markdown file."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table as RichTable

from .features import Agreement
from .timing import Spread, Timing


@dataclass(frozen=True)
class Table:
    """Rows of text under a title; `note` says what the numbers are."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def print(self, console: Console) -> None:
        table = RichTable(title=self.title, title_justify="left")
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)
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


def agreement_table(agreements: dict[str, Agreement], num_photos: int, size: int) -> Table:
    """Cosine similarity with the original, one row a model."""
    return Table(
        title=f"Agreement with the original at {size} px",
        columns=("model", "class token", "patch tokens"),
        rows=tuple(
            (name, f"{one.class_token:.3f}", f"{one.patches:.3f}")
            for name, one in agreements.items()
        ),
        note=f"Mean cosine similarity over {num_photos} held-out photographs; 1 is the original. "
        "A model that was only converted is not aligned yet: its new parameters are random.",
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
        note=f"Median (first to third quartile) of {rounds} interleaved rounds. All compiled by "
        f"stock Inductor, no_grad, float32, batch 1, on {machine(threads)}. Compiled outputs "
        f"differ from eager ones by a relative {error:.0e} at most; a first call, which compiles, "
        f"took {min(first_calls):.0f} to {max(first_calls):.0f} s.",
    )


def _spread(values: Spread, unit: str = "") -> str:
    """`1.52x (1.50-1.55)`, three significant digits."""
    median, low, high = (_digits(v) for v in (values.median, values.low, values.high))
    return f"{median}{unit} ({low}-{high})"


def _digits(value: float) -> str:
    """Three significant digits, never in scientific notation."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def machine(threads: int) -> str:
    """The processor, the cores used and torch's version, in one line."""
    return f"{_processor()}, {threads} cores used, torch {torch.__version__.partition('+')[0]}"


def _processor() -> str:
    """The processor's model name, or its architecture where the system does not tell."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
