"""The whole way of a really pretrained model: `python -m t5fx.bench.demo`.

Explains the DINOv2-S that a saliency package ships, linearizes it, distils it on photographs
without labels, saves it, loads it into a fresh copy of the model, compares features
before, between and after on other photographs, times it compiled with backend="t5" against the
softmax model compiled with Inductor, and draws one picture.

A converted model keeps every weight and near attention from them; what it does not see exactly is
what training brings back, and the numbers say how much that is.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console
from torch import Tensor, nn

import t5fx
from t5fx.training.distill import cosine

from ..harness.console import step
from ..harness.features import tokens
from ..harness.tables import agreement_table, save_tables, time_table
from ..harness.timing import Named, Timing, break_even, time_models
from ..report.figure import Example, draw
from . import dinov2, photos

# The size at which the model is explained and linearized, and at which features are compared: that
# of its own position table; and the one at which it is distilled.
SIZE = 518
TRAIN_SIZE = 224
BATCH = 2
STEPS = 80
# Of new parameters; a tenth for the model's own. A converted model is near the original, and
# batches of two crops are noisy: twice as much takes class tokens further away than they were.
RATE = 1e-4
SAVE = Path("build") / "dinov2-t5"
TITLE = "A DINOv2-S, softmax attention to TTT-SwiGLU: converted, then trained without labels"


@dataclass(frozen=True)
class Trained:
    """What training took."""

    steps: int
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """The two models and what they make of the held-out photographs.

    images: [B, 3, H, W] for each image size; features: for each size every model's tokens
    [B, 1 + N, C], the original's first; trained: what training took.
    """

    model: nn.Module
    linear: nn.Module
    images: Mapping[int, Tensor]
    features: Mapping[int, Mapping[str, Tensor]]
    trained: Trained


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    console, start = Console(), perf_counter()
    if options.threads:
        torch.set_num_threads(options.threads)
    found = run(SIZE, options.steps, options.save, console, options.minutes, options.seed)
    took = found.trained
    how = f"in {took.steps} steps, {took.seconds:.0f} s,"
    cosines = agreement_table(found.features, len(photos.HELD_OUT), how)
    cosines.print(console)
    timings = measure([("softmax", found.model), ("TTT", found.linear)], options.sizes, console)
    times = time_table(timings, torch.get_num_threads())
    times.print(console)

    shown = examples(found.images[SIZE], found.features[SIZE])
    notes = (cosines.note, times.note)
    draw(options.out, TITLE, shown, timings, break_even(found.linear), notes)
    save_tables(options.table, cosines, times)
    console.print(
        f"picture: {options.out}\ntables: {options.table}\ncheckpoint: {options.save}\n"
        f"total: {perf_counter() - start:.0f} s",
        highlight=False,
    )


def run(
    size: int,
    steps: int,
    save: Path,
    console: Console,
    minutes: float | None = None,
    seed: int = 0,
) -> Outcome:
    """Converts the model at a size in pixels, trains it, saves it and loads that again.

    steps: of the distillation, unless it has so many minutes.
    """
    with step(console, "loading the model and the photographs"):
        model = dinov2.load_dinov2_small()
        images = {s: photos.centre_crops(tuple(photos.HELD_OUT), s) for s in (TRAIN_SIZE, size)}
    linear = convert(model, dinov2.preprocess(images[size][:2]), console)

    features: dict[int, dict[str, Tensor]] = {size: {} for size in images}

    def look(name: str, one: nn.Module) -> None:
        with step(console, f"features of {len(photos.HELD_OUT)} photographs: {name}"):
            for size, crops in images.items():
                features[size][name] = tokens(one, dinov2.preprocess(crops))

    look("softmax", model)
    look("TTT, converted", linear)
    if minutes is not None:
        with step(console, "timing a step"):
            steps = affordable(linear, 60 * minutes)
    trained = train(linear, steps, seed, console)
    linear = reload(linear, model, save, console)
    look("TTT, distilled", linear)
    return Outcome(model, linear, images, features, trained)


def convert(model: nn.Module, example: Tensor, console: Console) -> nn.Module:
    """Explains the model on the first image of `example` and linearizes it.

    Args:
        example: [2, 3, H, W]: two images, so that the batch can be dynamic.
    """
    size = example.shape[-1]
    with step(console, f"explaining at {size} px"):
        report = t5fx.explain(model, (example[:1],))
    print(report)
    with step(console, f"linearizing at {size} px"):
        # min_tokens=0: at 224 px too, where the cost model would rather keep the softmax.
        config = t5fx.LinearizeConfig(min_tokens=0)
        return t5fx.linearize(model, (example,), config=config).eval()


def pair() -> Tensor:
    """Two photographs to convert the model with, at the size at which it is trained."""
    return dinov2.preprocess(photos.centre_crops(("astronaut", "china"), TRAIN_SIZE))


def train(linear: nn.Module, steps: int, seed: int, console: Console) -> Trained:
    """Distils the model in place on random crops of the photographs that are not held out."""
    distill = distillation(photos.RandomCrops(photos.OTHERS, TRAIN_SIZE, BATCH, seed), steps)
    start = perf_counter()
    distill(linear)
    seconds = perf_counter() - start
    print(distill.result)
    console.print(f"training: {seconds:.1f} s", style="dim", highlight=False)
    return Trained(steps, seconds)


def distillation(crops: photos.RandomCrops, steps: int) -> t5fx.Distill:
    """All parameters learn, the class token as much as all patches together."""
    every = max(1, steps // 5)
    return t5fx.Distill(
        crops,
        inputs=dinov2.preprocess,
        output=class_and_patches,
        steps=steps,
        lr=RATE,
        log_every=every,
    )


def class_and_patches(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine: the mean of that of class tokens and that of patches, of [B, 1 + N, C]."""
    parts = ((x[:, :1], x[:, 1:]) for x in (student, teacher))
    return 0.5 * sum((cosine(s, t) for s, t in zip(*parts, strict=True)), torch.zeros(()))


def affordable(linear: nn.Module, seconds: float) -> int:
    """How many steps of the distillation fit, timed on a copy."""
    crops = photos.RandomCrops(photos.OTHERS, TRAIN_SIZE, BATCH)
    twin = copy.deepcopy(linear)
    distillation(crops, 1)(twin)
    start = perf_counter()
    distillation(crops, 3)(twin)
    return max(1, int(seconds / ((perf_counter() - start) / 3)))


def reload(linear: nn.Module, model: nn.Module, folder: Path, console: Console) -> nn.Module:
    """Saves the model and loads it into a copy of the original; its outputs are the same bits."""
    image = dinov2.preprocess(photos.centre_crops(("astronaut", "chelsea"), TRAIN_SIZE))
    with step(console, f"saving to {folder}, loading again"):
        t5fx.save_pretrained(linear, folder)
        again = t5fx.from_pretrained(folder, model).eval()
        with torch.no_grad():
            if not torch.equal(again(image), linear(image)):
                raise t5fx.T5Error("expected a reloaded model with the same outputs, got others")
    return again


def examples(images: Tensor, features: Mapping[str, Tensor]) -> list[Example]:
    """One example a photograph, from images [B, 3, H, W] and every model's [B, 1 + N, C]."""
    return [
        Example(image, place, {name: every[index] for name, every in features.items()})
        for index, (image, place) in enumerate(zip(images, photos.HELD_OUT.values(), strict=True))
    ]


def measure(models: Named, sizes: Sequence[int], console: Console) -> list[Timing]:
    """Times the models on a photograph at each size in pixels, smallest first."""
    photo = photos.load(next(iter(photos.HELD_OUT)))
    timings = []
    for size in sorted(sizes):
        image = dinov2.preprocess(photos.crop(photo, size))[None]
        with step(console, f"compiling and timing at {size} px") as say:
            timings.append(time_models(models, image, say=say))
    return timings


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m t5fx.bench.demo", description=__doc__)
    docs = Path("docs")
    parser.add_argument("--out", type=Path, default=docs / "demo.png", help="the picture (PNG)")
    parser.add_argument("--table", type=Path, default=docs / "demo.md", help="the tables")
    parser.add_argument(
        "--sizes", type=sizes, default=(224, 518, 1036), help="image sides to time, in pixels"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of the distillation")
    parser.add_argument("--minutes", type=float, help="train for so long instead")
    parser.add_argument("--seed", type=int, default=0, help="of the crops")
    parser.add_argument("--save", type=Path, default=SAVE, help="where the model goes")
    parser.add_argument("--threads", type=int, help="cores to use, torch's choice if not given")
    return parser


def sizes(text: str) -> tuple[int, ...]:
    """`224,518` to (224, 518)."""
    found = tuple(int(size) for size in text.split(",") if size.isdigit())
    if len(found) <= text.count(",") or any(size % dinov2.PATCH or not size for size in found):
        raise argparse.ArgumentTypeError(
            f"expected positive multiples of the patch size {dinov2.PATCH} with commas between "
            f"them, such as 224,518,1036, got {text!r}"
        )
    return found


if __name__ == "__main__":
    main()
