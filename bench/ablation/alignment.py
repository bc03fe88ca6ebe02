"""The same variants in DINOv2-S, whose keys have a real shift: alignment without labels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean

from torch import Tensor, nn

import t5fx
from t5fx.errors import TrainingError

from ..demos import demo, dinov2, photos
from ..harness.features import agreement, tokens
from .rows import Variant, is_trainable


@dataclass(frozen=True)
class Alignment:
    """DINOv2-S and the photographs.

    Attributes:
        model: with softmax; wanted: its tokens of the held-out photographs.
        images: the held-out photographs, preprocessed; size: in pixels.
        steps: of `demo.BATCH` crops of other photographs.
    """

    model: nn.Module
    images: Tensor
    wanted: Tensor
    size: int
    steps: int

    @classmethod
    def load(cls, steps: int, size: int = demo.TRAIN_SIZE) -> Alignment:
        model = dinov2.load_dinov2_small()
        images = dinov2.preprocess(photos.centre_crops(tuple(photos.HELD_OUT), size))
        return cls(model, images, tokens(model, images), size, steps)

    def __call__(self, variant: Variant, seed: int) -> Iterator[tuple[str, float | None]]:
        """What was measured and its value: "class" and "patches" are agreements, "error" is the
        mean over the sites of |TTT - softmax|^2 / |softmax|^2; converted, then aligned. None where
        the alignment diverged, or the output is no number.
        """
        if variant.encoded:
            return  # the encodings would have to be trained, with what is not the attention's
        linear = t5fx.linearize(self.model, (self.images[:2],), config=variant.config(seed))
        yield from self._agreement("converted", linear)
        if not is_trainable(linear):
            return
        crops = photos.RandomCrops(photos.OTHERS, self.size, demo.BATCH, seed)
        align = t5fx.Align(
            crops, inputs=dinov2.preprocess, steps=self.steps, held_out=[self.images]
        )
        try:
            align(linear)
        except TrainingError:  # it diverged, as the paper has it of keys without a norm
            yield "error, aligned", None
            return
        assert align.result is not None
        before, after = zip(*align.result.held_out.values(), strict=True)
        yield "error, converted", mean(before)
        yield "error, aligned", mean(after)
        yield from self._agreement("aligned", linear)

    def _agreement(self, when: str, linear: nn.Module) -> Iterator[tuple[str, float | None]]:
        found = agreement(self.wanted, tokens(linear, self.images))
        for what, value in zip(("class", "patches"), found, strict=True):
            yield f"{what}, {when}", value if math.isfinite(value) else None
