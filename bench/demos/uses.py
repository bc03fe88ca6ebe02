"""What a converted DINOv2-S is good for: `python -m t5fx.bench.demos.uses`, after `make demo`.

Two uses of its features, with the model that the demo distilled on photographs without labels:

- nearest neighbours: digits, unlike anything that it was trained on, are found by their class
  tokens, among tokens of the same model and among those of the original;
- saliency: the decoder that the DINOv2-S came with draws a map from the tokens of each model.

Then the model is distilled on a few digits too, without their labels.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

import t5fx

from ..harness.console import step
from ..harness.features import tokens
from ..harness.tables import Table, save_tables
from . import demo, dinov2, mnist, photos
from .mnist import Labelled
from .neighbours import class_tokens, coloured, hits, interval, parts
from .saliency import load_decoder, map_agreement

#: Digits among which others are found, those that are, and those that are distilled on.
GALLERY, QUERIES, SEEN = 300, 150, 200
#: Image sides in pixels at which digits are looked at; distilled on at the last.
SIZES = (168,)
STEPS, BATCH = 10, 8

Models = Mapping[str, nn.Module]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    console = Console()
    original = dinov2.load_dinov2_small()
    models = {
        "softmax": original,
        "TTT, converted": demo.convert(original, demo.pair(), console),
        "TTT, distilled": t5fx.from_pretrained(options.model, original).eval(),
    }
    with step(console, "saliency maps"):
        images = photos.centre_crops(tuple(photos.HELD_OUT), demo.SIZE)
        maps = saliency_maps(models, images)
    tables = [saliency_table(maps)]

    gallery, queries, seen = parts(
        mnist.digits().train, options.gallery, options.queries, SEEN, seed=options.seed
    )
    with step(console, f"distilling on {SEEN} digits"):
        more = distilled(models["TTT, distilled"], seen, options.steps, options.seed)
        models["TTT, distilled on digits too"] = more
    for size in SIZES:
        with step(console, f"class tokens at {size} px"):
            tables.append(neighbours_table(models, gallery, queries, size))

    for table in tables:
        table.print(console)
    save_tables(options.table, *tables)
    draw(options.out, images, maps)
    console.print(f"tables: {options.table}\npicture: {options.out}", highlight=False)


@torch.no_grad()
def saliency_maps(models: Models, images: Tensor) -> dict[str, Tensor]:
    """What the decoder makes of every model's tokens: [B, H, W] in 0..1 of images [B, 3, H, W]."""
    decoder = load_decoder()
    prepared = dinov2.preprocess(images)
    return {name: decoder(tokens(model, prepared)) for name, model in models.items()}


def saliency_table(maps: Mapping[str, Tensor]) -> Table:
    """Every other model's maps against those of the first."""
    original, *others = maps
    found = {name: map_agreement(maps[original], maps[name]) for name in others}
    return Table(
        title="Saliency maps",
        columns=("model", "correlation", "overlap"),
        rows=tuple((n, f"{one.correlation:.3f}", f"{one.overlap:.3f}") for n, one in found.items()),
        note=f"Maps of {len(maps[original])} held-out photographs at {demo.SIZE} px by the decoder "
        "that the DINOv2-S came with, against those from the original's tokens: Pearson's "
        "correlation of pixels, and intersection over union of what is above one half.",
    )


def distilled(model: nn.Module, seen: Labelled, steps: int, seed: int) -> nn.Module:
    """A copy of the model that learned from the original on these images too, without labels."""
    model = copy.deepcopy(model)
    hook = t5fx.Distill(
        _Batches(seen.images, seed),
        inputs=dinov2.preprocess,
        output=demo.class_and_patches,
        steps=steps,
        lr=demo.RATE,
    )
    hook(model)
    return model


class _Batches:
    """Batches of grey images as RGB, in a new random order in every pass."""

    def __init__(self, images: Tensor, seed: int) -> None:
        self.images = images
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm(len(self.images), generator=self.generator)
        for chosen in order[: len(order) // BATCH * BATCH].split(BATCH):
            yield coloured(self.images[chosen], SIZES[-1])


def neighbours_table(models: Models, gallery: Labelled, queries: Labelled, size: int) -> Table:
    """Accuracy of every model's class tokens at a size in pixels, with what is lost."""
    original, *_ = models
    known = {name: class_tokens(one, gallery.images, size) for name, one in models.items()}
    asked = {name: class_tokens(one, queries.images, size) for name, one in models.items()}

    def found(name: str, among: str) -> Tensor:
        return hits(known[among], gallery.labels, asked[name], queries.labels)

    base = found(original, original)
    rows = []
    for name in models:
        cells = [name]
        for among in (name, original):
            right = found(name, among)
            low, high = interval(base.float() - right.float())
            lost = "" if name == original else f" ({100 * low:+.1f} to {100 * high:+.1f})"
            cells.append(f"{100 * right.float().mean():.1f}{lost}")
        cosine = (asked[name] * asked[original]).sum(-1).mean()
        rows.append((*cells, f"{cosine:.3f}"))
    return Table(
        title=f"20 nearest neighbours, digits at {size} px",
        columns=("model", "gallery of the same model", "gallery of softmax", "cosine"),
        rows=tuple(rows),
        note=f"Accuracy in % of {len(queries.labels)} digits among {len(gallery.labels)}, by class "
        "tokens; in parentheses the points lost to softmax, 95 % interval of a paired bootstrap. "
        "Cosine: of the queries' class tokens with the original's. No label is seen in training.",
    )


def draw(path: Path, images: Tensor, maps: Mapping[str, Tensor]) -> None:
    """Each photograph beside every model's map of it, as a PNG."""
    from matplotlib.figure import Figure

    columns = 1 + len(maps)
    figure = Figure(figsize=(2.4 * columns, 2.4 * len(images) + 0.6), layout="constrained")
    axes = figure.subplots(len(images), columns, squeeze=False)
    for axis, title in zip(axes[0], ("photograph", *maps), strict=True):
        axis.set_title(title, fontsize=12)
    for index, (row, image) in enumerate(zip(axes, images, strict=True)):
        row[0].imshow(image.permute(1, 2, 0).numpy())
        for axis, every in zip(row[1:], maps.values(), strict=True):
            shown = axis.imshow(every[index].numpy(), cmap="magma", vmin=0, vmax=1)
        for axis in row:
            axis.set(xticks=[], yticks=[])
    figure.colorbar(shown, ax=axes[:, 1:], location="bottom", aspect=50, pad=0.02).set_label(
        "saliency by the decoder that the DINOv2-S came with", fontsize=10
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m t5fx.bench.demos.uses", description=__doc__)
    docs = Path("docs")
    parser.add_argument("--model", type=Path, default=demo.SAVE, help="what the demo saved")
    parser.add_argument("--out", type=Path, default=docs / "uses.png", help="the picture (PNG)")
    parser.add_argument("--table", type=Path, default=docs / "uses.md", help="the tables")
    parser.add_argument("--gallery", type=int, default=GALLERY, help="digits to find others by")
    parser.add_argument("--queries", type=int, default=QUERIES, help="digits to be found")
    parser.add_argument("--steps", type=int, default=STEPS, help="of distillation on digits")
    parser.add_argument("--seed", type=int, default=0, help="of which digits are which")
    return parser


if __name__ == "__main__":
    main()
