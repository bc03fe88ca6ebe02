"""The suite "kernels" on a CPU: the node's C++ against the products that it is made of.

Beside them: the node's reference compiled by Inductor, and softmax attention. Everything is checked
against float64 before it is timed, in turn, as in the suite "peers".
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from t5fx.analysis.measure import Spread

from ..harness.results import Experiment, Row
from . import peers
from .attentions import Node, Peer, Shape, Softmax

#: (heads, side of the grid, channels): DINOv2-S at 196, 518 and 1036 px, and a wider head.
SIZES = ((6, 14, 64), (6, 37, 64), (6, 74, 64), (12, 64, 128))
#: The one that is also timed with its backward pass.
TRAINED = (6, 37, 64)


class Products(Peer):
    """The matrix products of the node's forward, each into memory of its own, and nothing else."""

    name = "its matrix products alone"
    trains = False

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        pairs, tokens, dim = shape.batch * shape.heads, shape.tokens, shape.dim
        self.x = torch.randn(pairs, tokens, dim, dtype=shape.dtype)
        self.w = torch.randn(pairs, dim, dim, dtype=shape.dtype)
        self.rows = [torch.empty_like(self.x) for _ in range(6)]
        self.sums = [torch.empty_like(self.w) for _ in range(3)]

    def attend(self, *_: Tensor) -> Tensor:
        for out in self.sums:
            torch.bmm(self.x.mT, self.x, out=out)
        for out in self.rows:
            torch.bmm(self.x, self.w, out=out)
        return self.rows[-1]

    def exact(self, *_: Tensor) -> Tensor:
        return self.x.double() @ self.w.double()


class Reference(Node):
    name = "reference, Inductor"
    impl = "reference"


def experiments(small: bool = False) -> list[Experiment]:
    """Every size forward, one also with the backward pass."""
    cases = [(size, False) for size in SIZES] + [(TRAINED, True)]
    if small:
        cases = [((2, 8, 16), False), ((2, 8, 16), True)]
    shapes = [
        Shape(1, heads, side, dim, torch.float32, "cpu", trained)
        for (heads, side, dim), trained in cases
    ]
    return [
        Experiment(
            "kernels",
            str(shape),
            functools.partial(measure, shape),
            tokens=shape.tokens,
            mode="training" if shape.trained else "inference",
        )
        for shape in shapes
    ]


def measure(shape: Shape, experiment: Experiment) -> Iterator[Row]:
    """Rows of every contender; raises T5Error where one of them is wrong."""
    torch._dynamo.reset()  # or too many shapes would end in eager mode
    kinds = [kind for kind in (Softmax, Node, Reference, Products) if not kind.absent(shape)]
    ready = [peers.prepare(kind, shape) for kind in kinds]
    seconds = peers.in_turn(ready)
    yield from peers.rows(ready, seconds, experiment)
    if Products in kinds:
        for kind, own in zip(kinds, seconds, strict=True):
            if issubclass(kind, Node):
                ratios = [one / all_ for one, all_ in zip(own, seconds[-1], strict=True)]
                better = "" if kind is Reference else "lower"
                spread = Spread.of(ratios)
                yield experiment.row(
                    kind.name, "times its products", spread, unit="x", better=better
                )
