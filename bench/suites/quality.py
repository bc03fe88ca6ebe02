"""The suite "quality": what the two demos find out, agreement and accuracy, as rows."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from ..demos import classify, demo, mnist
from ..demos.dinov2 import PATCH
from ..demos.vit import load_vit, shipped
from ..harness.features import agreement
from ..harness.results import Experiment, Row


def experiments(small: bool = False) -> list[Experiment]:
    """The demos as they are; if small, with a few steps, at a smaller size, on fewer images."""
    size, steps = (demo.TRAIN_SIZE, 3) if small else (demo.SIZE, demo.STEPS)
    photographs = partial(_photographs, size, steps)
    tokens = 1 + (size // PATCH) ** 2
    whole = classify.ALIGN_STEPS, classify.STEPS, None
    classifier = partial(_classifier, *((2, 2, 100) if small else whole))
    return [
        Experiment("quality", "DINOv2-S, photographs", photographs, tokens),
        Experiment("quality", "classifier of clothes or digits", classifier, 50),
    ]


def _photographs(size: int, steps: int, experiment: Experiment) -> Iterator[Row]:
    """Mean cosine similarity of tokens with the original's, over the held-out photographs."""
    # The demo prints what it finds at each site; here only the rows are wanted.
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        found = demo.run(size, steps, Path(folder) / "adapter", Console(quiet=True))
    for pixels, features in found.features.items():
        original, *others = features
        for name in others:
            values = agreement(features[original], features[name])
            for what, value in zip(("class", "patches"), values, strict=True):
                measure = f"agreement, {what}, {pixels} px"
                yield experiment.row(name, measure, value, unit="share", better="higher")
    yield from _training(experiment, others[-1], found.trained.steps, found.trained.seconds)


def _classifier(
    align_steps: int, steps: int, images: int | None, experiment: Experiment
) -> Iterator[Row]:
    """Accuracy after each stage, on so many of the test images, or all."""
    data = mnist.load()
    data = replace(data, test=mnist.Labelled(*(tensor[:images] for tensor in data.test)))
    model, _ = load_vit(shipped(data.name))
    stages, _ = classify.run(model, data, align_steps, steps, Console(quiet=True))
    for one in stages:
        name = one.name if one.name == "softmax" else f"TTT, {one.name}"
        share = {"unit": "share", "better": "higher", "detail": data.source}
        yield experiment.row(name, "accuracy", one.accuracy, **share)
        if one.steps:
            yield experiment.row(name, "labels seen", one.labels, unit="count")
            yield from _training(experiment, name, one.steps, one.seconds)


def _training(experiment: Experiment, name: str, steps: int, seconds: float) -> Iterator[Row]:
    yield experiment.row(name, "steps", steps, unit="count")
    yield experiment.row(name, "seconds of training", seconds, unit="s", better="lower")
