"""Tables and the picture of an ablation's results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from t5fx.errors import T5Error

from ..harness.results import Row
from ..harness.tables import Table, mean_and_spread
from ..report.figure import COLOURS
from .rows import VARIANTS, Variant

_CLASSIFIER, _DINOV2 = "classifier", "dinov2"


class Found:
    """The values of all seeds, by part, row and measure."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.values: dict[tuple[str, str, str], list[float | None]] = {}
        self.device = self.torch = ""
        self._steps: dict[str, dict[str, None]] = {}
        for row in rows:
            part, _, name = row.case.partition(": ")
            measure = row.measure.rpartition(", seed ")[0]
            self._steps.setdefault(part, {})[row.mode] = None
            self.values.setdefault((part, name, measure), []).append(row.value)
            self.device, self.torch = f"{row.device}, {row.threads} threads", row.torch

    def has(self, name: str) -> bool:
        """Whether a row was measured in any part."""
        return any(row == name for _, row, _ in self.values)

    def of(self, part: str, name: str, measure: str) -> list[float]:
        return [v for v in self.values.get((part, name, measure), ()) if v is not None]

    def text(self, part: str, name: str, measure: str, scale: float, digits: int) -> str:
        """Mean and spread; a dash where it was not measured, "diverged" where a seed did."""
        values = self.values.get((part, name, measure), [])
        if not values:
            return "-"
        if None in values or len(values) < self._seeds_of(part, name):
            return "diverged"
        numbers = [scale * value for value in values if value is not None]
        return mean_and_spread(numbers, digits)

    def _seeds_of(self, part: str, name: str) -> int:
        return max(len(v) for key, v in self.values.items() if key[:2] == (part, name))

    def steps(self, part: str) -> str:
        """Of the training, as in "40 steps"; more of them where rows differ."""
        return " or ".join(self._steps.get(part, {"0 steps": None}))

    @property
    def seeds(self) -> int:
        return max(map(len, self.values.values()), default=0)


def tables(rows: Sequence[Row]) -> list[Table]:
    """One for each table of the paper, and one for the peers."""
    found = Found(rows)
    groups = dict.fromkeys(one.group for one in VARIANTS)
    note = (
        "Paper: accuracy of DeiT-T on ImageNet in % (softmax 72.05; arXiv 2605.02772). Classifier: "
        "accuracy in % of the small ViT of `t5fx.bench.demos.classify` on its test images, as "
        f"converted and after {found.steps(_CLASSIFIER)} of the protocols, which train the new "
        "parameters only (freeze) or all (full). DINOv2-S at 224 px: mean cosine of the patch "
        "tokens with the original's on held-out photographs, as converted and after "
        f"{found.steps(_DINOV2)} of alignment, and the mean squared error of the attentions after "
        "alignment, relative to softmax's. Mean and standard deviation of the seeds, "
        f"{found.seeds} at most, on {found.device}, torch {found.torch}."
    )
    made = [table for table in (_table(group, found) for group in groups) if table.rows]
    if not made:
        raise T5Error("expected results of some row, got none: run without --render first")
    last = made[-1]
    made[-1] = Table(last.title, last.columns, last.rows, note)
    return made


def _table(group: str, found: Found) -> Table:
    columns = (
        *("paper: freeze", "full", "classifier: converted", "freeze", "full"),
        *("DINOv2-S: converted", "aligned", "error"),
    )

    def cells(one: Variant) -> tuple[str, ...]:
        paper = ["-" if value is None else f"{value:.2f}" for value in (one.freeze, one.full)]
        ours = [
            found.text(_CLASSIFIER, one.name, what, 100, 1)
            for what in ("converted", "freeze", "full")
        ]
        features = [
            found.text(_DINOV2, one.name, what, 1, 3)
            for what in ("patches, converted", "patches, aligned", "error, aligned")
        ]
        return (one.name, *paper, *ours, *features)

    rows = tuple(cells(one) for one in VARIANTS if one.group == group and found.has(one.name))
    return Table(title=group.capitalize(), columns=(group, *columns), rows=rows)


#: Of each part: its title, its unit, the factor to it, and what is drawn of it in which colour.
_PANELS: dict[str, tuple[str, str, float, dict[str, str]]] = {
    _CLASSIFIER: (
        "classifier, trained",
        "accuracy, %",
        100.0,
        {"freeze": COLOURS[1], "full": COLOURS[0]},
    ),
    _DINOV2: (
        "DINOv2-S, 224 px",
        "mean cosine of patches with the original's",
        1.0,
        {"patches, converted": COLOURS[4], "patches, aligned": COLOURS[2]},
    ),
}


def draw(path: Path, rows: Sequence[Row]) -> None:
    """A dot a seed: accuracy by protocol, and agreement of DINOv2-S's patches; as a PNG."""
    from matplotlib.figure import Figure

    found = Found(rows)
    shown = [one for one in _once() if found.has(one.name)]
    parts = [part for part in _PANELS if any(key[0] == part for key in found.values)]
    figure = Figure(figsize=(4 + 4 * len(parts), 0.36 * len(shown) + 1.6), layout="constrained")
    for axis, part in zip(
        figure.subplots(1, len(parts), sharey=True, squeeze=False)[0], parts, strict=True
    ):
        title, unit, scale, measures = _PANELS[part]
        for measure, colour in measures.items():
            points = [
                (scale * value, place)
                for place, one in enumerate(shown)
                for value in found.of(part, one.name, measure)
            ]
            across, down = zip(*points, strict=True) if points else ((), ())
            label = measure.removeprefix("patches, ")
            axis.plot(across, down, ".", color=colour, ms=9, label=label)
        axis.set_title(title)
        axis.set_xlabel(unit)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, loc="lower left")
    figure.axes[0].set_yticks(range(len(shown)), [one.name for one in shown])
    figure.axes[0].invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _once() -> list[Variant]:
    return list({one.name: one for one in VARIANTS}.values())
