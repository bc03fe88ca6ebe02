"""Whether policy="measure" kept its promise in what was measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..harness.results import Row
from ..harness.units import quantity
from .pivots import MEASURED, Cells

#: Never more than this part slower than the best softmax.
PROMISE = 0.02


@dataclass(frozen=True)
class Promise:
    """Whether the promise of policy="measure" holds, on every device and case at once.

    speedups: of "t5, measured", the slowest first; unmeasured: a row of each case that has none.
    """

    speedups: tuple[Row, ...]
    unmeasured: tuple[Row, ...]

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Promise:
        cases: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            if row.suite == "models":
                cases.setdefault((row.device, row.case), []).append(row)
        found, missing = [], []
        for own in cases.values():
            row = Cells(own).get(MEASURED, "speed-up")
            (found if row else missing).append(row or own[0])
        return cls(tuple(sorted(found, key=lambda row: row.spread.median)), tuple(missing))

    @property
    def violated(self) -> tuple[Row, ...]:
        """The cases that take more than 2 % longer."""
        return tuple(r for r in self.speedups if 1 / r.spread.median > 1 + PROMISE)

    @property
    def holds(self) -> bool | None:
        """None where it cannot be known: something was not measured, and nothing violates it."""
        if self.violated:
            return False
        return None if self.unmeasured or not self.speedups else True

    def __str__(self) -> str:
        """The promise, whether it holds, and the cases that decide, in a paragraph."""
        devices = {row.device for row in (*self.speedups, *self.unmeasured)}

        def told(row: Row) -> str:
            return row.case + (f" on {row.device}" if len(devices) > 1 else "")

        measured = len(self.speedups)
        if self.violated:
            listed = "; ".join(f"{told(row)}: {quantity(row)}" for row in self.violated)
            verdict = (
                f"does not hold in {len(self.violated)} of {measured} measured cases: {listed}"
            )
        elif measured:
            worst = self.speedups[0]
            verdict = f"holds in every measured case ({measured})"
            verdict += f"; the worst is {told(worst)}: {quantity(worst)}"
        else:
            verdict = "was measured in no case"
        text = (
            f'Promise: "{MEASURED}" is never more than {100 * PROMISE:.0f} % slower than the best '
            f"compiled softmax. It {verdict}."
        )
        if self.unmeasured:
            text += f" Not measured: {'; '.join(map(told, self.unmeasured))}."
        return text
