"""The rows, as a csv file and as a page of the manual."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from t5fx.reports import REASONS

from .family import families


@dataclass
class Row:
    """What one family gave.

    rewritten, sites, kept, why: what `t5fx.explain` says of the pipeline's first call. The columns
    of `checks.CHECKS`: a largest difference where it works, "no: ..." where it does not, "-" where
    the family has no such thing, "" where nothing was tried. graphs, inductor: compilations of
    backend "t5" and of Inductor. digest: of the code that was measured.
    """

    family: str
    pipeline: str = ""
    model: str = ""
    rewritten: str = ""
    sites: str = ""
    kept: str = ""
    why: str = ""
    converted: str = ""
    guidance: str = ""
    timesteps: str = ""
    compiled: str = ""
    graphs: str = ""
    inductor: str = ""
    lora: str = ""
    offload: str = ""
    bfloat16: str = ""
    float16: str = ""
    saved: str = ""
    seconds: str = ""
    versions: str = ""
    digest: str = ""


#: The columns of the page that say whether something works: title, and what was tried.
COLUMNS = {
    "converted": (
        "sizes",
        "converted once, run at a square and at sizes that are not, both ways round: equal to a "
        "conversion for that size, each node ran, and `t5fx.softmax` brings the original back",
    ),
    "guidance": ("batches", "without guidance, and for two prompts"),
    "timesteps": ("time steps", "two items of a batch at time steps of their own"),
    "compiled": (
        "compiled",
        'the untouched model compiled in place with `backend="t5"`, at all sizes, guided and not: '
        "equal to the converted one",
    ),
    "lora": (
        "LoRA",
        "loaded before the conversion or after it: the same outputs; unloaded: those without it",
    ),
    "offload": (
        "offload",
        "`enable_model_cpu_offload`; without an accelerator its hooks have the CPU for a device",
    ),
    "bfloat16": ("bf16", "in half precision as near to itself in float32 as softmax is"),
    "float16": ("fp16", "the same"),
    "saved": (
        "saved",
        "`pipe.save_pretrained`, the class's `from_pretrained`, then `t5fx.from_pretrained`",
    ),
}


def read(path: Path) -> list[Row]:
    """The rows of a csv file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [Row(**record) for record in csv.DictReader(file)]


def write(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def merge(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """New rows in place of old ones, in the families' order; rows of no family are dropped."""
    rows = {row.family: row for row in [*old, *new]}
    return [rows[name] for name in families() if name in rows]


_ABOUT = """# Pipelines

Pipelines of diffusers whose transformer or UNet was converted, or compiled in place with
`backend="t5"`: tiny components with random weights, the real schedulers and classes. How to convert
one is in [diffusion pipelines](diffusion.md). `python -m t5fx.bench.pipelines` wrote this page
({versions}).
"""
_CELLS = """
An empty cell was not measured; - is what a family has not. Where the conversion itself fails, the
other cells are empty.
Compilations: of `backend="t5"`, and of Inductor alone for the same calls, both without code in C++
(`fallback_by_default`), which would take most of the time.
"""


def render(rows: Sequence[Row]) -> str:
    """The page of the manual."""
    versions = "; ".join(sorted({row.versions for row in rows if row.versions})) or "no row yet"
    parts = [_ABOUT.format(versions=versions)]
    parts.append("| column | what was tried |\n|---|---|")
    parts.append("| sites | attentions that are rewritten, of all that there are |")
    parts += [f"| {title} | {tried} |" for title, tried in COLUMNS.values()]
    parts.append(_CELLS)
    parts.append("## What works\n")
    names = ["family", "sites", *(title for title, _ in COLUMNS.values())]
    names.insert(names.index("compiled") + 1, "compilations")
    parts.append("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    parts += ["| " + " | ".join(_line(row)) + " |" for row in rows]
    reasons = [lines for row in rows if (lines := _reasons(row))]
    if reasons:
        parts += ["\n## What stays softmax or fails, and why\n", *reasons]
    return "\n".join(parts) + "\n"


def _line(row: Row) -> list[str]:
    cells = [row.family, f"{row.rewritten} of {row.sites}" if row.sites else "?"]
    for name in COLUMNS:
        cells.append(_cell(getattr(row, name)))
        if name == "compiled":
            cells.append(f"{row.graphs} / {row.inductor}" if row.graphs else "")
    return cells


def _cell(value: str) -> str:
    if value in ("", "-"):
        return value
    return "**no**" if value.startswith("no: ") else "yes"


def _reasons(row: Row) -> str:
    """What a family keeps as softmax and what failed, a line each; "" where there is nothing."""
    found = []
    details = dict(part.split(": ", 1) for part in row.why.split("; ") if ": " in part)
    for part in filter(None, row.kept.split(", ")):
        number, _, reason = part.partition(" ")
        sentence = details.get(reason, REASONS.get(reason, ""))
        found.append(f"    - {number} x [{reason}](reasons.md#{reason}): {sentence}")
    for name, (title, _) in COLUMNS.items():
        value = getattr(row, name)
        if value.startswith("no: "):
            found.append(f"    - {title}: {value.removeprefix('no: ')}")
    lines = [line.replace("|", "/").replace("<", "&lt;") for line in found]
    return "\n".join([f"- **{row.family}** (`{row.pipeline}`)", *lines]) if lines else ""
