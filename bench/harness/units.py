"""Quantities as people read them: three significant digits, in the unit that suits them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import median
from typing import NamedTuple

from .results import Row

#: What stands in a cell that nothing was measured for.
NOTHING = "–"


class Scale(NamedTuple):
    """A value is divided by `factor` and followed by `name`."""

    factor: float
    name: str


# For each unit of `Row.unit` its scales, the largest first.
_SCALES = {
    "s": (Scale(1, " s"), Scale(1e-3, " ms"), Scale(1e-6, " µs")),
    "bytes": (
        *(Scale(2.0**power, f" {prefix}iB") for power, prefix in ((30, "G"), (20, "M"), (10, "K"))),
        Scale(1, " bytes"),
    ),
    "FLOP": (
        *(Scale(10.0**p, f" {prefix}FLOP") for p, prefix in ((15, "P"), (12, "T"), (9, "G"))),
        *(Scale(1e6, " MFLOP"), Scale(1, " FLOP")),
    ),
    "share": (Scale(0.01, " %"),),
    "x": (Scale(1, "x"),),
    "count": (Scale(1, ""),),
    "": (Scale(1, ""),),
}

MILLISECONDS = _SCALES["s"][1]


def scale(unit: str, values: Iterable[float]) -> Scale:
    """The scale that suits the median of values that stand side by side."""
    scales = _SCALES.get(unit, (Scale(1, f" {unit}"),))
    sizes = [abs(value) for value in values if value]
    typical = median(sizes) if sizes else 0.0
    return next((one for one in scales if typical >= one.factor), scales[-1])


def digits(value: float) -> str:
    """Three significant digits, never in scientific notation."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.2e}")
    return f"{rounded:.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}"


def number(row: Row, of: Scale | None = None) -> str:
    """`1.52 (1.50-1.55)`: the value of a row that is "ok" and its quartiles, without the unit.

    A count is exact; an error, which is far from 1, has a power of ten.
    """
    of = of or scale(row.unit, [row.spread.median])
    low, middle, high = (_one(row, value / of.factor) for value in row.spread)
    return middle if row.low is None or row.high is None else f"{middle} ({low}-{high})"


def quantity(row: Row, of: Scale | None = None) -> str:
    """`1.52x (1.50-1.55)`: as `number`, with the unit."""
    of = of or scale(row.unit, [row.spread.median])
    middle, bracket, quartiles = number(row, of).partition(" (")
    return middle + of.name + bracket + quartiles


def _one(row: Row, value: float) -> str:
    if row.measure == "error":
        return f"{value:.1e}"
    if row.unit in ("", "count") and value == round(value):
        return f"{value:.0f}"
    return digits(value)
