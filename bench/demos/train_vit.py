"""Trains the classification demo's softmax ViT: `python -m t5fx.bench.demos.train_vit`.

The package ships what this wrote for each data set, so that the demo needs no training of its own.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from . import mnist
from .vit import Training, accuracy, new_vit, save_vit, shipped


@dataclass(frozen=True)
class Recipe:
    """What differs between data sets.

    Attributes:
        steps: of the optimizer.
        flip: whether half of the images are mirrored.
        degrees, zoom, shift: the most that an image is turned, in degrees; scaled, as a fraction;
            moved, in pixels.
    """

    steps: int
    flip: bool
    degrees: float
    zoom: float
    shift: int


RECIPES = {
    "fashion": Recipe(steps=3000, flip=True, degrees=0, zoom=0, shift=1),
    "digits": Recipe(steps=1500, flip=False, degrees=12, zoom=0.12, shift=2),
}
BATCH = 128
RATE, WEIGHT_DECAY, CLIP = 5e-3, 0.05, 1.0
LABEL_SMOOTHING = 0.05
REPORT_EVERY = 250


def train(
    model: nn.Module, data: mnist.Labelled, recipe: Recipe, seed: int, console: Console
) -> None:
    """Trains in place, at a rate that warms up over a tenth of the steps and falls as a cosine."""
    optimizers = _optimizers(model)
    schedules = [LambdaLR(one, lambda step: _rate(step / recipe.steps)) for one in optimizers]
    generator = torch.Generator().manual_seed(seed)
    compiled = torch.compile(model.train(), dynamic=False)
    start, total = perf_counter(), 0.0
    for step, chosen in enumerate(batches(len(data.labels), recipe.steps, generator), 1):
        images = augment(data.images[chosen], recipe, generator)
        logits = compiled(images)
        loss = F.cross_entropy(logits, data.labels[chosen], label_smoothing=LABEL_SMOOTHING)
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for one in (*optimizers, *schedules):
            one.step()
        total += loss.item()
        if step % REPORT_EVERY == 0:
            seconds = perf_counter() - start
            console.print(f"step {step}: loss {total / REPORT_EVERY:.3f}, {seconds:.0f} s")
            total = 0.0
    model.eval()


def _optimizers(model: nn.Module) -> list[Optimizer]:
    """Muon for the layers' matrices and AdamW for the rest, both with updates of AdamW's size.

    After 300 steps on Fashion-MNIST AdamW alone at 2e-3 got 66 % right, with Muon 80 %.
    """
    matrices = [weight for weight in model.blocks.parameters() if weight.ndim == 2]
    chosen = {id(weight) for weight in matrices}
    rest = [weight for weight in model.parameters() if id(weight) not in chosen]
    return [
        Muon(matrices, RATE, WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        AdamW(rest, RATE, betas=(0.9, 0.98), weight_decay=0, fused=True),
    ]


def _rate(done: float) -> float:
    """The learning rate as a fraction of its peak, when that fraction of the steps is done."""
    return done / 0.1 if done < 0.1 else 0.5 + 0.5 * math.cos(math.pi * (done - 0.1) / 0.9)


def batches(count: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """`steps` times the indices of a batch; every image comes once before any comes again."""
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(order) < BATCH:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        chosen, order = order[:BATCH], order[BATCH:]
        yield chosen


def augment(images: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Each image [B, 1, H, W] turned, scaled, moved and mirrored on its own, black around it."""
    angle, size, right, down = 2 * torch.rand(4, len(images), generator=generator) - 1
    angle, size = math.radians(recipe.degrees) * angle, 1 + recipe.zoom * size
    # Whole pixels, so that moving alone does not blur; the grid goes from -1 to 1.
    right = (recipe.shift * right).round() * 2 / images.shape[3]
    down = (recipe.shift * down).round() * 2 / images.shape[2]
    mirror = torch.ones(len(images))
    if recipe.flip:
        mirror -= 2 * torch.randint(2, (len(images),), generator=generator)
    rows = (
        torch.stack([size * angle.cos() * mirror, -size * angle.sin(), right], dim=-1),
        torch.stack([size * angle.sin() * mirror, size * angle.cos(), down], dim=-1),
    )
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    console = Console(highlight=False)
    data = mnist.load(options.data, options.root, options.download)
    recipe = RECIPES[data.name]
    if options.steps:
        recipe = replace(recipe, steps=options.steps)
    console.print(f"{data.source}: {len(data.train.labels)} images to train on")

    torch.manual_seed(options.seed)
    model = new_vit()
    train(model, data.train, recipe, options.seed, console)
    # float16 is what the file holds, so it is what the accuracy is of.
    model.half().float()
    found = accuracy(model, *data.test)
    out = options.out or shipped(data.name)
    version = torch.__version__.partition("+")[0]
    save_vit(out, model, Training(data.name, found, recipe.steps, BATCH, options.seed, version))
    console.print(
        f"accuracy on {len(data.test.labels)} others: {100 * found:.2f} %\nwritten: {out}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m t5fx.bench.demos.train_vit", description=__doc__
    )
    parser.add_argument("--data", choices=RECIPES, help="default: fashion if there, else digits")
    parser.add_argument("--root", type=Path, default=mnist.ROOT, help="torchvision's data folder")
    parser.add_argument("--download", action="store_true", help="let torchvision download fashion")
    parser.add_argument("--steps", type=int, help="instead of the data set's own number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: the file that the package ships")
    return parser


if __name__ == "__main__":
    main()
