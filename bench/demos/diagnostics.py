"""Key shift and attention of a DINOv2-S: `python -m t5fx.bench.demos.diagnostics`.

The model is the one that the demo converted and distilled, run on a photograph that it was not
trained on. The table and the pictures are those of `docs/diagnostics.md`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

import t5fx

from ..harness.console import step
from ..harness.tables import Table
from ..report.report import fill
from . import demo, dinov2, photos

PHOTO = "astronaut"
SITES = tuple(f"blocks.{index}.attn" for index in (0, 6, 11))
#: The class token, the astronaut's face, and her helmet.
QUERIES = (0, photos.HELD_OUT[PHOTO], (0.8, 0.8))


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    console = Console()
    model = t5fx.from_pretrained(options.model, dinov2.load_dinov2_small()).eval()
    image = photos.crop(photos.load(PHOTO), demo.SIZE)
    with step(console, f"diagnosing at {demo.SIZE} px"):
        call = (dinov2.preprocess(image)[None],)
        found = t5fx.diagnose(model, call, sites=options.sites, queries=QUERIES)
    print(found)
    options.out.mkdir(parents=True, exist_ok=True)
    pictures = {"key-shift": found.draw_key_shift(), "maps": found.draw_maps(image)}
    for name, figure in pictures.items():
        figure.savefig(options.out / f"diagnostics-{name}.png", dpi=100)
    fill(options.page, "diagnostics", table(found).markdown())


def table(found: t5fx.Diagnosis) -> Table:
    """Every site's key shift, and how alike its maps are where there are some."""
    rows = []
    for site in found.measured:
        low, high = min(site.key_shift), max(site.key_shift)
        cosine = "" if site.maps is None else f"{site.maps.cosine:.3f}"
        mean = f"{site.mean_key_shift:.3f}"
        rows.append((site.key.removesuffix(".t5"), mean, f"{low:.3f} to {high:.3f}", cosine))
    return Table(
        title=f"The demo's DINOv2-S at {demo.SIZE} px, distilled",
        columns=("site", "key shift", "of its heads", "cosine of softmax and node"),
        rows=tuple(rows),
        note=f"On one photograph, {found.measured[0].layout.tokens} tokens. The cosines are means "
        f"over the heads and the {len(QUERIES)} queries of the maps.",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m t5fx.bench.demos.diagnostics", description=__doc__
    )
    docs = Path("docs")
    parser.add_argument("--model", type=Path, default=demo.SAVE, help="what the demo saved")
    parser.add_argument("--sites", nargs="*", default=SITES, help="attentions that get maps")
    parser.add_argument("--out", type=Path, default=docs, help="folder of the pictures")
    parser.add_argument("--page", type=Path, default=docs / "diagnostics.md", help="page to fill")
    return parser


if __name__ == "__main__":
    main()
