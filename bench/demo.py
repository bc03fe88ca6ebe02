"""The whole pass on a really pretrained model: `python -m t5fx.bench.demo`.

Explains the DINOv2-S that a saliency package ships at 518 px, linearizes it, compares the features
before and after on photographs, times both compiled with stock Inductor, and draws one picture.
A converted model keeps every weight but has fresh parameters in every attention: until it is
aligned or fine-tuned its features are wrong, and the numbers say by how much.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console
from torch import Tensor, nn

import t5fx

from . import dinov2, photos
from .features import agreement, tokens
from .figure import Example, draw
from .tables import Table, agreement_table, time_table
from .timing import Named, Timing, time_models

# The size at which the model is explained and linearized, and at which features are compared: that
# of its own position table.
SIZE = 518
TITLE = "A DINOv2-S, softmax attention to TTT-SwiGLU: just converted, not aligned yet"


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    console, start = Console(), perf_counter()
    if options.threads:
        torch.set_num_threads(options.threads)
    with _step(console, "loading the model and the photographs"):
        model = dinov2.load_dinov2_small()
        images = photos.centre_crops(tuple(photos.HELD_OUT), SIZE)
    linear = convert(model, dinov2.preprocess(images[:2]), console)

    with _step(console, f"comparing features of {len(images)} photographs"):
        compared = [("softmax", model), ("TTT, not aligned", linear)]
        features = {name: tokens(one, dinov2.preprocess(images)) for name, one in compared}
    cosines = compare(features)
    cosines.print(console)
    timings = measure([("softmax", model), ("TTT", linear)], options.sizes, console)
    times = time_table(timings, torch.get_num_threads())
    times.print(console)

    rows = "; ".join(f"{name}: class token {a}, patch tokens {b}" for name, a, b in cosines.rows)
    notes = (f"{rows}. {cosines.note}", times.note)
    draw(options.out, TITLE, examples(images, features), timings, break_even(linear), notes)
    options.table.parent.mkdir(parents=True, exist_ok=True)
    options.table.write_text(f"{cosines.markdown()}\n{times.markdown()}", encoding="utf-8")
    console.print(
        f"picture: {options.out}\ntables: {options.table}\ntotal: {perf_counter() - start:.0f} s",
        highlight=False,
    )


def convert(model: nn.Module, example: Tensor, console: Console) -> nn.Module:
    """Explains the model on the first image of `example` and linearizes it.

    Args:
        example: [2, 3, H, W]: two images, so that the batch can be dynamic.
    """
    with _step(console, f"explaining at {SIZE} px"):
        report = t5fx.explain(model, (example[:1],))
    print(report)
    with _step(console, f"linearizing at {SIZE} px"):
        # min_tokens=0: at 224 px too, where the cost model would rather keep the softmax.
        config = t5fx.LinearizeConfig(min_tokens=0)
        return t5fx.linearize(model, (example,), config=config).eval()


def compare(features: Mapping[str, Tensor]) -> Table:
    """Agreement of every model's tokens [B, 1 + N, C] with the first's."""
    (_, original), *others = features.items()
    agreements = {name: agreement(original, one) for name, one in others}
    return agreement_table(agreements, len(original), SIZE)


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
        with _step(console, f"compiling and timing at {size} px") as say:
            timings.append(time_models(models, image, say=say))
    return timings


def break_even(linear: nn.Module) -> float | None:
    """Tokens at which both attentions cost the same FLOPs, if all rewritten sites agree on it.

    Softmax costs b N^2 and TTT a N, so they meet at a / b, which is N after / before at any N.
    """
    meets = {
        round(site.num_tokens * site.flops_after / site.flops_before)
        for site in linear.report.sites
        if site.status == "rewritten"
    }
    return meets.pop() if len(meets) == 1 else None


@contextmanager
def _step(console: Console, text: str) -> Iterator[Callable[[str], None]]:
    """Shows what is being done, on a terminal only, and then how long it took.

    Yields a function that changes the text shown meanwhile.
    """
    start = perf_counter()
    with console.status(text) as status:
        yield status.update
    console.print(f"{text}: {perf_counter() - start:.1f} s", style="dim", highlight=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m t5fx.bench.demo", description=__doc__)
    docs = Path("docs")
    parser.add_argument("--out", type=Path, default=docs / "demo.png", help="the picture (PNG)")
    parser.add_argument("--table", type=Path, default=docs / "demo.md", help="the tables")
    parser.add_argument(
        "--sizes", type=_sizes, default=(224, 518, 1036), help="image sides to time, in pixels"
    )
    parser.add_argument("--threads", type=int, help="cores to use, torch's choice if not given")
    return parser


def _sizes(text: str) -> tuple[int, ...]:
    """`224,518` to (224, 518)."""
    sizes = tuple(int(size) for size in text.split(",") if size.isdigit())
    if len(sizes) <= text.count(",") or any(size % dinov2.PATCH or not size for size in sizes):
        raise argparse.ArgumentTypeError(
            f"expected positive multiples of the patch size {dinov2.PATCH} with commas between "
            f"them, such as 224,518,1036, got {text!r}"
        )
    return sizes


if __name__ == "__main__":
    main()
