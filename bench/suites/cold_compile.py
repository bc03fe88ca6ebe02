"""Cold compilation: backend="t5" on an untouched model against Inductor on the same softmax model.

`python -m t5fx.bench.suites.cold_compile [--rounds 3] [--depth 12]` compiles timm's ViT-S/16 at 512
px (1,025 tokens, float32, batch 1) for inference and for training, forward and backward, with
caches empty, in turn, and prints medians and the median ratio. The outputs are checked first.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings

import timm
import torch
from rich.console import Console
from torch import nn
from torch._inductor.utils import fresh_inductor_cache

import t5fx
from t5fx.errors import UntrainedWarning
from t5fx.kernels import cpp
from t5fx.tables import table


def vit(depth: int) -> nn.Module:
    """timm's ViT-S/16 for 512 px with random weights, in eval mode."""
    torch.manual_seed(0)
    return timm.create_model("vit_small_patch16_224", img_size=512, depth=depth).eval()


def cold(backend: str, depth: int, train: bool) -> float:
    """Seconds of the first call (with `train` also of its backward pass), caches empty."""
    model, images = vit(depth), torch.randn(1, 3, 512, 512)
    torch._dynamo.reset()
    cpp.forget()
    call = torch.compile(model, backend=backend)
    with fresh_inductor_cache(), torch.set_grad_enabled(train):
        start = time.perf_counter()
        output = call(images)
        if train:
            output.sum().backward()
        return time.perf_counter() - start


def check() -> None:
    """Both compile what they should: softmax as it is, and what `linearize` makes."""
    model, images = vit(2), torch.randn(1, 3, 512, 512)
    lin = t5fx.linearize(model, (images,))
    with torch.no_grad():
        for backend, expected in (("inductor", model(images)), ("t5", lin(images))):
            torch.testing.assert_close(
                torch.compile(model, backend=backend)(images), expected, atol=1e-4, rtol=1e-4
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--depth", type=int, default=12)
    options = parser.parse_args()
    warnings.simplefilter("ignore", UntrainedWarning)
    check()
    title = f"seconds of a cold compile, {options.depth} blocks, torch {torch.__version__}"
    rows = []
    for train in (False, True):
        pairs = [
            (cold("inductor", options.depth, train), cold("t5", options.depth, train))
            for _ in range(options.rounds)
        ]
        medians = [statistics.median(times) for times in zip(*pairs, strict=True)]
        ratio = statistics.median(ours / theirs for theirs, ours in pairs)
        kind = "training" if train else "inference"
        rows.append((kind, *(f"{m:.1f}" for m in medians), f"{ratio:.2f}x"))
    columns = ("", "inductor, softmax", "t5", "t5 / inductor")
    Console().print(table(title, columns, rows))


if __name__ == "__main__":
    main()
