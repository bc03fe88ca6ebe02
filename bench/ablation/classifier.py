"""The paper's protocols on a small classifier: test accuracy after few steps from softmax."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import t5fx

from ..demos import mnist
from ..demos.classify import Shuffled
from ..demos.vit import accuracy, load_vit, shipped
from .cpe import encodings, with_encodings
from .rows import Variant, is_trainable

PROTOCOLS = ("freeze", "full")
#: Of the new parameters; the others get a twentieth, as the method's authors have it.
RATE = 2e-3


@dataclass(frozen=True)
class Classifier:
    """The small ViT with softmax weights, its data, and how it is trained on.

    Attributes:
        model: with softmax; softmax: its accuracy on the test set, a fraction.
        data: to train and test on; steps: of `classify.BATCH` images.
        base_steps: of the training from scratch.
    """

    model: nn.Module
    data: mnist.Data
    softmax: float
    steps: int
    base_steps: int

    @classmethod
    def load(cls, steps: int, images: int | None = None) -> Classifier:
        """The shipped one, to be trained for so many steps; all test images, or the first so
        many.
        """
        data = mnist.load()
        model, training = load_vit(shipped(data.name))
        test = mnist.Labelled(*(part[:images] for part in data.test))
        data = mnist.Data(data.name, data.source, data.train, test)
        right = accuracy(model, *test)
        return cls(model, data, right, steps, training.steps)

    def __call__(self, variant: Variant, seed: int) -> Iterator[tuple[str, float]]:
        """("converted", "freeze" or "full", accuracy) of a variant, trained with that seed."""
        images = self.data.train.images[:2]

        torch.manual_seed(seed)
        model = with_encodings(self.model) if variant.encoded else self.model

        def converted() -> nn.Module:
            return t5fx.linearize(model, (images,), config=variant.config(seed))

        yield "converted", accuracy(converted().eval(), *self.data.test)
        for protocol in PROTOCOLS[variant.encoded :]:
            linear = converted()
            if protocol == "full" or is_trainable(linear):
                torch.manual_seed(seed)
                t5fx.FineTune(
                    Shuffled(self.data.train, seed),
                    _loss,
                    protocol=protocol,
                    steps=self.steps,
                    lr=RATE,
                    optimizer=partial(_optimizer, encodings(linear)),
                )(linear)
            yield protocol, accuracy(linear.eval(), *self.data.test)


def _optimizer(
    encodings: Sequence[nn.Parameter], groups: Sequence[Mapping[str, Any]]
) -> torch.optim.AdamW:
    """AdamW, with the encodings in front of blocks among the new parameters."""
    own = set(map(id, encodings))
    made = [
        {**group, "params": [p for p in group["params"] if id(p) not in own]} for group in groups
    ]
    return torch.optim.AdamW([*made, {"params": encodings, "lr": RATE}][: len(made) + bool(own)])


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])
