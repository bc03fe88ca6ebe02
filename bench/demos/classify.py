"""A classifier from softmax to TTT and back to its accuracy: `python -m t5fx.bench.demos.classify`.

Takes the small ViT whose softmax weights the project trained itself, converts it, aligns it on
training images without their labels, fine-tunes that with few labels by either protocol, and
measures the accuracy on the test set after each; then times softmax and TTT, compiled, at growing
image sizes until TTT wins clearly.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import t5fx

from ..harness.console import step
from ..harness.tables import Table, machine, save_tables, time_table
from ..harness.timing import Timing, break_even, time_models
from ..report.figure import draw_accuracies
from . import mnist
from .vit import PATCH, Training, accuracy, load_vit, shipped

BATCH = 128
ALIGN_STEPS, STEPS = 200, 100
# Sides to time at, in pixels, until TTT is this many times as fast.
SIZES = (28, 112, 224, 448)
CLEARLY = 1.5


@dataclass(frozen=True)
class Stage:
    """One row of the table; labels, steps and seconds are those of its own training."""

    name: str
    accuracy: float
    labels: int
    steps: int
    seconds: float


class Shuffled:
    """Batches of images [B, 1, 28, 28] and labels [B], in a new order in every pass."""

    def __init__(self, data: mnist.Labelled, seed: int) -> None:
        self.data = data
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count = len(self.data.labels)
        order = torch.randperm(count, generator=self.generator)
        for chosen in order[: count // BATCH * BATCH].split(BATCH):
            yield self.data.images[chosen], self.data.labels[chosen]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    console, start = Console(), perf_counter()
    data = mnist.load(options.data, options.root, options.download)
    console.print(f"data: {data.source}", highlight=False)
    model, training = load_vit(shipped(data.name))

    stages, linear = run(model, data, options.align_steps, options.steps, console)
    table = accuracy_table(stages, data, training)
    table.print(console)
    timings = measure(model, linear, data.test.images[:1], console)
    times = time_table(timings, torch.get_num_threads())
    times.print(console)

    title = f"A small ViT on {data.source.partition(',')[0]}: softmax, converted, trained again"
    rows = [(one.name, one.accuracy) for one in stages]
    draw_accuracies(options.out, title, rows, timings, break_even(linear), (table.note, times.note))
    save_tables(options.table, table, times)
    console.print(
        f"picture: {options.out}\ntables: {options.table}\ntotal: {perf_counter() - start:.0f} s",
        highlight=False,
    )


def run(
    model: nn.Module, data: mnist.Data, align_steps: int, steps: int, console: Console
) -> tuple[list[Stage], nn.Module]:
    """Every stage with its accuracy on the test set, and the model as it was fully fine-tuned."""
    stages: list[Stage] = []

    def add(name: str, one: nn.Module, labels: int = 0, steps: int = 0, seconds: float = 0) -> None:
        with step(console, f"accuracy of {name} on {len(data.test.labels)} images"):
            right = accuracy(one.eval(), *data.test)
        stages.append(Stage(name, right, labels, steps, seconds))

    add("softmax", model)
    with step(console, "converting"):
        # min_tokens=0: 50 tokens are too few to gain anything, and enough to show the quality.
        config = t5fx.LinearizeConfig(min_tokens=0)
        linear = t5fx.linearize(model, (data.train.images[:BATCH],), config=config)
    add("converted", linear)

    align = t5fx.Align(Shuffled(data.train, 0), inputs=lambda batch: batch[0], steps=align_steps)
    with step(console, f"aligning, {align_steps} steps without labels"):
        align(linear)
    assert align.result is not None
    add("aligned", linear, 0, align.result.steps, align.result.seconds)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    for protocol in ("freeze", "full"):
        tuned = copy.deepcopy(linear)
        tune = t5fx.FineTune(Shuffled(data.train, 1), loss, protocol=protocol, steps=steps)
        with step(console, f"fine-tuning, protocol {protocol}, {steps} steps"):
            tune(tuned)
        result = tune.result
        assert result is not None
        name = f"aligned, then {protocol}"
        add(name, tuned, result.samples, result.steps, result.seconds)
    return stages, tuned


def measure(model: nn.Module, linear: nn.Module, image: Tensor, console: Console) -> list[Timing]:
    """Times of one image [1, 1, 28, 28], enlarged, until TTT wins clearly."""
    timings: list[Timing] = []
    for size in SIZES:
        enlarged = F.interpolate(image, (size, size), mode="bicubic")
        with step(console, f"compiling and timing at {size} px") as say:
            models = [("softmax", model), ("TTT", linear)]
            tokens = (size // PATCH) ** 2 + 1
            timings.append(time_models(models, enlarged, num_tokens=tokens, budget=4, say=say))
        if timings[-1].speedup(1).median >= CLEARLY:
            break
    return timings


def accuracy_table(stages: Sequence[Stage], data: mnist.Data, training: Training) -> Table:
    return Table(
        title=f"Accuracy on {len(data.test.labels)} test images",
        columns=("model", "accuracy, %", "labels seen", "steps", "seconds"),
        rows=tuple(
            (
                one.name,
                f"{100 * one.accuracy:.2f}",
                f"{one.labels:,}",
                f"{one.steps}",
                f"{one.seconds:.0f}",
            )
            for one in stages
        ),
        note=f"{data.source}. Softmax: {training.steps:,} steps of {training.batch} images from "
        "scratch. Converted: no training. Aligned: without labels. Then, from there: freeze trains "
        "the new parameters only, full all of them. Seconds of that training alone, on "
        f"{machine(torch.get_num_threads())}; one run, seeds fixed.",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m t5fx.bench.demos.classify", description=__doc__
    )
    docs = Path("docs")
    parser.add_argument("--data", choices=("fashion", "digits"), help="the first found by default")
    parser.add_argument("--root", type=Path, default=mnist.ROOT, help="torchvision's data folder")
    parser.add_argument("--download", action="store_true", help="let torchvision download it")
    parser.add_argument("--align-steps", type=int, default=ALIGN_STEPS, help=f"of {BATCH} images")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of {BATCH} labelled images")
    parser.add_argument("--out", type=Path, default=docs / "classify.png", help="the picture")
    parser.add_argument("--table", type=Path, default=docs / "classify.md", help="the tables")
    return parser


if __name__ == "__main__":
    main()
